"""Weights that are no CLIP: recognised by their tensors' names, and refused with a sentence that says what they are."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longclip_rt.errors import WeightsError
from longclip_rt.model.architecture import few

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Foreign:
    """One architecture that is not run here: the names that give it away, and what it is."""

    pattern: str
    what: str


# Looked up in this order: a model may match several, and the first says most.
_FOREIGN = (
    _Foreign(
        r".*position(al)?_embedding_ori(\.weight)?|.*filip_projection\..*",
        "FG-CLIP: it has a third position table and a second text projection",
    ),
    _Foreign(
        r"(.*\.)?text_decoder\..*|(.*\.)?multimodal.*\.resblocks\..*",
        "CoCa or another captioner: it has a text decoder",
    ),
    _Foreign(
        r".*\.(word_embeddings|token_type_embeddings)\.weight|(.*\.)?encoder\.layer\.\d+\.attention\.self\..*|bert\..*",
        "a model whose text tower is BERT (as LoTLIP's, jina-clip's and Chinese-CLIP's)",
    ),
    _Foreign(
        r"vision_model\.head\..*|(visual\.)?trunk\.attn_pool\..*|text_model\.head\..*",
        "SigLIP: it has no class token and no causal text tower, but an attention pooling head",
    ),
    _Foreign(
        r"(?!visual|vision)(.*\.)?(rotary\w*|rope\w*|inv_freq|freqs\w*|cope\w*)(\..*)?",
        "a model whose text tower has rotary or contextual positions (as TULIP's) instead of a position table",
    ),
    _Foreign(
        r"(visual\.)?(layer[1-4]\.\d+\.conv1\.weight|attnpool\..*)",
        "a CLIP with a ResNet image tower; only Vision Transformers are run here",
    ),
    _Foreign(
        r"visual\.(trunk|blocks|patch_embed|rope|head)\..*|vision_model\.(blocks|patch_embed|rope)\..*",
        "a CLIP whose image tower is EVA's or one of timm's, not CLIP's Vision Transformer",
    ),
    _Foreign(
        r".*\.(ls_1|ls_2)\.gamma|.*\.(ln_q|ln_k|ln_attn|q_norm|k_norm)\.weight",
        "a CLIP whose blocks have further parts (LayerScale or norms inside attention)",
    ),
)


def refuse_other_architectures(names: Collection[str], source: str) -> None:
    """Raises a sentence that says what the weights are, where they are known and not CLIP's.

    Args:
        names: The tensors' names as the file has them, without wrappers' prefixes.
        source: What the user named.

    Raises:
        WeightsError: The names belong to another architecture, or to one tower alone.
    """
    for foreign in _FOREIGN:
        found = [name for name in names if re.fullmatch(foreign.pattern, name)]
        if found:
            raise WeightsError(f"{source} is {foreign.what} (found {few(found)}). {_EXPECTED}")


def refuse_incomplete_models(names: Collection[str], source: str) -> None:
    """Raises a sentence where a whole tower is absent, or nothing of a CLIP is there.

    Args:
        names: Canonical names.
        source: What the user named.

    Raises:
        WeightsError: There is no image tower, no text tower, no position table in it, or neither tower.
    """
    image = any(name.startswith("visual.") for name in names)
    text = any(name.startswith("transformer.resblocks.") for name in names)
    if not image and not text:
        raise WeightsError(f"{source} holds something else than a CLIP: {few(sorted(names))}. {_EXPECTED}")
    if not image or not text:
        has, lacks = ("text", "image") if text else ("image", "text")
        raise WeightsError(f"{source} holds the {has} tower alone; the {lacks} tower is missing. Pass the whole model.")
    if "positional_embedding" not in names:
        raise WeightsError(
            f"{source} has no text position table (positional_embedding): its text tower seems to use rotary positions "
            f"(as TULIP's) or others. {_EXPECTED}"
        )
    if "visual.class_embedding" not in names:
        raise WeightsError(f"{source} has no class embedding in its image tower, as SigLIP has none. {_EXPECTED}")


def refuse_unusable_tensors(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises a sentence about tensors that are not plain numbers in memory, before anything computes with them.

    Args:
        tensors: The weights as the file has them.
        source: What the user named.

    Raises:
        WeightsError: A tensor is sparse, nested, without data (meta), no floating point, or larger than what the file
            holds of it (one that was expanded).
    """
    import torch

    plain = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    strange, quantised, expanded = [], [], []
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type != "cpu":
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            strange.append(f"{name} ({kind if tensor.device.type == 'cpu' else f'on {tensor.device}'})")
        elif tensor.dtype not in plain:
            quantised.append(f"{name} ({tensor.dtype})")
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            expanded.append(f"{name} {list(tensor.shape)}")
    if strange:
        raise WeightsError(
            f"{source} holds tensors that are not dense numbers in memory: {few(strange)}. Save them as plain tensors "
            "on the CPU."
        )
    if quantised:
        raise WeightsError(
            f"{source} holds tensors that are not plain floating point: {few(quantised)}. Quantised weights cannot be "
            "used; pass the originals."
        )
    if expanded:
        raise WeightsError(
            f"{source} holds tensors with fewer numbers than their shapes say: {few(expanded)}. Save them with "
            ".contiguous(), if they are weights at all."
        )


def refuse_without_information(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises a sentence where zeros make every text, or every image, the same vector.

    Args:
        tensors: Canonical names, float32.
        source: What the user named.

    Raises:
        WeightsError: A tensor that everything goes through holds nothing but zeros.
    """
    zero = [name for name in _PASSED_BY_ALL if not bool(tensors[name].any())]
    if zero:
        raise WeightsError(
            f"{source} has nothing but zeros in {few(zero)}: every text or every image would get the same vector. It "
            "is no trained model; save its weights again, or pass others."
        )


_PASSED_BY_ALL = (
    "visual.conv1.weight",
    "visual.ln_pre.weight",
    "visual.ln_post.weight",
    "visual.proj",
    "token_embedding.weight",
    "ln_final.weight",
    "text_projection",
)

_EXPECTED = (
    "Expected are CLIP or Long-CLIP weights: a Vision Transformer with a class token, and a causal text tower with a "
    "position table."
)
