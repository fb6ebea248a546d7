"""How well embeddings match: retrieval, zero-shot classification, and pairs that differ in one detail. numpy alone.

Every function takes the embeddings as a model gives them and normalises them itself, in float32 (float64 stays).

Ties get the credit that breaking them at random earns on average: a truth that shares its rank with t others counts as
found in first place with 1 / (t + 1). Identical captions are common (short ones repeat, and two long ones that differ
only after the context are the same text), and so a model that cannot tell things apart scores at chance: neither at
nought, as when ties count against it, nor at 100%, as when they count for it. Similarities nearer than `TIE` are a tie,
because equal rows differ by rounding once they went through different products.

A row whose own similarity is not a finite number counts as missed, so that a run that has diverged shows 0%.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longclip_rt.errors import LongClipError

Floats = TypeVar("Floats", bound=NDArray[np.floating[Any]])
Array = NDArray[np.floating[Any]]

EPS = 1e-12
"""The least length that a vector is divided by, as in `torch.nn.functional.normalize`: a zero vector stays zero."""

TIE = 1e-6
"""Cosine similarities that differ by no more than this are equal: some eight roundings of float32 at 1."""

_BLOCK = 1 << 23  # similarities held at once: 32 MiB in float32


class PairAccuracy(NamedTuple):
    """The outcome of pair tests, a row each: float64 [N] of 1 (right), 0 (wrong) or 0.5 (a tie, which is chance)."""

    t2i: NDArray[np.float64]
    """Whether caption a is nearer to image a than to image b."""
    i2t: NDArray[np.float64]
    """Whether image a is nearer to caption a than to caption b."""


def unit_rows(rows: Floats) -> Floats:
    """Scales each row of [n, D] to length 1; one shorter than `EPS` is divided by `EPS`."""
    # Divided by their largest entry first: the squares of huge entries would overflow.
    largest = np.maximum(np.abs(rows).max(axis=1, keepdims=True, initial=0.0), EPS)
    scaled = rows / largest
    result: Floats = scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), EPS / largest)
    return result


def nearest_others(unit: Array) -> NDArray[np.intp]:
    """The row most like each row [n, D] of length 1, itself left out; nothing where it is alone."""
    if len(unit) < 2:
        return np.empty(0, np.intp)
    scores = unit @ unit.T
    np.fill_diagonal(scores, -np.inf)
    best: NDArray[np.intp] = scores.argmax(axis=1)
    return best


class Places(NamedTuple):
    """Where each query's best own target stands among all targets; one entry a query.

    Its own targets do not compete with each other: of several the nearest counts.
    """

    above: NDArray[np.intp]
    """int [Q]: targets of others that are nearer."""
    tied: NDArray[np.intp]
    """int [Q]: targets of others that are as near."""
    own: Array
    """[Q]: the cosine similarity of the best own target; not finite where there is none."""
    best: NDArray[np.intp]
    """int [Q]: the row of that target; of no meaning where there is none."""
    rival: NDArray[np.intp]
    """int [Q]: the row of the nearest target of others; of no meaning where there is none."""
    theirs: Array
    """[Q]: the cosine similarity of that one; not finite where there is none."""

    def hits(self, k: int) -> NDArray[np.float64]:
        """Whether the best own target is among the k nearest, float64 [Q]; a tie gives the share that chance would."""
        return _credit(self.above, self.tied, self.own, k)

    def ranks(self) -> NDArray[np.float64]:
        """The place of the best own target from 1 on, float64 [Q]: the middle one of a tie, infinite where none is."""
        return np.where(np.isfinite(self.own), 1 + self.above + self.tied / 2, np.inf)


def places(queries: ArrayLike, targets: ArrayLike, own: ArrayLike, of: ArrayLike) -> Places:
    """Ranks all targets for each query, a block of queries at a time.

    Args:
        queries: [Q, D], any float dtype.
        targets: [T, D], T at least 1.
        own: int [Q]: what a query belongs to.
        of: int [T]: what a target belongs to. A query without a target is a miss.
    """
    left, right = _normalised(queries), _normalised(targets)
    own, of = np.asarray(own), np.asarray(of)
    above, tied, mine_at, rival_at = (np.zeros(len(left), np.intp) for _ in range(4))
    best, theirs = np.zeros((2, len(left)), right.dtype)
    rows = max(1, _BLOCK // len(right))
    for start in range(0, len(left), rows):
        part = slice(start, start + rows)
        with np.errstate(invalid="ignore"):  # a run that has diverged
            block = left[part] @ right.T  # [rows, T]
        mine = own[part, None] == of[None, :]
        kept = np.where(mine, block, -np.inf)
        mine_at[part], nearest = kept.argmax(axis=1), kept.max(axis=1)
        best[part] = nearest
        block[mine] = -np.inf  # a query's own targets do not compete with each other
        rival_at[part], theirs[part] = block.argmax(axis=1), block.max(axis=1)
        above[part] = np.count_nonzero(block > (nearest + TIE)[:, None], axis=1)
        tied[part] = np.count_nonzero(block >= (nearest - TIE)[:, None], axis=1) - above[part]
    return Places(above, tied, best, mine_at, rival_at, theirs)


def recall(
    queries: ArrayLike, targets: ArrayLike, own: ArrayLike, of: ArrayLike, k: Sequence[int] = (1,)
) -> dict[int, float]:
    """How often one of a query's own targets is among the k nearest.

    Args:
        queries: [Q, D], any float dtype.
        targets: [T, D].
        own: int [Q]: what a query belongs to.
        of: int [T]: what a target belongs to. A query without a target is a miss.
        k: The ranks to report, each at least 1.

    Returns:
        Fractions from 0 to 1 by k.

    Raises:
        LongClipError: A k is below 1.
    """
    if any(rank < 1 for rank in k):
        raise LongClipError(f"Recall at {tuple(k)} was asked for. Each k is at least 1.")
    found = places(queries, targets, own, of)
    return {rank: float(found.hits(rank).mean()) for rank in k}


def retrieval(image: ArrayLike, text: ArrayLike, k: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall at k of N pairs, in both directions: whether row i's partner is among the k nearest of all N.

    Args:
        image: Embeddings [N, D], any float dtype; row i belongs to row i of the texts.
        text: [N, D].
        k: The ranks to report, each at least 1.

    Returns:
        Fractions from 0 to 1 by name: `i2t_r1` (image to text), `t2i_r1` (text to image), and so on for each k.

    Raises:
        LongClipError: The shapes do not match, there are no rows, or a k is below 1.
    """
    image, text = _checked("retrieval", image, text)
    pairs = np.arange(len(image))
    ways = {"i2t": recall(image, text, pairs, pairs, k), "t2i": recall(text, image, pairs, pairs, k)}
    return {f"{way}_r{rank}": value for way, found in ways.items() for rank, value in found.items()}


def zero_shot_accuracy(image: ArrayLike, classes: ArrayLike, labels: ArrayLike) -> float:
    """The share of images whose nearest class is their own.

    Args:
        image: Embeddings [N, D], any float dtype.
        classes: [C, D], one a class: the embedding of its prompt, or the mean of several normalised ones.
        labels: int [N], each image's class from 0 to C - 1.

    Returns:
        A fraction from 0 to 1.

    Raises:
        LongClipError: The shapes do not match, there are no rows, or a label names no class.
    """
    (image,) = _checked("zero_shot_accuracy", image)
    classes, labels = np.asarray(classes), np.asarray(labels)
    if classes.ndim != 2 or classes.shape[1:] != image.shape[1:] or not len(classes):
        raise LongClipError(
            f"zero_shot_accuracy got images {list(image.shape)} and classes {list(classes.shape)}. "
            "Give [N, D] and [C, D] with one D and at least one class."
        )
    if labels.shape != image.shape[:1]:
        raise LongClipError(
            f"zero_shot_accuracy got labels {list(labels.shape)} for {len(image)} images. Give one label an image."
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(classes):
        raise LongClipError(
            f"zero_shot_accuracy got labels from {labels.min()} to {labels.max()} ({labels.dtype}). "
            f"Give whole numbers from 0 to {len(classes) - 1}, one for each row of the classes."
        )
    return recall(image, classes, labels, np.arange(len(classes)))[1]


def pair_accuracy(image_a: ArrayLike, image_b: ArrayLike, text_a: ArrayLike, text_b: ArrayLike) -> PairAccuracy:
    """Whether each pair a is told from its twin b, which differs from it in one detail.

    The rows are kept apart, so that the caller can group them by the detail's token position. Exchange a and b for the
    same question about b.

    Args:
        image_a: [N, D], any float dtype.
        image_b: [N, D]; row i is the twin of image_a's row i.
        text_a: [N, D]; row i describes image_a's row i.
        text_b: [N, D]; row i describes image_b's row i.

    Returns:
        Two arrays [N], text to image and image to text.

    Raises:
        LongClipError: The shapes do not match, or there are no rows.
    """
    parts = _checked("pair_accuracy", image_a, image_b, text_a, text_b)
    image, other_image, text, other_text = map(_normalised, parts)
    own = (image * text).sum(axis=1)  # [N]
    return PairAccuracy(_wins(own, (other_image * text).sum(axis=1)), _wins(own, (image * other_text).sum(axis=1)))


def _wins(own: Array, other: Array) -> NDArray[np.float64]:
    above = (other > own + TIE).astype(int)
    return _credit(above, (other >= own - TIE) - above, own, 1)


def _credit(above: NDArray[np.intp], tied: NDArray[np.intp], own: Array, k: int) -> NDArray[np.float64]:
    """The chance that a truth with so many rivals above and level is in the first k places."""
    return np.clip((k - above) / (tied + 1), 0, 1) * np.isfinite(own)


def _normalised(features: ArrayLike) -> Array:
    """[N, D] of any float dtype to rows of length 1, float32 or float64."""
    rows = np.asarray(features)
    with np.errstate(invalid="ignore"):
        return unit_rows(rows if rows.dtype == np.float64 else rows.astype(np.float32))


def _checked(name: str, *features: ArrayLike) -> list[NDArray[Any]]:
    """Arrays, all [N, D] with the same N and D, and N is not 0."""
    arrays = [np.asarray(one) for one in features]
    if {one.shape for one in arrays} != {arrays[0].shape} or arrays[0].ndim != 2 or not len(arrays[0]):
        given = ", ".join(str(list(one.shape)) for one in arrays)
        raise LongClipError(f"{name} got embeddings {given}. Give [N, D] with one D, and one N of at least 1.")
    return arrays
