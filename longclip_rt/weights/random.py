"""Seeded, untrained weights: for tests, measurements and demonstrations, where only shapes and speed matter."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

from longclip_rt.model.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor


def random_state_dict(architecture: Architecture, seed: int) -> dict[str, Tensor]:
    """Draws seeded weights in the scale of CLIP's initialisation (arXiv 2103.00020, OpenAI's code).

    Biases and the LayerNorms' weights are drawn too, a little away from 0 and 1, so that no error in them can hide.
    The global random state is neither read nor changed.

    Args:
        architecture: What to draw.
        seed: Seed of the generator.

    Returns:
        The tensors of `architecture.shapes()`, float32.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    state_dict = {}
    for name, shape in architecture.shapes().items():
        tensor = torch.empty(shape)
        if name == "logit_scale":
            state_dict[name] = tensor.fill_(math.log(100))
            continue
        tensor.normal_(0.0, _deviation(name, shape, architecture), generator=generator)
        state_dict[name] = tensor + 1 if ".ln_" in f".{name}" and name.endswith("weight") else tensor
    return state_dict


def _deviation(name: str, shape: tuple[int, ...], architecture: Architecture) -> float:
    """Standard deviation of one tensor's entries."""
    vision = name.startswith("visual.")
    width = architecture.vision_width if vision else architecture.text_width
    layers = architecture.vision_layers if vision else architecture.text_layers
    if name == "positional_embedding":
        return 0.01
    if name == "token_embedding.weight" or (len(shape) == 1 and name != "visual.class_embedding"):
        return 0.02
    if name.endswith(("out_proj.weight", "c_proj.weight")):
        return float((2 * layers * width) ** -0.5)
    if name.endswith("c_fc.weight"):
        return float((2 * width) ** -0.5)
    return float(width**-0.5)


def sha256_of_tensors(state_dict: dict[str, Tensor]) -> str:
    """Hashes names, shapes and float32 values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].contiguous()
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).numpy().view("uint8").data)
    return digest.hexdigest()
