"""Retrieval of images by texts and of texts by images: recall, median rank, by the captions' length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.embedding.pipeline import Progress
from longclip_rt.evaluation.collection import Collection, Kept
from longclip_rt.evaluation.figures import Figure
from longclip_rt.evaluation.vectors import Bars, Embedded, NoBar
from longclip_rt.metrics import Places, places

RANKS = (1, 5, 10)

CLIP_TOKENS = 77
"""What CLIP reads; captions beyond it are what Long-CLIP is about."""

_QUERIES_AT_ONCE = 4096
_Vectors = NDArray[np.float32]
_Rows = NDArray[np.int64]

UP_TO, BEYOND = f"up_to_{CLIP_TOKENS}", f"beyond_{CLIP_TOKENS}"


@dataclass(frozen=True)
class Retrieval:
    """One model's retrieval on n images and m captions.

    Attributes:
        i2t: Of each image, where the nearest of its captions stands among all.
        t2i: Of each caption, where its image stands among all.
        of: int64 [m], the image of each caption.
        tokens: int32 [m], of the whole captions.
        truncated: Captions that were cut to the context length.
    """

    i2t: Places
    t2i: Places
    of: NDArray[np.int64]
    tokens: NDArray[np.int32]
    truncated: int

    def figures(self, group: str | None = None) -> dict[str, Figure]:
        """Recall by name, `i2t_r1` and so on.

        Args:
            group: Only the captions of this length, `UP_TO` or `BEYOND`, searched among all images; and the images
                whose longest caption has it, searched among all captions. None: all.
        """
        images, texts = self._members(group)
        found = {}
        for way, where, units in (("i2t", self.i2t, np.arange(len(images))), ("t2i", self.t2i, self.of)):
            chosen = images if way == "i2t" else texts
            for rank in RANKS:
                found[f"{way}_r{rank}"] = Figure(where.hits(rank)[chosen], units[chosen])
        return found

    def _members(self, group: str | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which images and which captions belong to a group, bool [n] and [m]."""
        longest = np.zeros(len(self.i2t.above), np.int32)
        np.maximum.at(longest, self.of, self.tokens)
        if group is None:
            return np.ones(len(longest), bool), np.ones(len(self.of), bool)
        if group == UP_TO:
            return longest <= CLIP_TOKENS, self.tokens <= CLIP_TOKENS
        return longest > CLIP_TOKENS, self.tokens > CLIP_TOKENS

    def as_json(self) -> dict[str, Any]:
        """Counts, shares from 0 to 1, median ranks; and the same by the captions' length."""
        lengths = {group: self._part(group) for group in (UP_TO, BEYOND)}
        return self._part(None) | {"truncated": self.truncated, "by_length": lengths}

    def _part(self, group: str | None) -> dict[str, Any]:
        images, texts = self._members(group)
        counts: dict[str, Any] = {"images": int(images.sum()), "texts": int(texts.sum())}
        figures = {name: figure for name, figure in self.figures(group).items() if len(figure.hits)}
        shares = {name: figure.share for name, figure in figures.items()}
        medians = {
            f"{way}_median_rank": float(np.median(where.ranks()[chosen]))
            for way, where, chosen in (("i2t", self.i2t, images), ("t2i", self.t2i, texts))
            if chosen.any()
        }
        return counts | shares | medians


def retrieve(collection: Collection, kept: Kept, vectors: Embedded, bars: Bars = NoBar) -> Retrieval:
    """Ranks all captions for each image and all images for each caption.

    Args:
        collection: The data set.
        kept: Its rows that could be embedded; all others are left out.
        vectors: Of all rows.
        bars: Shows how far it is: full Flickr30k is 10 billion similarities.
    """
    place = np.full(len(collection.images), -1)
    place[kept.images] = np.arange(len(kept.images))
    of = place[collection.of[kept.texts]]
    rows = np.arange(len(kept.images))
    images, texts = vectors.images[kept.images], vectors.texts[kept.texts]
    truncated = int(vectors.truncated[kept.texts].sum())
    with bars() as bar:
        bar.begin(len(images) + len(texts), 0, {})
        i2t = _ranked(images, texts, rows, of, bar)
        t2i = _ranked(texts, images, of, rows, bar)
    return Retrieval(i2t, t2i, of, vectors.tokens[kept.texts], truncated)


def _ranked(queries: _Vectors, targets: _Vectors, own: _Rows, of: _Rows, bar: Progress) -> Places:
    """`places`, some thousand queries at a time."""
    parts = []
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        parts.append(places(queries[part], targets, own[part], of))
        bar.advance(len(parts[-1].above))
    return Places(*map(np.concatenate, zip(*parts, strict=True)))
