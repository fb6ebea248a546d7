"""Rows of training data: what a worker needs to make one, and those of which nothing can be made."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from longclip_rt.errors import InputError, TrainingError
from longclip_rt.model.preprocess import ImageSource
from longclip_rt.model.tokenizer import Tokenizer
from longclip_rt.system.files import write_text_atomically

logger = logging.getLogger("longclip_rt")

# An epoch's share of bad rows is looked at from here on. A share that is right at the bound varies by chance, so that
# the run stops before the epoch's end only where the share is this many standard deviations above it.
_FEWEST_ROWS = 100
_DEVIATIONS = 4.0
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and its captions, none of them empty."""

    image: ImageSource
    long: str
    short: str


class Row(Protocol):
    """A row that was drawn but not opened: small, and sent to a worker as it is."""

    @property
    def id(self) -> str:
        """How messages and the list of bad rows call it."""
        ...

    def pair(self, size: int, tokenizer: Tokenizer) -> Pair:
        """Opens the row.

        Args:
            size: Height and width of the image that will be made of it, in pixels.
            tokenizer: Counts the tokens of captions that are made to measure.

        Raises:
            InputError: It has no image or no caption.
        """
        ...


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        id: Where it stands.
        reason: Why it cannot be used, as a sentence.
    """

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class FileRow:
    """A row of a table.

    Attributes:
        id: The table's file and the row's number in it.
        image: The image's path or its content.
        long: Its caption.
        short: Its short caption; None where the table has none.
    """

    id: str
    image: str | bytes
    long: str
    short: str | None

    def pair(self, size: int, tokenizer: Tokenizer) -> Pair:
        """Checks the row's captions."""
        return pair_of(self.image, self.long, self.short)


def pair_of(image: ImageSource, long: object, short: object = None) -> Pair:
    """Checks a row's captions, and takes the short one from the long one where there is none.

    As in the reference, newlines become spaces and the short caption is the text before the first ". ".

    Raises:
        InputError: The long caption is empty or no text.
    """
    text = _line(long)
    return Pair(image, text, caption_or_none(short) or text.split(". ")[0] or text)


def caption_or_none(value: object) -> str | None:
    """A caption on one line; None where there is none or it is empty."""
    try:
        return _line(value)
    except InputError:
        return None


def _line(value: object) -> str:
    if value is None:
        raise InputError("It has no caption.")
    if not isinstance(value, str):
        raise InputError(f"Its caption is of type {type(value).__name__}, not a text.")
    text = value.replace("\n", " ").strip()
    if not text:
        raise InputError("Its caption is empty.")
    return text


class BadRows:
    """The rows that could not be used so far, each listed once however often it came up."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._reasons)

    def __contains__(self, name: str) -> bool:
        return name in self._reasons

    def __iter__(self) -> Iterator[BadRow]:
        return (BadRow(name, reason) for name, reason in self._reasons.items())

    def add(self, row: BadRow) -> None:
        """Lists a row; the first one is logged, so that a user need not wait for the end to learn of it."""
        if not self._reasons:
            logger.warning("a row is passed over: %s: %s Others like it are counted and listed.", row.id, row.reason)
        self._reasons.setdefault(row.id, row.reason)

    def save(self, path: Path) -> None:
        """Writes `{"id": ..., "reason": ...}` lines; an empty list writes an empty file.

        Raises:
            OutputError: The file cannot be written.
        """
        write_text_atomically(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in self))


class Allowance:
    """Stops an epoch of which too much cannot be used.

    Args:
        largest: Largest share of bad rows.
        what: What the rows belong to, for the message: "this epoch".
    """

    def __init__(self, largest: float, what: str) -> None:
        self._largest = largest
        self._what = what
        self._seen = 0
        self._count = 0
        self._first: list[BadRow] = []

    def note(self, rows: int, bad: list[BadRow]) -> None:
        """Counts rows that were opened, and the bad ones among them.

        Raises:
            TrainingError: There are clearly too many of these.
        """
        self._seen += rows
        self._count += len(bad)
        self._first += bad[: _NAMED - len(self._first)]
        expected = self._largest * self._seen
        if self._seen >= _FEWEST_ROWS and self._count > expected + _DEVIATIONS * math.sqrt(expected):
            raise self.refusal()

    def end(self) -> None:
        """Looks at the whole.

        Raises:
            TrainingError: There were too many bad rows.
        """
        if self._count > self._largest * self._seen:
            raise self.refusal()

    def refusal(self) -> TrainingError:
        """The error that says what is wrong with the rows."""
        named = " ".join(f"{row.id}: {row.reason}" for row in self._first)
        return TrainingError(
            f"{self._count} of {self._seen} rows of {self._what} cannot be used, and at most {self._largest:.1%} may "
            f"be bad. The first of them: {named} Mend them, name with --images the folder that the image paths are "
            "relative to, or allow more with --max-bad."
        )
