"""What a run begins with: its folder, the weights, the precision and the data."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import torch

from longclip_rt.architecture import CLIP_CONTEXT_LENGTH, LONG_CONTEXT_LENGTH, Architecture
from longclip_rt.checkpoint import Checkpoint, load_checkpoint
from longclip_rt.errors import TrainingError
from longclip_rt.files import output_errors, write_text_atomically
from longclip_rt.machine import cpu_features
from longclip_rt.preprocess import ImageTransform
from longclip_rt.tokenizer import Tokenizer
from longclip_rt.train.checkpoints import TrainState, load_newest_checkpoint
from longclip_rt.train.config import SCRATCH, Positions, TrainConfig
from longclip_rt.train.data import DataOptions, TrainingData, open_data
from longclip_rt.train.distributed import Processes
from longclip_rt.weights.random import random_state_dict, sha256_of_tensors

CONFIG = "config.json"

# What may differ when a run goes on: none of it changes what is learnt.
_FREE = ("workers", "checkpoint_every", "keep_checkpoints", "validate_every")


def claim_folder(config: TrainConfig, folder: Path, resume: bool, procs: Processes) -> TrainState | None:
    """Makes the run's folder and notes its configuration there, or finds what to go on with.

    Args:
        config: The run.
        folder: Its folder.
        resume: Whether to go on with what is there.
        procs: The first process writes.

    Returns:
        The newest good checkpoint; None for a new run, and for one that has none yet.

    Raises:
        TrainingError: The folder holds another run, or one that was not asked to go on.
        OutputError: It cannot be written.
    """
    file = folder / CONFIG
    written = json.dumps(config.to_dict(), indent=2) + "\n"
    # Read by all before it is written by one.
    before = file.read_text(encoding="utf-8") if file.is_file() else None
    procs.wait()
    if before is not None:
        if not resume:
            raise TrainingError(f"{folder} holds a run. Add --resume to go on with it, or choose another --out.")
        old, new = json.loads(before), json.loads(written)
        differing = [name for name in new if name not in _FREE and old.get(name) != new[name]]
        if differing:
            told = ", ".join(f"{name} ({old.get(name)!r} there, {new[name]!r} here)" for name in differing)
            raise TrainingError(
                f"The run in {folder} has another {told}. Resume it with its own settings, or choose another --out."
            )
    if procs.main:
        with output_errors(file):
            folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, written)
    return load_newest_checkpoint(folder) if before is not None else None


def starting_weights(config: TrainConfig) -> Checkpoint:
    """The weights to begin with: loaded, or drawn from the seed.

    With `kps` positions a table of 77 rows comes back stretched to 248; otherwise it keeps its 77.

    Raises:
        WeightsError: They cannot be used.
    """
    if config.weights == SCRATCH:
        assert config.architecture is not None
        architecture = dataclasses.replace(config.architecture, context_length=CLIP_CONTEXT_LENGTH)
        weights = random_state_dict(architecture, config.seed)
        return Checkpoint(weights, architecture, SCRATCH, sha256_of_tensors(weights), trained=True)
    length = LONG_CONTEXT_LENGTH if config.positions == "kps" else CLIP_CONTEXT_LENGTH
    checkpoint = load_checkpoint(config.weights, context_length=length)
    return dataclasses.replace(checkpoint, trained=True)


def precision_of(name: str, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp16`; `auto` is fp16 on a GPU (as in the reference), bf16 on a CPU that computes in it.

    Raises:
        TrainingError: fp16 was asked for on a CPU, which has no fast arithmetic for it.
    """
    if device.type == "cuda":
        return "fp16" if name == "auto" else name
    if name == "auto":
        return "bf16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_features()) else "fp32"
    if name == "fp16":
        raise TrainingError("Training in fp16 needs a GPU; choose --precision bf16 or fp32 on a CPU.")
    return name


def open_training_data(
    config: TrainConfig, architecture: Architecture, start: Checkpoint, procs: Processes
) -> TrainingData:
    """Opens the run's data for this process, with the model's tokenizer and image transform.

    Raises:
        TrainingError: They cannot be used.
    """
    from longclip_rt.export.vocabulary import tokenizer_json

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_text(tokenizer_json(architecture.context_length, architecture.vocab_size), encoding="utf-8")
        tokenizer = Tokenizer.from_file(file, architecture.context_length)
    transform = ImageTransform(architecture.image_size, start.image_mean, start.image_std)
    options = DataOptions(
        data=config.data,
        batch_size=config.batch_size,
        val=config.val,
        images=Path(config.images) if config.images is not None else None,
        image_column=config.image_column,
        long_column=config.long_column,
        short_column=config.short_column,
        val_rows=config.val_rows,
        workers=config.workers,
        seed=config.seed,
        max_bad=config.max_bad,
    )
    return open_data(options, tokenizer, transform, procs.rank, procs.world)
