"""`KIND:PATH`: which data set is meant, and its images and captions."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longclip_rt.embedding.pipeline import Progress
from longclip_rt.embedding.tasks import Encoder
from longclip_rt.errors import InputError
from longclip_rt.evaluation.cache import Entry
from longclip_rt.evaluation.collection import Collection, Item, Skipped, collect
from longclip_rt.evaluation.layouts import KARPATHY_FILES, READERS, Found, Layout
from longclip_rt.evaluation.vectors import Bars, NoBar
from longclip_rt.train.data.rows import BadRow, Row
from longclip_rt.train.data.sources import Naming, Part, open_part
from longclip_rt.train.data.table_files import Columns
from longclip_rt.train.data.tables import TablePart, load_table
from longclip_rt.train.scenes.rows import PREFIX, Scenes, scenes_from_name

DEFAULT_SCENES = "1000"
"""Scenes where no number is given: a minute's work for the built-in model."""

KINDS = (*READERS, "table", "webdataset", "scenes")
"""What a data set's name may begin with."""


@dataclass(frozen=True)
class DataName:
    """A data set, as it was named.

    Attributes:
        kind: One of `KINDS`.
        path: What stands behind the colon.
        images: Folder of the pictures; None: where the layout has it.
        split: Part of a data set that has several.
        columns: Columns of tables and fields of shards.
    """

    kind: str
    path: str
    images: Path | None = None
    split: str = "test"
    columns: Columns = field(default_factory=Columns)

    @property
    def file_name(self) -> str:
        """Its file's name; of Karpathy's splits that which a folder holds, since it tells COCO from Flickr30k."""
        path = Path(self.path)
        if self.kind == "karpathy":
            return Layout(path, None, self.split).file(KARPATHY_FILES).name
        return path.name

    def as_json(self) -> dict[str, Any]:
        """What tells it from others, and stands in a report."""
        folder = None if self.images is None else str(self.images.absolute())
        place = self.path if self.kind == "scenes" else str(Path(self.path).absolute())
        found = {"kind": self.kind, "path": place, "images": folder, "split": self.split}
        columns = {"image_column": self.columns.image, "long_column": self.columns.long}
        return {key: value for key, value in (found | columns).items() if value is not None}


def data_from_name(name: str, images: Path | None, split: str, columns: Columns) -> DataName:
    """Reads `KIND:PATH`.

    Raises:
        InputError: There is no such kind, or nothing stands behind the colon.
    """
    kind, colon, path = name.partition(":")
    if kind == "scenes" and not path:
        colon, path = ":", DEFAULT_SCENES
    if not colon or kind not in KINDS or not path:
        raise InputError(f"{name!r} is not understood. Write KIND:PATH with one of the kinds {', '.join(KINDS)}.")
    return DataName(kind, path, images, split, columns)


def load_collection(data: DataName, entry: Entry, encoder: Encoder, image_size: int, bars: Bars = NoBar) -> Collection:
    """Reads a data set.

    Args:
        data: Which one.
        entry: Where pictures that are no files are written.
        encoder: Counts the tokens of captions that are made to measure.
        image_size: Height and width of drawn scenes in pixels.
        bars: Shows how far it is.

    Raises:
        InputError: It cannot be read, or nothing in it can be used.
        TrainingError: Likewise, of what `train` reads too.
        MissingExtraError: A package is not installed.
    """
    with bars() as bar, reading_errors(data.path):
        collection = collect(_found(data, encoder, image_size, bar), entry.store)
    if not collection.images:
        reasons = "; ".join(f"{one.id}: {one.reason}" for one in collection.skipped[:3])
        raise InputError(f"{data.kind}:{data.path} has no image with a caption. {reasons}".rstrip())
    return collection


@contextlib.contextmanager
def reading_errors(name: str) -> Iterator[None]:
    """Turns an `OSError` of the block into one sentence about a data set.

    Raises:
        InputError: When the block raises an `OSError`.
    """
    try:
        yield
    except OSError as error:
        place = name if error.filename is None else os.fsdecode(error.filename)
        raise InputError(f"{place!r} cannot be read: {error.strerror or error}. Mend or remove it.") from error


def _found(data: DataName, encoder: Encoder, image_size: int, bar: Progress) -> Found:
    if data.kind in READERS:
        path = Path(data.path)
        if not path.exists():
            raise InputError(f"{data.path!r} does not exist. Name the data set's file or folder.")
        return READERS[data.kind](Layout(path, data.images, data.split))
    part, dropped = _part(data)
    if isinstance(part, Scenes):
        part.check_size(image_size)
    return itertools.chain(_items(part, encoder, image_size, bar), (Skipped(row.id, row.reason) for row in dropped))


def _part(data: DataName) -> tuple[Part, tuple[BadRow, ...]]:
    """What `train` reads as well."""
    if data.kind == "scenes":
        return scenes_from_name(PREFIX + data.path).for_tests(), ()
    naming = Naming(data.images, data.columns)
    if data.kind == "table" and Path(data.path).suffix.lower() == ".csv":
        table = load_table("csv", [Path(data.path)], data.images, data.columns)
        return TablePart(table, 0, table.count), table.dropped
    part, dropped = open_part(data.path, naming)
    if (part.kind == "webdataset") != (data.kind == "webdataset"):
        raise InputError(f"{data.path!r} is {part.kind}, not {data.kind}. Name another KIND.")
    return part, dropped


def _items(part: Part, encoder: Encoder, image_size: int, bar: Progress) -> Iterator[Item | Skipped]:
    bar.begin(part.count, 0, {})
    for row in part.in_order():
        bar.advance(1)
        yield _item(row, encoder, image_size)


def _item(row: Row, encoder: Encoder, image_size: int) -> Item | Skipped:
    try:
        pair = row.pair(image_size, encoder.tokenizer)
    except InputError as error:
        return Skipped(row.id, str(error))
    image = Path(pair.image) if isinstance(pair.image, str) else pair.image
    return Item(row.id, image, (pair.long,))
