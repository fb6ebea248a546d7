"""Tables of pairs, read once into columns: ShareGPT4V's json, JSON Lines, Parquet.

1.2 million rows of ShareGPT4V are 1.2 GB of captions in Arrow columns; as Python dictionaries they would be 6 GB, and
as many again in each worker that touches them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longclip_rt.errors import InputError, TrainingError
from longclip_rt.train.data.feeds import OrderedFeed, Share, shuffled
from longclip_rt.train.data.rows import BadRow, FileRow, Row, caption_or_none, pair_of
from longclip_rt.train.data.table_files import (
    Columns,
    Record,
    records_from_csv,
    records_from_json,
    records_from_jsonl,
    records_from_parquet,
)

_READERS = {
    "json": records_from_json,
    "jsonl": records_from_jsonl,
    "csv": records_from_csv,
    "parquet": records_from_parquet,
}

# Rows that are Python objects before they are put into columns.
_ROWS_AT_ONCE = 1024
# Images inside Parquet are held in memory.
_MAX_IMAGE_BYTES = 8 << 30


@dataclass(frozen=True)
class Table:
    """Rows in memory, as columns.

    Attributes:
        kind: What the model card calls it.
        files: The files' names, as ids begin with them.
        roots: For each file, the folder that its image paths are relative to.
        chunks: Arrow record batches of `_ROWS_AT_ONCE` rows, the last of fewer: which file a row is from, its number
            there from 1, the image's path or content, the long caption, and the short one or null.
        count: Rows.
        dropped: Rows of the files that are not in the table, because they are broken or lack a caption.
    """

    kind: str
    files: tuple[str, ...]
    roots: tuple[Path, ...]
    chunks: tuple[Any, ...]
    count: int
    dropped: tuple[BadRow, ...]

    def row(self, index: int) -> Row:
        """The row at an index, from 0."""
        chunk, place = divmod(index, _ROWS_AT_ONCE)
        file, number, image, long, short = self.chunks[chunk].slice(place, 1).to_pylist()[0].values()
        where = str(self.roots[file] / image) if isinstance(image, str) else image
        return FileRow(f"{self.files[file]}:{number}", where, long, short)


@dataclass(frozen=True)
class TablePart:
    """A range of a table's rows, to train or to validate on.

    Attributes:
        table: The table.
        first: The first of the rows.
        stop: The first row behind them.
    """

    table: Table
    first: int
    stop: int

    @property
    def kind(self) -> str:
        """What the model card calls it."""
        return self.table.kind

    @property
    def count(self) -> int:
        """Rows of the part."""
        return self.stop - self.first

    def in_order(self) -> Iterator[Row]:
        """All rows as they stand."""
        return map(self.table.row, range(self.first, self.stop))

    def feed(self, seed: int, epoch: int, share: Share) -> OrderedFeed:
        """A process's share of an epoch."""
        return OrderedFeed(_Permuted(self.table, self.first + shuffled(self.count, seed, epoch)), share)


@dataclass(frozen=True)
class _Permuted:
    table: Table
    indices: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def row(self, position: int) -> Row:
        return self.table.row(int(self.indices[position]))


def load_table(kind: str, paths: Sequence[Path], images: Path | None, columns: Columns) -> Table:
    """Reads files of one kind.

    Args:
        kind: "json", "jsonl", "csv" or "parquet".
        paths: The files, in the order of their rows.
        images: Folder that image paths are relative to; None: each file's own.
        columns: What to read.

    Raises:
        TrainingError: A file cannot be read at all, or lacks a column.
    """
    reader = _READERS[kind]
    builder = _Builder(kind)
    for path in paths:
        builder.begin(path.name, path.parent if images is None else images)
        try:
            for number, record in reader(path, columns):
                builder.add(number, record)
        except OSError as error:
            raise TrainingError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
        except UnicodeDecodeError as error:
            raise TrainingError(f"{str(path)!r} is not UTF-8. Save it as UTF-8.") from error
    return builder.table()


@dataclass
class _Builder:
    """Puts rows into columns, a few thousand at a time."""

    kind: str
    files: list[str] = field(default_factory=list)
    roots: list[Path] = field(default_factory=list)
    dropped: list[BadRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._image_type: type | None = None
        self._image_bytes = 0
        self._open: list[tuple[int, int, str | bytes, str, str | None]] = []
        self._chunks: list[Any] = []

    def begin(self, name: str, root: Path) -> None:
        """Says which file the next rows are from."""
        self.files.append(name)
        self.roots.append(root)

    def add(self, number: int, record: Record) -> None:
        """Takes a row in, or drops it."""
        try:
            if isinstance(record, str):
                raise InputError(record)
            image = self._image(record[0])
            pair = pair_of(image, record[1])
        except InputError as error:
            self.dropped.append(BadRow(f"{self.files[-1]}:{number}", str(error)))
            return
        self._open.append((len(self.files) - 1, number, image, pair.long, caption_or_none(record[2])))
        if len(self._open) == _ROWS_AT_ONCE:
            self._close_chunk()

    def _image(self, value: object) -> str | bytes:
        if isinstance(value, Mapping):  # the `datasets` library's images
            value = value.get("bytes") or value.get("path")
        if value is None or value in ("", b""):
            raise InputError("It has no image.")
        if not isinstance(value, str | bytes):
            raise InputError(f"Its image is of type {type(value).__name__}; a path or the file's content is needed.")
        self._image_type = self._image_type or type(value)
        if not isinstance(value, self._image_type):
            raise InputError("Its image is a path where others are contents, or the other way round.")
        if isinstance(value, bytes):
            self._image_bytes += len(value)
            if self._image_bytes > _MAX_IMAGE_BYTES:
                raise TrainingError(
                    f"The table holds more than {_MAX_IMAGE_BYTES >> 30} GiB of images, and images inside a table are "
                    "kept in memory. Write them as files and name their paths, or write WebDataset shards."
                )
        return value

    def table(self) -> Table:
        """All of the rows."""
        count = len(self._chunks) * _ROWS_AT_ONCE + len(self._open)
        self._close_chunk()
        return Table(self.kind, tuple(self.files), tuple(self.roots), tuple(self._chunks), count, tuple(self.dropped))

    def _close_chunk(self) -> None:
        import pyarrow as pa

        kinds = {
            "file": pa.int32(),
            "number": pa.int64(),
            # 1024 images may be more than the 2 GiB that a plain binary column can hold.
            "image": pa.large_binary() if self._image_type is bytes else pa.large_string(),
            "long": pa.string(),
            "short": pa.string(),
        }
        columns = list(zip(*self._open, strict=True)) or [()] * len(kinds)
        arrays = [pa.array(map(_valid, column), kind) for column, kind in zip(columns, kinds.values(), strict=True)]
        self._chunks.append(pa.record_batch(arrays, list(kinds)))
        self._open.clear()


def _valid(value: object) -> object:
    """Replaces what Arrow's UTF-8 cannot hold: surrogates that stand alone, as JSON may spell them."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
