"""What a finished run leaves: weights that `export` takes, curves, the list of bad rows, and a model card."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from longclip_rt.system import machine
from longclip_rt.train.config import SCRATCH, TrainConfig
from longclip_rt.train.data.training_data import BadRow, BadRows, TrainingData
from longclip_rt.train.distributed import Processes
from longclip_rt.train.model import TrainableClip
from longclip_rt.train.run.card import CARD_FILE, ModelCard, TrainingFacts, write_model_card
from longclip_rt.train.run.report import CURVES_FILE, METRICS_FILE, plot_curves, read_metrics
from longclip_rt.weights.checkpoint import Checkpoint
from longclip_rt.weights.convert import write_weights

logger = logging.getLogger("longclip_rt")

WEIGHTS = "model.safetensors"
BAD_ROWS = "bad_rows.jsonl"

_LIMITS = (
    "It knows what its training data show, and inherits what they and the weights it began with get wrong. The recall "
    "above was measured on held-out rows of the same source, among as many candidates as there are rows, and says "
    "little about other pictures."
)


def save_results(
    folder: Path,
    config: TrainConfig,
    model: TrainableClip,
    start: Checkpoint,
    data: TrainingData,
    figures: Mapping[str, float],
    *,
    steps: int,
    seconds: float,
    precision: str,
    processes: Processes,
) -> None:
    """Writes `model.safetensors` (Long-CLIP's names), `curves.png`, `bad_rows.jsonl` and the card, `README.md`.

    Raises:
        OutputError: The disk refuses.
    """
    trained = dataclasses.replace(start, architecture=model.architecture)
    write_weights(trained, model.weights(), folder / WEIGHTS)
    save_bad_rows(data.bad, folder)
    if data.bad.count:
        logger.warning("%d rows could not be used; they are listed in %s", data.bad.count, folder / BAD_ROWS)
    if data.long_truncated:
        share = data.long_truncated / data.drawn
        logger.info("%.1f%% of the long captions were cut to %d tokens", 100 * share, model.architecture.context_length)
    plot_curves(folder)
    write_model_card(folder / CARD_FILE, _card(config, model, data, figures, steps, seconds, precision, processes))


def finished_figures(folder: Path, steps: int) -> dict[str, float] | None:
    """The last validation's figures of a run whose results are all written; None where one of them is not.

    Args:
        folder: The run's folder.
        steps: The run's last step.
    """
    if not all((folder / name).is_file() for name in (WEIGHTS, CURVES_FILE, CARD_FILE, METRICS_FILE)):
        return None
    last = {name: values[-1] for name, (at, values) in read_metrics(folder).items() if at[-1] == steps}
    return {name: value for name, value in last.items() if re.fullmatch(r"(long|short)_(i2t|t2i)_r\d+", name)}


def save_bad_rows(rows: BadRows, folder: Path) -> None:
    """Writes `bad_rows.jsonl`, where there are such rows.

    Raises:
        OutputError: The disk refuses.
    """
    if rows.count:
        rows.save(folder / BAD_ROWS)


def load_bad_rows(rows: BadRows, folder: Path) -> None:
    """Adds those that `save_bad_rows` wrote; a list that cannot be read is passed over, and finds itself again."""
    try:
        for line in (folder / BAD_ROWS).read_text(encoding="utf-8").splitlines():
            rows.add(BadRow(**json.loads(line)))
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s cannot be read (%s); its rows will be found again", folder / BAD_ROWS, error)


def _card(
    config: TrainConfig,
    model: TrainableClip,
    data: TrainingData,
    figures: Mapping[str, float],
    steps: int,
    seconds: float,
    precision: str,
    processes: Processes,
) -> ModelCard:
    name = f"{'CLIP' if config.objective == 'clip' else 'Long-CLIP'} {model.architecture.name}"
    facts = TrainingFacts(
        data=config.data,
        rows=data.rows,
        seed=config.seed,
        steps=steps,
        batch_size=config.batch_size,
        precision=precision,
        hardware=_hardware(processes),
        seconds=seconds,
        started_from=None if config.weights == SCRATCH else config.weights,
        validation_rows=data.validation_rows,
        versions={key: machine.package_versions().get(key) for key in ("longclip-rt", "torch", "open_clip_torch")},
        commit=_commit(),
    )
    summary = (
        f"Weights of a CLIP that reads {model.architecture.context_length} tokens, trained with longclip-rt "
        f"(objective `{config.objective}`, positions `{config.positions}`)."
    )
    return ModelCard(name, summary, facts, _LIMITS, config=config, retrieval=figures, weights=WEIGHTS)


def _hardware(processes: Processes) -> str:
    if processes.device.type == "cuda":
        return f"{processes.world} x {torch.cuda.get_device_name(processes.device)}"
    return f"{machine.cpu_name()}, {processes.world} x {torch.get_num_threads()} threads"


def _commit() -> str | None:
    """The commit of the code, where it runs from its own checkout (and not, installed, in that of another project)."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        told = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return None
    return told[1] if Path(told[0]).resolve() == root else None
