"""Images and their captions as a data set lists them, and what of it cannot be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class Item:
    """An image with captions, as a reader found it.

    Attributes:
        name: How messages call it.
        image: Its file, its content or the picture itself.
        captions: Texts; empty ones and repetitions are sorted out by `collect`.
    """

    name: str
    image: Path | bytes | Image.Image
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image, a caption or a class that takes no part.

    Attributes:
        id: Where it stands.
        reason: Why, as a sentence.
    """

    id: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """What takes part.

    Attributes:
        images: Files of N images.
        names: How the N images are called.
        texts: M captions, each on one line.
        of: int64 [M], the image that each caption describes.
        skipped: What does not take part.
    """

    images: tuple[Path, ...]
    names: tuple[str, ...]
    texts: tuple[str, ...]
    of: NDArray[np.int64]
    skipped: tuple[Skipped, ...]

    def without(self, bad_images: dict[int, str], bad_texts: dict[int, str]) -> Kept:
        """What is left when some images and captions could not be embedded.

        Args:
            bad_images: Why an image could not be, by its row.
            bad_texts: Likewise of captions.
        """
        skipped = [Skipped(self.names[row], reason) for row, reason in bad_images.items()]
        skipped += [Skipped(self._caption(row), reason) for row, reason in bad_texts.items() if row not in bad_images]
        texts = [row for row, image in enumerate(self.of.tolist()) if image not in bad_images and row not in bad_texts]
        described = {int(self.of[row]) for row in texts}
        images = [row for row in range(len(self.images)) if row in described]
        skipped += [
            Skipped(self.names[row], "None of its captions could be embedded.")
            for row in range(len(self.images))
            if row not in described and row not in bad_images
        ]
        return Kept(np.array(images, np.int64), np.array(texts, np.int64), tuple(skipped))

    def _caption(self, row: int) -> str:
        return f"{self.names[int(self.of[row])]}: {self.texts[row][:80]!r}"


@dataclass(frozen=True)
class Kept:
    """Rows of a collection that could be embedded.

    Attributes:
        images: int64 [n].
        texts: int64 [m]; each caption's image is among the images, and each image has a caption.
        skipped: The others.
    """

    images: NDArray[np.int64]
    texts: NDArray[np.int64]
    skipped: tuple[Skipped, ...]


@dataclass
class _Gathering:
    images: list[Path] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, name: str, file: Path, captions: Iterable[str], known: dict[Path, int]) -> None:
        texts = tuple(captions)
        place = known.get(file)
        kept = [] if place is None else self.captions[place]
        before = len(kept)
        for number, text in enumerate(texts, 1):
            line = " ".join(text.split("\n")).strip()
            where = name if len(texts) == 1 else f"{name}, caption {number}"
            if not line:
                self.skipped.append(Skipped(where, "Its caption is empty."))
            elif line in kept:
                self.skipped.append(Skipped(where, "It is a duplicate: the image has the same caption already."))
            else:
                kept.append(line)
        if place is None:
            if len(kept) == before:
                self.skipped.append(Skipped(name, "It has no caption."))
            else:
                known[file] = len(self.images)
                self.images.append(file)
                self.names.append(name)
                self.captions.append(kept)


def collect(items: Iterable[Item | Skipped], store: Callable[[bytes | Image.Image], Path]) -> Collection:
    """Sorts out what a reader found: each file is one image, with all captions that were found for it.

    Args:
        items: Images with captions, and what the reader could not use.
        store: Writes a picture that is no file yet, and says where.
    """
    found = _Gathering()
    known: dict[Path, int] = {}
    for item in items:
        if isinstance(item, Skipped):
            found.skipped.append(item)
            continue
        file = item.image if isinstance(item.image, Path) else store(item.image)
        if file.suffix.lower() == ".txt":  # which the embed job would read as a text
            found.skipped.append(Skipped(item.name, f"{file.name!r} is no picture."))
            continue
        found.add(item.name, file, item.captions, known)
    of = np.repeat(np.arange(len(found.images)), [len(captions) for captions in found.captions])
    texts = tuple(text for captions in found.captions for text in captions)
    return Collection(tuple(found.images), tuple(found.names), texts, of.astype(np.int64), tuple(found.skipped))


def skipped_as_json(skipped: Iterable[Skipped]) -> list[dict[str, str]]:
    """As the JSON of a report lists them."""
    return [dataclasses.asdict(one) for one in skipped]
