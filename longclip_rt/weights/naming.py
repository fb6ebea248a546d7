"""Tensor names: Hugging Face's, open_clip's and GmP's to the ones that OpenAI's CLIP and open_clip's `CLIP` share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from longclip_rt.errors import WeightsError
from longclip_rt.model.architecture import few

if TYPE_CHECKING:
    from torch import Tensor

SECOND_TABLE = "positional_embedding_res"
"""Long-CLIP's trained position table, beside the frozen `positional_embedding`."""

# Constants that models register as buffers, and the scalars in OpenAI's state dicts: the architecture implies them.
# A logit bias (of a CLIP trained with SigLIP's loss) shifts similarities, and never an embedding.
_IMPLIED = re.compile(
    r"(.*\.)?(position_ids|attn_mask|mask1|mask2|input_resolution|context_length|vocab_size)|logit_bias"
)

# Hugging Face's names outside the blocks, by tower. A trailing "weight" or "bias" follows where the last part is "*".
_TEXT = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_VISION = {
    "embeddings.class_embedding": "visual.class_embedding",
    "embeddings.patch_embedding.weight": "visual.conv1.weight",
    "embeddings.position_embedding.weight": "visual.positional_embedding",
    "pre_layrnorm.weight": "visual.ln_pre.weight",
    "pre_layrnorm.bias": "visual.ln_pre.bias",
    "pre_layernorm.weight": "visual.ln_pre.weight",
    "pre_layernorm.bias": "visual.ln_pre.bias",
    "post_layernorm.weight": "visual.ln_post.weight",
    "post_layernorm.bias": "visual.ln_post.bias",
}
_IN_BLOCK = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_BLOCK = re.compile(r"encoder\.layers\.([0-9]+)\.(.+)\.(weight|bias)")
_RES = re.compile(r"embeddings\.position(?:al)?_embedding_res(?:\.weight)?")


class _Named(dict[str, "Tensor"]):
    """Tensors by canonical name, where a second tensor of the same name is refused instead of replacing the first."""

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if name in self:
            raise WeightsError(
                f"The weights hold two tensors for {few([name])}, under two names. Which one is meant cannot be known; "
                "save the model's own state dict again."
            )
        super().__setitem__(name, tensor)


def without_implied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are weights: without the constants that the architecture implies, of whatever type."""
    return {name: tensor for name, tensor in tensors.items() if not _IMPLIED.fullmatch(name)}


def canonical_names(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Gives tensors OpenAI's names, which open_clip's `CLIP` shares; a second position table keeps its own.

    Values are only joined, transposed or multiplied out. What has no counterpart keeps its name, for the check against
    the architecture to report it.

    Args:
        tensors: A state dict with OpenAI's, open_clip's (`CLIP` or `CustomTextCLIP`) or Hugging Face's names; every
            tensor is dense and floating point.

    Returns:
        The renamed tensors, and notes on what was done.

    Raises:
        WeightsError: Two tensors stand for the same one, or parts that belong together do not fit each other.
    """
    notes: list[str] = []
    tensors = _multiplied_out(without_implied(tensors), notes)
    if any(name.startswith(("text_model.", "vision_model.")) for name in tensors):
        tensors = _from_huggingface(tensors)
        notes.append("renamed from Hugging Face's names")
    elif any(name.startswith("text.") for name in tensors):
        # CustomTextCLIP keeps its text tower in a module of its own; the names inside are the same.
        inner = _Named()
        for name, tensor in tensors.items():
            inner[name.removeprefix("text.")] = tensor
        tensors = inner
        notes.append("renamed from open_clip's CustomTextCLIP")
    linear = tensors.pop("text_projection.weight", None)
    if linear is not None:
        tensors = _Named(tensors)
        tensors["text_projection"] = _transposed(linear)
    return dict(tensors), notes


def _multiplied_out(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Turns GmP's weights (geometric parametrisation: a length r and a direction theta a row) into plain ones."""
    names = [name.removesuffix(".theta") for name in tensors if name.endswith(".theta")]
    names = [name for name in names if f"{name}.r" in tensors]
    if not names:
        return tensors
    tensors = _Named(tensors)
    for name in names:
        theta, length = tensors.pop(f"{name}.theta"), tensors.pop(f"{name}.r")
        if theta.ndim != 2 or length.numel() != len(theta):
            raise WeightsError(
                f"The weights hold a GmP direction {few([name])}.theta {list(theta.shape)} and lengths "
                f"{list(length.shape)}; a matrix and one length a row were expected."
            )
        # In fp32, because half precision would lose what the split was made to keep.
        row = theta.float().norm(dim=1, keepdim=True).clamp_min(1e-12)
        tensors[f"{name}.weight"] = length.float().reshape(-1, 1) * theta.float() / row
    notes.append(f"multiplied out {len(names)} GmP weights")
    return tensors


def _from_huggingface(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = _Named()
    parts: dict[str, _Named] = {}  # in_proj name -> q, k, v
    for name, tensor in tensors.items():
        tower, _, inner = name.partition(".")
        inner = inner.removeprefix(f"{tower}.")  # ports that wrap CLIPTextModel repeat the tower's name
        block = _BLOCK.fullmatch(inner)
        if name == "visual_projection.weight":
            renamed["visual.proj"] = _transposed(tensor)
        elif tower not in ("text_model", "vision_model"):
            renamed[name] = tensor
        elif block:
            layer, part, kind = block.groups()
            prefix = f"{'visual.' if tower == 'vision_model' else ''}transformer.resblocks.{layer}"
            letter = re.fullmatch(r"self_attn\.([qkv])_proj", part)
            if letter:
                parts.setdefault(f"{prefix}.attn.in_proj_{kind}", _Named())[letter[1]] = tensor
            else:
                renamed[f"{prefix}.{_IN_BLOCK[part]}.{kind}" if part in _IN_BLOCK else name] = tensor
        elif tower == "text_model" and _RES.fullmatch(inner):
            renamed[SECOND_TABLE] = tensor
        else:
            renamed[(_VISION if tower == "vision_model" else _TEXT).get(inner, name)] = tensor
    for name, letters in parts.items():
        if len(letters) == 3:
            renamed[name] = _joined(name, letters)
            continue
        for one, tensor in letters.items():
            renamed[f"{name} ({one} without the other two)"] = tensor  # reported as unexpected
    return renamed


def _joined(name: str, letters: dict[str, Tensor]) -> Tensor:
    """The projections q, k and v as one, in fp32: they may be of different float types."""
    import torch

    shapes = [list(letters[letter].shape) for letter in "qkv"]
    if not shapes[0] or shapes[1:] != shapes[:1] * 2:
        raise WeightsError(
            f"The weights hold the projections q, k and v of {few([name])} with the shapes {shapes}; three equal ones "
            "were expected."
        )
    return torch.cat([letters[letter].float() for letter in "qkv"])


def _transposed(tensor: Tensor) -> Tensor:
    """A matrix transposed; what is none stays, for the check of shapes to report it."""
    return tensor.T if tensor.ndim == 2 else tensor


def huggingface_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives a canonical state dict the names and layout of Hugging Face's `CLIPModel`.

    Args:
        tensors: The tensors of `Architecture.shapes()`.

    Returns:
        `CLIPModel`'s state dict; tensors that need no transposition share memory with the given ones.
    """
    plain = {name: f"text_model.{key}" for key, name in _TEXT.items()}
    plain |= {name: f"vision_model.{key}" for key, name in _VISION.items() if not key.startswith("pre_layernorm")}
    in_block = {ours: theirs for theirs, ours in _IN_BLOCK.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name)
        if name == "visual.proj":
            renamed["visual_projection.weight"] = tensor.T.contiguous()
        elif name == "text_projection":
            renamed["text_projection.weight"] = tensor.T.contiguous()
        elif block:
            tower, layer, part, kind = block.groups()
            prefix = f"{'vision_model' if tower else 'text_model'}.encoder.layers.{layer}"
            if part == "attn.in_proj":
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{prefix}.self_attn.{letter}_proj.{kind}"] = third.contiguous()
            else:
                renamed[f"{prefix}.{in_block[part]}.{kind}"] = tensor
        else:
            renamed[plain.get(name, name)] = tensor
    return renamed
