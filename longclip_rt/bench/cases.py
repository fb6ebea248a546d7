"""What is measured: a batch of one tower, and inputs for it that are never zeros and never the same twice in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.bundle.bundle import Bundle
from longclip_rt.bundle.samples import example_captions, example_photos
from longclip_rt.model.tokenizer import pad_tokens

BATCHES = {True: (1, 64), False: (1, 8)}
"""Rows of the batches where nothing else is asked for: on a GPU, and on a CPU."""

_ROTATED = 8
_ROTATED_BYTES = 256 << 20  # batches of pixels are large


@dataclass(frozen=True)
class Case:
    """One batch.

    Attributes:
        tower: `text` or `image`.
        batch: Rows.
        tokens: Length of every text, SOT and EOT included; None for images.
    """

    tower: str
    batch: int
    tokens: int | None = None

    @property
    def label(self) -> str:
        """For people."""
        several = "" if self.batch == 1 else "s"
        return f"{self.batch} {self.tower}{several}" + (f" of {self.tokens} tokens" if self.tokens else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def cases(towers: Sequence[str], batches: Sequence[int], lengths: Sequence[int], context: int) -> list[Case]:
    """Every batch size of every tower, of texts at every length that the model reads."""
    kept = sorted({min(max(length, 2), context) for length in lengths})  # SOT and EOT are always there
    texts = [Case("text", batch, length) for length in kept for batch in batches]
    return [case for case in [*texts, *(Case("image", batch) for batch in batches)] if case.tower in towers]


@dataclass(frozen=True)
class Inputs:
    """What a case is run on, several batches that take turns.

    Attributes:
        raw: Each batch as a user has it: texts, or paths of photographs.
        arrays: Each batch ready for an encoder: ids [B, tokens] int32, or crops [B, n, n, 3] uint8.
    """

    raw: list[list[str] | list[Path]]
    arrays: list[NDArray[Any]]


def inputs_for(case: Case, bundle: Bundle) -> Inputs:
    """Texts of exactly so many tokens out of the example captions, or the example photographs, turned and mirrored."""
    if case.tower == "text":
        assert case.tokens is not None
        raw: list[list[Any]] = [_texts(case.batch, case.tokens, 7 * turn, bundle) for turn in range(_ROTATED)]
        ids = [[tokens.ids for tokens in bundle.tokenizer.encode(texts)] for texts in raw]
        return Inputs(raw, [pad_tokens(rows, case.tokens) for rows in ids])
    photos = example_photos()
    crops = np.stack([bundle.transform.crop(photo) for photo in photos])
    crops = np.concatenate([crops, crops[:, :, ::-1], crops[:, ::-1]])
    count = max(2, min(_ROTATED, _ROTATED_BYTES // (case.batch * crops[0].size * 4)))
    order = [[(turn * case.batch + row) % len(crops) for row in range(case.batch)] for turn in range(count)]
    raw = [[photos[index % len(photos)] for index in rows] for rows in order]
    return Inputs(raw, [crops[rows] for rows in order])


def _texts(count: int, tokens: int, start: int, bundle: Bundle) -> list[str]:
    """Windows of the captions, of which the last words are cut until they fit, and then filled up with `a`."""
    words = " ".join(caption.long for caption in example_captions()).split()
    texts = []
    for row in range(count):
        at = (start + 11 * row) % len(words)
        window = (words[at:] + words)[:tokens]
        lengths = [len(each.ids) - 2 for each in bundle.tokenizer.encode(window)]
        kept = int(np.searchsorted(np.cumsum(lengths), tokens - 2, side="right"))
        left = tokens - 2 - sum(lengths[:kept])
        texts.append(" ".join([*window[:kept], *["a"] * left]))
    return texts
