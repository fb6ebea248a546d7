"""How well embeddings match: retrieval, zero-shot classification, and pairs that differ in one detail.

Every function takes the embeddings as the towers give them and normalises them itself, in float32 (float64 stays).

Ties get the credit that breaking them at random earns on average: a truth that shares its rank with t others counts as
found in first place with 1 / (t + 1). Identical captions are common (short ones repeat, and two long ones that differ
only after the context are the same text), and so a model that cannot tell things apart scores at chance: neither at
nought, as when ties count against it, nor at 100%, as when they count for it. Similarities nearer than `TIE` are a tie,
because equal rows differ by rounding once they went through different products.

A row whose own similarity is not a finite number counts as missed, so that a run that has diverged shows 0%.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longclip_rt.errors import LongClipError

TIE = 1e-6
"""Cosine similarities that differ by no more than this are equal: some eight roundings of float32 at 1."""

# Similarities held at once: 32 MiB in float32. Of 2^20 to 2^24 the quickest for 20,000 rows on two cores: 3.7 s, of
# which the product takes 2.7; comparisons summed in int32 take half the time of int64.
_BLOCK = 1 << 23


class PairAccuracy(NamedTuple):
    """The outcome of pair tests, a row each: float32 [N] of 1 (right), 0 (wrong) or 0.5 (a tie, which is chance)."""

    t2i: Tensor
    """Whether caption a is nearer to image a than to image b."""
    i2t: Tensor
    """Whether image a is nearer to caption a than to caption b."""


@torch.no_grad()
def retrieval(image_features: Tensor, text_features: Tensor, k: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall at k of N pairs, in both directions: whether row i's partner is among the k nearest of all N.

    The N x N similarities are computed once, in blocks of rows, and never held together.

    Args:
        image_features: [N, D], any float dtype; row i belongs to row i of the texts.
        text_features: [N, D], on the same device.
        k: The ranks to report, each at least 1.

    Returns:
        Fractions from 0 to 1 by name: `i2t_r1` (image to text), `t2i_r1` (text to image), and so on for each k.

    Raises:
        LongClipError: The shapes do not match, there are no rows, or a k is below 1.
    """
    _check_rows("retrieval", image_features, text_features)
    if any(rank < 1 for rank in k):
        raise LongClipError(f"Recall at {tuple(k)} was asked for. Each k is at least 1.")
    image, text = _normalised(image_features), _normalised(text_features)
    count = len(image)
    own = _own_similarities(image, text)  # [N]
    above = torch.zeros(2, count, dtype=torch.int64, device=image.device)  # row 0: image to text, row 1: text to image
    near = torch.zeros_like(above)
    rows = max(1, _BLOCK // count)
    for start in range(0, count, rows):
        block = _similarities(image[start : start + rows], text)  # [rows, N]
        block.diagonal(start).fill_(-torch.inf)  # a pair does not compete with itself
        stop = start + len(block)
        mine, theirs = own[start:stop, None], own[None, :]
        above[0, start:stop] = (block > mine + TIE).sum(1, dtype=torch.int32)
        near[0, start:stop] = (block >= mine - TIE).sum(1, dtype=torch.int32)
        above[1] += (block > theirs + TIE).sum(0, dtype=torch.int32)
        near[1] += (block >= theirs - TIE).sum(0, dtype=torch.int32)
    found = {rank: _credit(above, near - above, own, rank).mean(1).tolist() for rank in k}
    return {f"{direction}_r{rank}": found[rank][index] for index, direction in enumerate(("i2t", "t2i")) for rank in k}


@torch.no_grad()
def zero_shot_accuracy(image_features: Tensor, class_features: Tensor, labels: Tensor) -> float:
    """The share of images whose nearest class is their own.

    Args:
        image_features: [N, D], any float dtype.
        class_features: [C, D], one a class: the embedding of its prompt, or the mean of several normalised ones.
        labels: int64 [N], each image's class from 0 to C - 1.

    Returns:
        A fraction from 0 to 1.

    Raises:
        LongClipError: The shapes do not match, there are no rows, or a label names no class.
    """
    _check_rows("zero_shot_accuracy", image_features)
    classes = len(class_features)
    if class_features.ndim != 2 or class_features.shape[1:] != image_features.shape[1:] or not classes:
        raise LongClipError(
            f"zero_shot_accuracy got images {_shape(image_features)} and classes {_shape(class_features)}. "
            "Give [N, D] and [C, D] with one D and at least one class."
        )
    if labels.shape != image_features.shape[:1]:
        raise LongClipError(
            f"zero_shot_accuracy got labels {_shape(labels)} for {len(image_features)} images. Give one label an image."
        )
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise LongClipError(
            f"zero_shot_accuracy got labels from {labels.min().item()} to {labels.max().item()} ({labels.dtype}). "
            f"Give whole numbers from 0 to {classes - 1}, one for each row of the classes."
        )
    image, prompts = _normalised(image_features), _normalised(class_features)
    labels = labels.to(image.device, torch.int64)
    right = 0.0
    rows = max(1, _BLOCK // classes)
    for start in range(0, len(image), rows):
        block = _similarities(image[start : start + rows], prompts)  # [rows, C]
        place = labels[start : start + rows, None]
        own = block.gather(1, place)  # [rows, 1]
        block.scatter_(1, place, -torch.inf)
        above = (block > own + TIE).sum(1)
        near = (block >= own - TIE).sum(1)
        right += float(_credit(above, near - above, own[:, 0], 1).sum())
    return right / len(image)


@torch.no_grad()
def pair_accuracy(image_a: Tensor, image_b: Tensor, text_a: Tensor, text_b: Tensor) -> PairAccuracy:
    """Whether each pair a is told from its twin b, which differs from it in one detail.

    The rows are kept apart, so that the caller can group them by the detail's token position. Exchange a and b for the
    same question about b.

    Args:
        image_a: [N, D], any float dtype.
        image_b: [N, D]; row i is the twin of image_a's row i.
        text_a: [N, D]; row i describes image_a's row i.
        text_b: [N, D]; row i describes image_b's row i.

    Returns:
        Two tensors [N], text to image and image to text.

    Raises:
        LongClipError: The shapes do not match, or there are no rows.
    """
    _check_rows("pair_accuracy", image_a, image_b, text_a, text_b)
    image, text = _normalised(image_a), _normalised(text_a)
    own = (image * text).sum(1)  # [N]
    other_image = (_normalised(image_b) * text).sum(1)
    other_text = (image * _normalised(text_b)).sum(1)
    return PairAccuracy(_wins(own, other_image), _wins(own, other_text))


def _wins(own: Tensor, other: Tensor) -> Tensor:
    """[N] and [N] to float32 [N]: 1 where own is larger, 0.5 at a tie, 0 elsewhere, and where own is not finite."""
    above, near = other > own + TIE, other >= own - TIE
    return _credit(above.long(), near.long() - above.long(), own, 1).float()


def _credit(above: Tensor, tied: Tensor, own: Tensor, k: int) -> Tensor:
    """The chance that a truth with so many rivals above and level is in the first k places: float64, of their shape."""
    chance = (k - above).double() / (tied + 1)
    return chance.clamp(0, 1) * own.isfinite()


def _own_similarities(image: Tensor, text: Tensor) -> Tensor:
    """The diagonal of the similarities, [N], by the products that make the rest: TF32 rounds them all alike."""
    rows = 256
    parts = [_similarities(image[i : i + rows], text[i : i + rows]).diagonal() for i in range(0, len(image), rows)]
    return torch.cat(parts)


def _similarities(left: Tensor, right: Tensor) -> Tensor:
    """[R, D] and [C, D] to [R, C], in their own dtype even where the caller has switched autocast on."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right.T


def _normalised(features: Tensor) -> Tensor:
    """[N, D] of any float dtype to rows of length 1, float32 or float64; a row of zeros stays so."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


def _check_rows(name: str, *features: Tensor) -> None:
    """Every tensor is [N, D] with the same N and D, and N is not 0."""
    shapes = {tuple(tensor.shape) for tensor in features}
    shape = shapes.pop()
    if shapes or len(shape) != 2 or shape[0] == 0:
        given = ", ".join(_shape(tensor) for tensor in features)
        raise LongClipError(f"{name} got embeddings {given}. Give [N, D] with one D, and one N of at least 1.")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
