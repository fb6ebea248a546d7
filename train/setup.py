"""What a run begins with: the weights, the precision and the data."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from pathlib import Path

import torch

from longclip_rt.errors import TrainingError
from longclip_rt.model.architecture import CLIP_CONTEXT_LENGTH, LONG_CONTEXT_LENGTH, Architecture
from longclip_rt.model.preprocess import ImageTransform
from longclip_rt.model.tokenizer import Tokenizer
from longclip_rt.system.machine import cpu_features
from longclip_rt.train.config import SCRATCH, TrainConfig
from longclip_rt.train.data.training_data import DataOptions, TrainingData, open_data
from longclip_rt.train.distributed import Processes
from longclip_rt.train.loss import pcm_is_identity
from longclip_rt.train.model import TrainableClip
from longclip_rt.weights.checkpoint import Checkpoint, load_checkpoint
from longclip_rt.weights.random import random_state_dict, sha256_of_tensors

logger = logging.getLogger("longclip_rt")


def starting_weights(config: TrainConfig, progress: bool = True) -> Checkpoint:
    """The weights to begin with: loaded, or drawn from the seed.

    With `kps` positions a table of 77 rows comes back stretched to 248; otherwise it keeps its length.

    Args:
        config: The run.
        progress: Whether to show a download's progress on stderr.

    Raises:
        WeightsError: They cannot be used.
    """
    if config.weights == SCRATCH:
        assert config.architecture is not None
        architecture = dataclasses.replace(config.architecture, context_length=CLIP_CONTEXT_LENGTH)
        weights = random_state_dict(architecture, config.seed)
        return Checkpoint(weights, architecture, SCRATCH, sha256_of_tensors(weights), trained=True)
    length = LONG_CONTEXT_LENGTH if config.positions == "kps" else None
    checkpoint = load_checkpoint(config.weights, context_length=length, progress=progress)
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
    from longclip_rt.model.vocabulary import tokenizer_json

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


def announce(
    config: TrainConfig,
    model: TrainableClip,
    data: TrainingData,
    procs: Processes,
    precision: str,
    step: int,
    total: int,
    quiet: bool,
) -> None:
    """Says once, before the first step, what a user should know; `quiet` leaves the warnings only."""
    if step >= total:
        if not quiet:
            logger.info("all %d steps of this run are done", total)
        return
    if not quiet:
        if step:
            logger.info("going on after step %d of %d", step, total)
        others = f", {procs.world} processes" if procs.world > 1 else ""
        what = (data.rows, total, config.batch_size, precision, procs.device, others)
        logger.info("%d pairs, %d steps of %d, %s on %s%s", *what)
    if config.warmup_steps >= total:
        logger.warning("the learning rate never falls: the warm-up takes all of the %d steps", total)
    rows = config.batch_size // procs.world if config.pcm_scope == "local" else config.batch_size
    width = model.architecture.embed_dim
    if config.objective == "longclip" and pcm_is_identity(rows, width, config.components):
        logger.warning(
            "PCM changes nothing here: %d rows of %d values have no more than %d principal components, so the short "
            "captions are matched with whole image features. Enlarge the batch (--batch-size with --chunk-size needs "
            "no more memory), choose --pcm-scope global, or fewer --components.",
            rows,
            width,
            config.components,
        )
