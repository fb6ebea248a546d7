"""What `--data` and `--val` name: tables, shards or scenes, and which of their rows validate."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from longclip_rt.embedding.inputs.entries import is_url
from longclip_rt.errors import TrainingError
from longclip_rt.system.extras import require
from longclip_rt.train.data.feeds import Feed, Share
from longclip_rt.train.data.rows import BadRow, Row
from longclip_rt.train.data.shards import Shards, open_shards
from longclip_rt.train.data.table_files import Columns
from longclip_rt.train.data.tables import TablePart, load_table
from longclip_rt.train.scenes.rows import PREFIX, Scenes, scenes_from_name

_KINDS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".tar": "webdataset",
}
# At most this share of the rows validates, unless other rows were named for it.
_LARGEST_SHARE = 10


class Part(Protocol):
    """Rows to train or to validate on."""

    @property
    def kind(self) -> str:
        """What the rows are, for the model card."""
        ...

    @property
    def count(self) -> int:
        """How many rows there are."""
        ...

    def in_order(self) -> Iterator[Row]:
        """All rows, the same at every call."""
        ...

    def feed(self, seed: int, epoch: int, share: Share) -> Feed:
        """A process's share of an epoch."""
        ...


@dataclass(frozen=True)
class Sources:
    """What to train and to validate on.

    Attributes:
        training: Rows of an epoch.
        validation: Rows that are never trained on.
        dropped: Rows that are in neither, because their line is broken or has no caption.
        read: Rows that were read to know that; 0 where nothing is read beforehand.
    """

    training: Part
    validation: Part
    dropped: tuple[BadRow, ...]
    read: int


@dataclass(frozen=True)
class Naming:
    """How the names of `open_sources` are to be read.

    Attributes:
        images: Folder that image paths of tables are relative to; None: the table's own.
        columns: Columns of tables, and fields of the JSON in shards.
        val_rows: Rows that validate where no others are named; a tenth of all where that is less.
        buffer: Rows that are held to shuffle shards.
    """

    images: Path | None = None
    columns: Columns = field(default_factory=Columns)
    val_rows: int = 1000
    buffer: int = 1000


def open_sources(data: str, val: str | None, naming: Naming) -> Sources:
    """Opens what to train on and what to validate on.

    Args:
        data: A .json, .jsonl, .parquet or .tar file, a glob or a folder of files of one of these kinds, numbered shards
            such as `shards/{000..010}.tar`, or scenes such as `scenes:200000@0`.
        val: Likewise; None: the first rows of `data`, or scenes of another seed.
        naming: How these are read.

    Raises:
        TrainingError: They name nothing that can be read.
        MissingExtraError: A package is not installed.
    """
    part, dropped = open_part(data, naming)
    read = part.count + len(dropped)
    held_out = min(naming.val_rows, part.count // _LARGEST_SHARE)
    if val is not None:
        validation, more = open_part(val, naming)
        if isinstance(part, Scenes) and isinstance(validation, Scenes) and part.seed == validation.seed:
            raise TrainingError(f"{val!r} are scenes that {data!r} trains on. Give them another seed.")
        dropped, read = dropped + more, read + validation.count + len(more)
    elif isinstance(part, Scenes):
        validation = part.held_out(held_out)
    elif isinstance(part, Shards):
        validation, part = part.split(held_out)
    else:
        assert isinstance(part, TablePart)
        validation = dataclasses.replace(part, stop=held_out)
        part = dataclasses.replace(part, first=held_out)
    return Sources(part, validation, dropped, read if dropped else 0)


def open_part(name: str, naming: Naming) -> tuple[Part, tuple[BadRow, ...]]:
    """Opens the rows that one name stands for.

    Args:
        name: As for `open_sources`.
        naming: How it is read.

    Returns:
        The rows, and those of the files that are not among them.

    Raises:
        TrainingError: It names nothing that can be read.
        MissingExtraError: A package is not installed.
    """
    if name.startswith(PREFIX):
        return scenes_from_name(name), ()
    paths = files_of(name)
    kinds = {_KINDS.get(path.suffix.lower()) for path in paths}
    kind = kinds.pop()
    if kind is None or kinds:
        raise TrainingError(
            f"{name!r} is not of a kind that can be read: expected {', '.join(_KINDS)} files, all of one kind, "
            "or scenes:COUNT@SEED."
        )
    if kind == "webdataset":
        return open_shards(paths, naming.columns, naming.buffer)
    table = load_table(kind, paths, naming.images, naming.columns)
    return TablePart(table, 0, table.count), table.dropped


def files_of(name: str) -> list[Path]:
    """The files that a name stands for, sorted, at least one.

    Raises:
        TrainingError: There is none, or it is no file of this machine.
    """
    if is_url(name) or name.startswith("pipe:"):
        raise TrainingError(f"{name!r} is no file of this machine. Download it first.")
    path = Path(name)
    if path.is_dir():
        found = sorted(one for one in path.iterdir() if one.suffix.lower() in _KINDS and _is_data(one))
        # A folder of shards holds statistics of them, in .json and .parquet, beside the .tar files.
        shards = [one for one in found if one.suffix.lower() == ".tar"]
        found = shards or found
        if not found:
            raise TrainingError(f"The folder {name!r} holds no {', '.join(_KINDS)} files.")
        return found
    if path.exists():
        return [path]
    names = list(require("braceexpand", "train").braceexpand(name)) if "{" in name else [name]
    found = [one for pattern in names for one in _matches(pattern)]
    absent = [one for one in found if not one.is_file()]
    if absent:
        more = f", and {len(absent) - 1} others do not either" if len(absent) > 1 else ""
        raise TrainingError(
            f"{str(absent[0])!r} does not exist{more}. Name a file, a folder, a glob or scenes:COUNT@SEED."
        )
    return found


def _matches(pattern: str) -> list[Path]:
    found = sorted(glob.glob(pattern))  # noqa: PTH207 -- Path.glob takes no absolute patterns
    return [Path(one) for one in found or [pattern]]


def _is_data(path: Path) -> bool:
    return not path.name.startswith((".", "_")) and path.is_file()
