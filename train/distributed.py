"""Processes that train together: who is who, and gathering features so that gradients stay exact.

Without torchrun there is one process and nothing is set up. Gradients are summed over processes after the backward
pass: every process computes the loss of the whole global batch, but derives it by its own rows only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longclip_rt.errors import TrainingError

Value = TypeVar("Value")

# The others wait while the first validates and writes. A process that dies is noticed by torchrun, not by this.
_PATIENCE = timedelta(hours=3)


@dataclass(frozen=True)
class Processes:
    """One process's place among those that train together.

    Attributes:
        rank: This process's number, from 0; process 0 writes files and prints.
        world: Number of processes.
        device: Where this process computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def gather(self, rows: Tensor) -> Tensor:
        """All processes' rows [b, D] in the order of ranks, [world * b, D]; gradients flow to this process's own."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.detach().contiguous())
        parts[self.rank] = rows
        return torch.cat(parts)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up every parameter's gradient over the processes, in place, in buckets of about 64 MB.

        Args:
            parameters: In the same order on every process, and the same ones of them with a gradient.
        """
        if self.world == 1:
            return
        for bucket in _buckets([one.grad for one in parameters if one.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, total in zip(bucket, torch.split(flat, [one.numel() for one in bucket]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def collect(self, value: Value) -> list[Value]:
        """Every process's value, in the order of ranks, on each of them; every process has to call this.

        Args:
            value: Something small: it is pickled.
        """
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Joins the processes that torchrun started, or is the only one; leaves them at the end.

    Args:
        device: `auto` (the process's own GPU where there is one, else the CPU), `cpu`, `cuda` or `cuda:N`.

    Raises:
        TrainingError: The device cannot be had, or the other processes cannot be found.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _device(device, local)
    if world == 1:
        yield Processes(0, 1, chosen)
        return
    if chosen.type == "cuda":
        if device not in ("auto", "cuda"):
            raise TrainingError(f"{world} processes cannot share {device}; give --device cuda, or leave it out.")
        torch.cuda.set_device(chosen)
    try:
        if chosen.type == "cuda":
            dist.init_process_group("nccl", timeout=_PATIENCE, device_id=chosen)
        else:
            dist.init_process_group("gloo", timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise TrainingError(
            f"This is to be one of {world} processes (WORLD_SIZE), but it does not find the others: {error}. Start "
            "them with torchrun, or unset WORLD_SIZE to train in one."
        ) from error
    try:
        yield Processes(rank, world, chosen)
    finally:
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = f"cuda:{local_rank}" if cards else "cpu"
    elif name == "cuda":
        name = f"cuda:{local_rank}"
    if not re.fullmatch(r"cpu|cuda:\d+", name):
        raise TrainingError(f"There is no device {name!r}; name auto, cpu, cuda or cuda:N.")
    device = torch.device(name)
    if device.type == "cuda" and device.index >= cards:
        raise TrainingError(
            f"The device {name} cannot be had: PyTorch sees {cards} CUDA devices. Choose --device cpu, or start no "
            "more processes than there are GPUs."
        )
    return device


def _buckets(gradients: list[Tensor], most: int = 1 << 24) -> Iterator[list[Tensor]]:
    """Groups gradients of one dtype to at most `most` numbers, or one larger gradient alone."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.numel() > most or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket
