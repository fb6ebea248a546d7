"""Processes that train together: who is who, and gathering features so that gradients stay exact.

Without torchrun there is one process and nothing is set up. Gradients are summed over processes after the backward
pass: every process computes the loss of the whole global batch, but derives it by its own rows only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longclip_rt.errors import TrainingError


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
        """Adds up every parameter's gradient over the processes, in place, in buckets of about 64 MB."""
        if self.world == 1:
            return
        for bucket in _buckets([one.grad for one in parameters if one.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, total in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def any(self, flag: bool) -> bool:
        """Whether any process says so; every process has to ask."""
        if self.world == 1:
            return flag
        votes = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

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
        TrainingError: The device cannot be had.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _device(device, local)
    if world == 1:
        yield Processes(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
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
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TrainingError(f"There is no device {name!r}; name auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and (device.index or 0) >= cards:
        raise TrainingError(
            f"The device {name} cannot be had: PyTorch sees {cards} CUDA devices. Choose --device cpu, or start as many "
            "processes as there are GPUs."
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
