"""WebDataset shards: tar files whose members of one name, `0001.jpg` and `0001.txt` or `0001.json`, are a row.

The main process reads the shards as streams and never seeks, so that they may lie on slow disks; workers decode. The
members are those of img2dataset: an image, a text or a JSON object that holds it.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from longclip_rt.errors import InputError, TrainingError
from longclip_rt.model.tokenizer import Tokenizer
from longclip_rt.system.extras import require
from longclip_rt.train.data.feeds import Share, StreamFeed, shuffled
from longclip_rt.train.data.rows import BadRow, Pair, Row, caption_or_none, pair_of
from longclip_rt.train.data.shard_counts import rows_of_shards
from longclip_rt.train.data.table_files import LONG_COLUMNS, SHORT_COLUMNS, Columns

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
_TEXT_MEMBERS = ("txt", "json")


@dataclass(frozen=True, slots=True)
class ShardRow:
    """A row of a shard, as it was read.

    Attributes:
        id: The shard's name and the row's.
        members: Content of its image and texts, by suffix.
        columns: Which fields of the JSON object are captions.
    """

    id: str
    members: Mapping[str, bytes]
    columns: Columns

    def pair(self, size: int, tokenizer: Tokenizer) -> Pair:
        """See `Row.pair`. The caption is the JSON field asked for, else the .txt, else a JSON field of a usual name."""
        image = next((self.members[name] for name in IMAGE_MEMBERS if name in self.members), None)
        if image is None:
            raise InputError(f"It has no image (.{', .'.join(IMAGE_MEMBERS)}).")
        fields = self._fields()
        long: object = fields.get(self.columns.long) if self.columns.long else None
        if self.columns.long is None:
            text = self.members.get("txt", b"").decode("utf-8", "replace")
            usual = (fields[name] for name in LONG_COLUMNS if caption_or_none(fields.get(name)))
            long = caption_or_none(text) or next(usual, text if "txt" in self.members else None)
        names = SHORT_COLUMNS if self.columns.short is None else (self.columns.short,)
        return pair_of(image, long, next((fields[name] for name in names if name in fields), None))

    def _fields(self) -> Mapping[str, Any]:
        content = self.members.get("json", b"{}")
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"Its .json is not valid JSON: {error}.") from error
        if not isinstance(fields, dict):
            raise InputError(f"Its .json holds a {type(fields).__name__}, not an object.")
        return fields


@dataclass(frozen=True, slots=True)
class BrokenShard:
    """Stands in a stream where a shard broke off."""

    id: str
    reason: str

    def pair(self, size: int, tokenizer: Tokenizer) -> Pair:
        """Says why there is none."""
        raise InputError(self.reason)


@dataclass(frozen=True)
class Shards:
    """Shards, and the range of rows of each that belongs to this part of the data.

    Attributes:
        paths: The files.
        ranges: For each file, the first of its rows and the first row behind them; None: to its end.
        counted: For each file, how many rows it is thought to hold in all.
        count: Rows in all.
        columns: Which fields of JSON members are captions.
        buffer: Rows that are held to be shuffled.
    """

    paths: tuple[Path, ...]
    ranges: tuple[tuple[int, int | None], ...]
    counted: tuple[int, ...]
    count: int
    columns: Columns
    buffer: int
    kind: str = "webdataset"

    def in_order(self) -> Iterator[Row]:
        """All rows as they stand."""
        return self._rows(range(len(self.paths)))

    def feed(self, seed: int, epoch: int, share: Share) -> StreamFeed:
        """A process's share of an epoch: every `world`-th shard of the epoch's order.

        Raises:
            TrainingError: There are fewer shards than processes.
        """
        if len(self.paths) < share.world:
            raise TrainingError(
                f"There are {len(self.paths)} shards to train on for {share.world} processes, and each process reads "
                f"shards of its own. Write at least {share.world} shards, or start fewer processes."
            )

        def open_stream(number: int) -> Iterator[Row]:
            mine = shuffled(len(self.paths), seed, epoch)[share.rank :: share.world]
            order = mine[shuffled(len(mine), seed, epoch, share.rank, number)] if number else mine
            # Seeded with a text, Python's generator does not depend on the process's hash seed.
            chance = random.Random(f"{seed}/{epoch}/{share.rank}/{number}")
            shuffle = require("webdataset", "train").filters.shuffle(self.buffer, initial=self.buffer, rng=chance)
            rows: Iterator[Row] = shuffle(self._rows(order))
            return rows

        return StreamFeed(open_stream, share, self.count // share.batch_size, self.count // share.world)

    def split(self, count: int) -> tuple[Shards, Shards]:
        """Parts the first rows from the others."""
        first: list[tuple[Path, tuple[int, int | None], int]] = []
        others: list[tuple[Path, tuple[int, int | None], int]] = []
        left = count
        for path, rows in zip(self.paths, self.counted, strict=True):
            taken = min(left, rows)
            left -= taken
            if taken:
                first.append((path, (0, taken), rows))
            if taken < rows or not rows:
                others.append((path, (taken, None), rows))
        return self._part(first, count), self._part(others, self.count - count)

    def _part(self, pieces: list[tuple[Path, tuple[int, int | None], int]], count: int) -> Shards:
        paths, ranges, counted = zip(*pieces, strict=True) if pieces else ((), (), ())
        return replace(self, paths=paths, ranges=ranges, counted=counted, count=count)

    def _rows(self, order: Sequence[int] | np.ndarray) -> Iterator[Row]:
        for place in order:
            first, stop = self.ranges[place]
            rows = _rows_of_shard(self.paths[place], self.columns, self.counted[place])
            yield from itertools.islice(rows, first, stop)


def open_shards(paths: Sequence[Path], columns: Columns, buffer: int) -> tuple[Shards, tuple[BadRow, ...]]:
    """Opens shards and counts their rows.

    Returns:
        The shards, and those that are damaged.

    Raises:
        TrainingError: A file cannot be read.
        MissingExtraError: webdataset is not installed.
    """
    require("webdataset", "train")
    counts = rows_of_shards(paths, _is_wanted)
    counted = tuple(count.rows for count in counts)
    damaged = tuple(
        BadRow(path.name, f"The shard is damaged after {count.rows} rows, and those behind it are lost.")
        for path, count in zip(paths, counts, strict=True)
        if count.damaged
    )
    return Shards(tuple(paths), ((0, None),) * len(paths), counted, sum(counted), columns, buffer), damaged


def _rows_of_shard(path: Path, columns: Columns, counted: int) -> Iterator[Row]:
    iterators = require("webdataset.tariterators", "train")
    troubles: list[str] = []

    def note(error: Exception) -> bool:
        troubles.append(str(error.args[0] if error.args else error))
        return True  # go on with what can be read

    found = 0
    try:
        with path.open("rb") as stream:
            files = iterators.tar_file_expander([{"url": str(path), "stream": stream}], note, _is_wanted)
            for sample in iterators.group_by_keys(files, handler=note):
                found += 1
                members = {name: value for name, value in sample.items() if not name.startswith("__")}
                yield ShardRow(f"{path.name}/{sample['__key__']}", members, columns)
    except OSError as error:
        troubles.append(error.strerror or str(error))
    if not troubles and found < counted:
        troubles.append(f"it gave {found} rows of {counted}")
    if troubles:
        yield BrokenShard(path.name, f"The shard is damaged, and some of its rows are lost: {troubles[0]}.")


def _is_wanted(name: str) -> bool:
    return name.rpartition(".")[2].lower() in (*IMAGE_MEMBERS, *_TEXT_MEMBERS)
