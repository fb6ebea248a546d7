"""What a finished run leaves: weights that `export` takes, curves, the list of bad rows, and a model card."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from longclip_rt import machine
from longclip_rt.checkpoint import Checkpoint
from longclip_rt.convert import write_weights
from longclip_rt.train.card import CARD_FILE, ModelCard, TrainingFacts, write_model_card
from longclip_rt.train.config import SCRATCH, TrainConfig
from longclip_rt.train.data import TrainingData
from longclip_rt.train.distributed import Processes
from longclip_rt.train.model import TrainableClip
from longclip_rt.train.report import plot_curves

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
    if data.bad.count:
        data.bad.save(folder / BAD_ROWS)
        logger.warning("%d rows could not be used; they are listed in %s", data.bad.count, folder / BAD_ROWS)
    if data.long_truncated:
        logger.info("%d of %d long captions were cut to %d tokens", data.long_truncated, data.drawn,
                    model.architecture.context_length)  # fmt: skip
    plot_curves(folder)
    write_model_card(folder / CARD_FILE, _card(config, model, data, figures, steps, seconds, precision, processes))


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
    """The commit of the code, where it runs from a checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
