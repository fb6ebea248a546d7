"""How many rows each shard holds, which must be known before the first step.

img2dataset leaves the number beside each shard. Else the headers of the tar file are read, without what is between
them: 5 to 8 microseconds a member, where the `tarfile` module takes 28 to 34 (3,000 members, on one busy core). A shard
with headers of an unusual kind is left to that module.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longclip_rt.errors import TrainingError
from longclip_rt.system.extras import require

logger = logging.getLogger("longclip_rt")

_STATISTICS = "_stats.json"
_BLOCK = 512
_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips


@dataclass(frozen=True, slots=True)
class ShardCount:
    """The rows of a shard, and whether it is damaged behind them."""

    rows: int
    damaged: bool = False


def rows_of_shards(paths: Sequence[Path], is_wanted: Callable[[str], bool]) -> list[ShardCount]:
    """Counts the rows of shards, or of that part of a damaged one that can be read.

    Args:
        paths: The shards.
        is_wanted: Whether a member of this name is part of a row.

    Raises:
        TrainingError: A shard cannot be read.
        MissingExtraError: webdataset is not installed.
    """
    counts = [_count_from_statistics(path) for path in paths]
    if unknown := counts.count(None):
        logger.info("counting the rows of %d shards", unknown)
    return [
        _count_from_headers(path, is_wanted) if count is None else ShardCount(count)
        for path, count in zip(paths, counts, strict=True)
    ]


def _count_from_statistics(path: Path) -> int | None:
    try:
        count = json.loads(path.with_name(path.stem + _STATISTICS).read_bytes())["successes"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return count if isinstance(count, int) else None


def _count_from_headers(path: Path, is_wanted: Callable[[str], bool]) -> ShardCount:
    try:
        for names_in in (_names_in_plain_tar, _names_in_tar):
            damages: list[str] = []
            with contextlib.suppress(_UnusualHeader):
                rows = _count_rows(names_in(path, damages), is_wanted)
                return ShardCount(rows, damaged=bool(damages))
        raise AssertionError  # the second reader takes everything
    except OSError as error:
        raise TrainingError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error


def _count_rows(names: Iterable[str], is_wanted: Callable[[str], bool]) -> int:
    """Members that follow each other and have one name, but for the suffix, are a row."""
    key_of = require("webdataset.tariterators", "train").base_plus_ext
    count, last = 0, None
    for name in names:
        if is_wanted(name) and not _META.match(name):
            key = key_of(name)[0]
            count += key not in (None, last)
            last = last if key is None else key
    return count


class _UnusualHeader(Exception):
    pass


def _names_in_plain_tar(path: Path, damages: list[str]) -> Iterator[str]:
    """Names of the files in a tar file whose headers are the common ones (POSIX.1-1988, `ustar`).

    Raises:
        _UnusualHeader: Another header was met, or the file begins with something that is none.
    """
    with path.open("rb", buffering=0) as stream:
        offset = 0
        while (header := stream.read(_BLOCK)).strip(b"\0"):
            if len(header) < _BLOCK or not header.startswith(b"ustar", 257):
                if not offset:
                    raise _UnusualHeader
                # `tarfile` would take this for the end.
                damages.append(f"there is no header at byte {offset}")
                return
            kind = header[156:157]
            try:
                size = int(header[124:136].strip(b" \0"), 8)
                name = header[:100].rstrip(b"\0").decode()
                prefix = header[345:500].rstrip(b"\0").decode()
            except ValueError as error:
                raise _UnusualHeader from error
            if kind in (b"0", b"\0"):
                # GNU's variant, which has a blank behind "ustar", keeps other things in the place of the prefix.
                yield f"{prefix}/{name}" if prefix and header[262:263] == b"\0" else name
            elif kind == b"x":
                if b" path=" in stream.read(size):  # a long or foreign name for the next member
                    raise _UnusualHeader
            elif kind not in (b"5", b"g"):
                raise _UnusualHeader
            offset += _BLOCK + -(-size // _BLOCK) * _BLOCK
            stream.seek(offset)


def _names_in_tar(path: Path, damages: list[str]) -> Iterator[str]:
    """Names of the files in any tar file, also a compressed one, or in what can be read of a damaged one."""
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # which would keep every header of a large shard
                if member.isreg():
                    yield member.name
    except (tarfile.TarError, EOFError) as error:
        damages.append(str(error))
