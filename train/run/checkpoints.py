"""Checkpoints of a run: written whole, hashed, read without running code, the newest good one found by itself."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from longclip_rt.errors import TrainingError
from longclip_rt.system.files import output_errors, sha256_of_file, whole_file, write_text_atomically

logger = logging.getLogger("longclip_rt")

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})\.pt")


@dataclass(frozen=True)
class TrainState:
    """All that a run needs to go on as if it had not stopped.

    Attributes:
        step: Steps done.
        config: `TrainConfig.to_dict()` of the run.
        weights: What `TrainableClip.weights()` gave.
        optimizer: The optimiser's state dict.
        scaler: The gradient scaler's state dict; empty where there is none.
        random: States of PyTorch's generators: `cpu`, and `cuda` where there is a GPU. Of process 0: training itself
            draws nothing.
        seconds: Time spent in training so far.
        world: Processes that trained.
    """

    step: int
    config: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    random: dict[str, Tensor]
    seconds: float
    world: int = 1


_FIELDS = tuple(field.name for field in dataclasses.fields(TrainState))


def save_checkpoint(folder: Path, state: TrainState, keep: int) -> Path:
    """Writes `checkpoints/step-N.pt` and a JSON file with its hash, and removes all but the newest `keep`.

    Those of later steps go too: a run that comes to step N passed them over because they are damaged.

    Raises:
        OutputError: The disk refuses.
    """
    target = folder / FOLDER / f"step-{state.step:08d}.pt"
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as file:
            _save({name: getattr(state, name) for name in _FIELDS}, file)
        # The hash comes last: a checkpoint without one was not finished.
        write_text_atomically(_hash_file(target), json.dumps({"sha256": sha256_of_file(target)}) + "\n")
        found = sorted(_checkpoints(folder))
        here = found.index(target) + 1
        for old in (*found[: max(here - keep, 0)], *found[here:]):
            _hash_file(old).unlink(missing_ok=True)
            old.unlink(missing_ok=True)
        for unfinished in target.parent.glob("step-*.tmp"):
            unfinished.unlink(missing_ok=True)
    return target


def _save(content: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # torch closes its archive after the disk refused, and reports what went wrong with that.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def load_newest_checkpoint(folder: Path) -> TrainState | None:
    """The newest checkpoint that is whole; damaged ones are passed over with a warning.

    Args:
        folder: The run's folder.

    Returns:
        Its state, on the CPU; None where there is none yet.

    Raises:
        TrainingError: There are checkpoints, and every one is damaged.
    """
    found = sorted(_checkpoints(folder), reverse=True)
    for path in found:
        try:
            return _load(path)
        except TrainingError as error:
            logger.warning("passed over a checkpoint: %s", error)
    if found:
        raise TrainingError(
            f"All {len(found)} checkpoints in {folder / FOLDER} are damaged. Remove {folder} to begin anew."
        )
    return None


def _load(path: Path) -> TrainState:
    try:
        expected = json.loads(_hash_file(path).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} was not finished: it has no hash beside it.") from error
    try:
        if sha256_of_file(path) != expected:
            raise TrainingError(f"{path} is damaged: its SHA-256 is not the one noted when it was written.")
        content = torch.load(path, map_location="cpu", weights_only=True)
        return TrainState(**{name: value for name, value in content.items() if name in _FIELDS})
    except (OSError, RuntimeError, pickle.UnpicklingError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path} cannot be read: {error}.") from error


def _checkpoints(folder: Path) -> Iterator[Path]:
    return (path for path in (folder / FOLDER).glob("step-*.pt") if _NAME.fullmatch(path.name))


def _hash_file(path: Path) -> Path:
    return path.with_suffix(".json")
