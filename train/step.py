"""One training step's gradients, exact for any batch size: features in chunks, the loss on all, and back in chunks.

Gradient caching (arXiv 2101.06983): the loss needs every feature of the batch at once, but a tower's activations only
while its own chunk goes backward. So features are computed without activations first, the loss gives the gradient of
each feature, and each chunk is then computed again with activations and sent backward with its part of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longclip_rt.train.data.training_data import Batch
from longclip_rt.train.distributed import Processes
from longclip_rt.train.loss import Objective, branch_losses
from longclip_rt.train.model import TrainableClip

_PAD_MULTIPLE = 8

# On a CPU a batch goes through the towers in pieces even if all activations are kept: they stay in its caches, and
# texts of like length are padded less. Measured with the tiny preset on scenes: 30% less time a step.
_CPU_PIECE = 16

Encoder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StepLosses:
    """A step's losses, over the global batch, as scalars on the device.

    Attributes:
        long: Against the long captions.
        short: Against the short captions; 0 without that branch.
    """

    long: Tensor
    short: Tensor

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        return self.long + self.short


def backward(
    model: TrainableClip,
    batch: Batch,
    objective: Objective,
    processes: Processes,
    *,
    chunk: int | None = None,
    autocast: Callable[[], Any] = contextlib.nullcontext,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> StepLosses:
    """Gives the model's parameters the gradients of a batch's loss, summed over all processes.

    Args:
        model: Towers and temperature, without gradients as yet.
        batch: This process's rows, on its device.
        objective: The loss.
        processes: The others, for the global batch.
        chunk: Rows whose activations are held at a time; None, or as many as there are rows, holds all at once.
        autocast: Makes the context in which towers run.
        scale: Multiplies the loss before it goes backward (loss scaling of half precision).

    Returns:
        The losses, unscaled.
    """
    inputs: dict[str, tuple[Encoder, Tensor]] = {
        "image": (model.encode_image, batch.pixels),
        "long": (model.encode_text, batch.long_ids),
    }
    if objective.has_short_branch:
        inputs["short"] = (model.encode_text, batch.short_ids)
    rows = len(batch.pixels)
    cached = chunk is not None and chunk < rows
    size = min(chunk or (_CPU_PIECE if batch.pixels.device.type == "cpu" else rows), rows)

    def encode(encoder: Encoder, piece: Tensor) -> Tensor:
        with autocast():
            return encoder(piece)

    pieces = {name: _pieces(values, size) for name, (_, values) in inputs.items()}
    outputs: dict[str, list[Tensor]] = {}
    leaves: dict[str, Tensor] = {}
    for name, (encoder, _) in inputs.items():
        with torch.no_grad() if cached else contextlib.nullcontext():
            outputs[name] = [encode(encoder, piece.values) for piece in pieces[name]]
        joined = torch.cat([output.detach().float() for output in outputs[name]])
        order = torch.cat([piece.rows for piece in pieces[name]])
        leaves[name] = torch.empty_like(joined).index_copy_(0, order, joined).requires_grad_()
    long, short = branch_losses(
        objective, leaves["image"], leaves["long"], leaves.get("short"), model.logit_scale, processes.gather
    )
    scale(long + short).backward()  # type: ignore[no-untyped-call]
    for name, (encoder, _) in inputs.items():
        gradient = leaves[name].grad
        assert gradient is not None
        for index, piece in enumerate(pieces[name]):
            output = encode(encoder, piece.values) if cached else outputs[name][index]
            if output.requires_grad:  # not of a frozen tower
                output.backward(gradient[piece.rows].to(output.dtype))  # type: ignore[no-untyped-call]
    if model.logit_scale.grad is not None:
        # Every process derived the whole loss by the temperature, and only its own part of it by its features.
        model.logit_scale.grad /= processes.world
    processes.sum_gradients(model.parameters())
    return StepLosses(long.detach(), short.detach())


@dataclass(frozen=True)
class _Piece:
    """Rows that go through a tower together, and their places in the batch, [n]."""

    rows: Tensor
    values: Tensor


def _pieces(values: Tensor, size: int) -> list[_Piece]:
    """Cuts a batch into pieces of `size` rows; texts by length, without the columns that are all padding in a piece.

    Neither changes a feature: a text's pooled token does not see what comes after it.
    """
    if size >= len(values):
        return [_Piece(torch.arange(len(values), device=values.device), values)]
    if values.ndim != 2:
        every = torch.arange(len(values), device=values.device)
        return [_Piece(rows, values[rows]) for rows in torch.split(every, size)]
    columns = torch.arange(1, values.shape[1] + 1, device=values.device)
    used = ((values != 0) * columns).amax(dim=1)  # [b] tokens of each text
    pieces = []
    for rows in torch.split(used.argsort(stable=True), size):
        length = -(-int(used[rows].max()) // _PAD_MULTIPLE) * _PAD_MULTIPLE
        pieces.append(_Piece(rows, values[rows, :length]))
    return pieces
