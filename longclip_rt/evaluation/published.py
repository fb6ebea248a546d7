"""What was published of Long-CLIP on data sets that can be read here, to stand beside what is measured.

Second-hand: copied from papers' tables as other papers print them. Different papers give figures up to 3 points apart.
"""

from __future__ import annotations

from dataclasses import dataclass

_LLM2CLIP = "LLM2CLIP, arXiv 2411.04997"
_DEBIAS = "DeBias-CLIP"
_PAPER = "Long-CLIP, arXiv 2403.15378"

SECOND_HAND = "published (second-hand)"


@dataclass(frozen=True)
class Published:
    """Recall at 1 that was published.

    Attributes:
        kind: Of the data set, as `--data` names it.
        images: Images that it was measured on.
        model: Whose.
        i2t_r1: Share from 0 to 1.
        t2i_r1: Likewise.
        source: The paper whose table it stands in.
    """

    kind: str
    images: int
    model: str
    i2t_r1: float
    t2i_r1: float
    source: str


def _rows(kind: str, images: int, *figures: tuple[str, float, float, str]) -> tuple[Published, ...]:
    return tuple(
        Published(kind, images, f"Long-CLIP {model}", round(i2t / 100, 4), round(t2i / 100, 4), source)
        for model, i2t, t2i, source in figures
    )


PUBLISHED = (
    *_rows("coco", 5000, ("B/16", 57.6, 40.4, _PAPER), ("L/14", 62.8, 46.3, _PAPER), ("B/16", 56.9, 40.9, _LLM2CLIP)),
    *_rows("flickr", 31783, ("B/16", 46.8, 34.1, _PAPER), ("L/14", 53.4, 41.2, _PAPER)),
    *_rows("flickr", 1000, ("B/16", 85.8, 70.6, _LLM2CLIP), ("L/14", 90.0, 76.2, _LLM2CLIP)),
    *_rows(
        "sharegpt4v",
        1000,
        ("B/16", 94.6, 93.3, _PAPER),
        ("L/14", 95.8, 95.6, _PAPER),
        ("B/16", 94.8, 93.5, _LLM2CLIP),
        ("L/14", 97.2, 97.3, _LLM2CLIP),
    ),
    *_rows(
        "urban1k",
        1000,
        ("B/16", 79.1, 79.1, _LLM2CLIP),
        ("B/16", 78.9, 79.5, _DEBIAS),
        ("L/14", 82.5, 86.1, _LLM2CLIP),
    ),
    *_rows("docci", 5000, ("B/16", 63.1, 71.4, _LLM2CLIP), ("L/14", 66.5, 78.6, _LLM2CLIP)),
    *_rows("dci", 7805, ("B/16", 51.6, 57.1, _DEBIAS), ("L/14", 57.0, 63.9, _DEBIAS)),
)


@dataclass(frozen=True)
class PublishedAccuracy:
    """Zero-shot top-1 on ImageNet-1k that was published, a share from 0 to 1."""

    model: str
    top1: float
    source: str


IMAGENET = (
    PublishedAccuracy("Long-CLIP B/16", 0.668, _PAPER),
    PublishedAccuracy("Long-CLIP L/14", 0.735, _PAPER),
)


def published_for(kind: str, file_name: str, images: int) -> tuple[Published, ...]:
    """The rows of a data set.

    Args:
        kind: As `--data` names it.
        file_name: Of its file: Karpathy's splits are of two data sets.
        images: How many there are: Flickr30k is measured on all of it, or on 1,000.
    """
    if kind == "karpathy":  # which has Flickr8k as well
        kind = next((one for one in ("flickr30k", "coco") if one in file_name.lower()), "").removesuffix("30k")
    rows = tuple(row for row in PUBLISHED if row.kind == kind)
    if kind == "flickr":
        nearest = min((row.images for row in rows), key=lambda count: abs(count - images))
        rows = tuple(row for row in rows if row.images == nearest)
    return rows
