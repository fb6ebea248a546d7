"""One training step's gradients, exact for any batch size: features in chunks, the loss on all, and back in chunks.

Gradient caching (arXiv 2101.06983): the loss needs every feature of the batch at once, but a tower's activations only
while its own chunk goes backward. So features are computed without activations first, the loss gives the gradient of
each feature, and each chunk is then computed again with activations and sent backward with its part of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longclip_rt.train.data import Batch
from longclip_rt.train.distributed import Processes
from longclip_rt.train.loss import Objective, branch_losses
from longclip_rt.train.model import TrainableClip

_PAD_MULTIPLE = 8


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
    """Adds the gradients of a batch's loss to the model's, summed over all processes.

    Args:
        model: Towers and temperature.
        batch: This process's rows, on its device.
        objective: The loss.
        processes: The others, for the global batch.
        chunk: Rows whose activations are held at a time; None, or as many as there are rows, holds all at once.
        autocast: Makes the context in which towers run.
        scale: Multiplies the loss before it goes backward (loss scaling of half precision).

    Returns:
        The losses, unscaled.
    """
    inputs: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "image": (model.encode_image, batch.pixels),
        "long": (model.encode_text, batch.long_ids),
    }
    if objective.has_short_branch:
        inputs["short"] = (model.encode_text, batch.short_ids)
    rows = len(batch.pixels)
    size = min(chunk or rows, rows)
    cached = size < rows

    def encode(encoder: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
        with autocast():
            return encoder(part)

    outputs: dict[str, list[Tensor]] = {}
    leaves: dict[str, Tensor] = {}
    for name, (encoder, values) in inputs.items():
        with torch.no_grad() if cached else contextlib.nullcontext():
            outputs[name] = [encode(encoder, part) for part in _chunks(values, size)]
        leaves[name] = torch.cat([output.detach().float() for output in outputs[name]]).requires_grad_()
    long, short = branch_losses(
        objective, leaves["image"], leaves["long"], leaves.get("short"), model.logit_scale, processes.gather
    )
    scale(long + short).backward()  # type: ignore[no-untyped-call]
    for name, (encoder, values) in inputs.items():
        gradients = leaves[name].grad
        assert gradients is not None
        for index, (part, gradient) in enumerate(zip(_chunks(values, size), gradients.split(size), strict=True)):
            output = encode(encoder, part) if cached else outputs[name][index]
            output.backward(gradient.to(output.dtype))  # type: ignore[no-untyped-call]
    if model.logit_scale.grad is not None:
        # Every process derived the whole loss by the temperature, and only its own part of it by its features.
        model.logit_scale.grad /= processes.world
    processes.sum_gradients(model.parameters())
    return StepLosses(long.detach(), short.detach())


def _chunks(values: Tensor, size: int) -> Iterator[Tensor]:
    """Pieces of `size` rows; of texts without the columns in which all of a piece is padding, which is exact."""
    for part in values.split(size):
        if part.ndim == 2 and size < len(values):
            used = int((part != 0).any(dim=0).nonzero().max()) + 1
            part = part[:, : -(-used // _PAD_MULTIPLE) * _PAD_MULTIPLE]
        yield part
