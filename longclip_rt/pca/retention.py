"""What a PCA with K components keeps: of the variance, of text-image retrieval, and of nearest neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longclip_rt.metrics import nearest_others, recall, unit_rows
from longclip_rt.pca.basis import Basis, Float64

SMALLEST_K = 16


class HeldOut:
    """Rows that take no part in a fit: kinds, vectors, and what makes a text and an image a pair."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[str, NDArray[np.floating]]]] = {"text": [], "image": []}

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._rows.values())

    def add(self, kind: str, pair: str, vector: NDArray[np.floating]) -> None:
        """Adds a row; an empty `pair` belongs to none."""
        self._rows[kind].append((pair, vector.copy()))

    def vectors(self, kind: str) -> Float64:
        """All rows of a kind, [n, D]."""
        return np.array([vector for _, vector in self._rows[kind]], np.float64)

    def pairs(self) -> tuple[list[str], list[str]]:
        """Pair names of the texts and of the images, row by row; empty where there is no partner, or several images."""
        texts, images = ([pair for pair, _ in self._rows[kind]] for kind in ("text", "image"))
        single = {pair for pair, count in Counter(images).items() if pair and count == 1} & set(texts)
        return [pair if pair in single else "" for pair in texts], [pair if pair in single else "" for pair in images]


@dataclass(frozen=True)
class Row:
    """What one K keeps. A share that could not be measured is None.

    Attributes:
        k: Components; None for the embeddings as they are.
        explained: Share of the variance, of the rows fitted.
        images_found: R@1 of images for texts: how often the nearest image is the text's own.
        texts_found: R@1 of texts for images: how often the nearest text is one of the image's own.
        neighbours: How often the nearest other row of the same kind is the one it is without PCA.
    """

    k: int | None
    explained: float
    images_found: float | None
    texts_found: float | None
    neighbours: float | None


@dataclass(frozen=True)
class Retention:
    """The table of `Row`s, K from small to large and the embeddings as they are last.

    Attributes:
        rows: The lines.
        texts: Held-out texts.
        images: Held-out images.
        pairs: Held-out texts whose image is held out too; R@1 is over these and their images.
        reconstructed: Whether R@1 was measured on reconstructions: K numbers of two bases cannot be compared.
    """

    rows: tuple[Row, ...]
    texts: int
    images: int
    pairs: int
    reconstructed: bool


def retention_table(bases: Mapping[str, Basis], held_out: HeldOut, k: int | None) -> Retention | None:
    """Measures K = 16, 32, ... D, and `k`, on rows that the bases have not seen.

    Args:
        bases: `joint`, or `text` and `image`, with all D components.
        held_out: The rows.
        k: A further K to measure.

    Returns:
        The table, or None where there is nothing held out that could be compared.
    """
    kinds = {kind: held_out.vectors(kind) for kind in ("text", "image")}
    if all(len(vectors) < 2 for vectors in kinds.values()):
        return None
    basis_of = {kind: bases.get("joint") or bases[kind] for kind in kinds}
    dim = basis_of["text"].dim
    apart = "joint" not in bases
    text_pairs, image_pairs = (np.array(names, str) for names in held_out.pairs())
    of_texts, of_images = np.flatnonzero(text_pairs != ""), np.flatnonzero(image_pairs != "")
    texts, images = text_pairs[of_texts], image_pairs[of_images]
    whole = {kind: unit_rows(vectors) for kind, vectors in kinds.items() if len(vectors)}
    nearest = {kind: nearest_others(vectors) for kind, vectors in whole.items()}

    def row(size: int | None) -> Row:
        reduced = {kind: _reduced(kinds[kind], basis_of[kind], size) for kind in whole}
        agreeing = [nearest[kind] == nearest_others(reduced[kind]) for kind in whole]
        found: tuple[float | None, float | None] = (None, None)
        if len(texts):
            crossing = reduced
            if apart and size is not None:
                crossing = {kind: _reconstructed(kinds[kind], basis_of[kind], size) for kind in whole}
            text, image = crossing["text"][of_texts], crossing["image"][of_images]
            found = recall(text, image, texts, images)[1], recall(image, text, images, texts)[1]
        explained = float(np.mean([basis.explained(size or dim) for basis in bases.values()]))
        return Row(size, explained, *found, float(np.concatenate(agreeing).mean()))

    sizes = {dim} | ({k} if k else set())
    sizes |= {1 << power for power in range(4, dim.bit_length()) if SMALLEST_K <= 1 << power < dim}
    rows = tuple(row(size) for size in [*sorted(sizes), None])
    return Retention(rows, len(kinds["text"]), len(kinds["image"]), len(of_texts), apart)


def _reduced(vectors: Float64, basis: Basis, size: int | None) -> Float64:
    if size is None:
        return unit_rows(vectors)
    return unit_rows((vectors - basis.mean) @ basis.components[:, :size])


def _reconstructed(vectors: Float64, basis: Basis, size: int) -> Float64:
    components = basis.components[:, :size]
    return unit_rows(basis.mean + (vectors - basis.mean) @ components @ components.T)
