"""Streamed files that are whole or absent, and the disk's failures as sentences."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from longclip_rt.errors import OutputError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turns an `OSError` of the block into one sentence about `target`.

    Raises:
        OutputError: When the block raises an `OSError`.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            advice = "Make room and run the same command again: it goes on where it stopped."
        elif error.errno in _DENIED:
            advice = "Choose a folder you may write to with -o."
        elif error.errno == errno.ENOENT:
            advice = f"Make the folder {str(target.parent)!r} first."
        else:
            advice = "Choose another place with -o."
        raise OutputError(f"{str(target)!r} cannot be written: {reason}. {advice}") from error


def sync_file(stream: BinaryIO) -> None:
    """Returns when the bytes written so far are on the disk, not only in its cache."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` (new files, renames) outlive a power cut, where the system can do that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Windows opens no folders; its renames are journalled.
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `target`; when the block ends well it is synced and takes the name `target`.

    The temporary name is fixed (`<target>.tmp`), so that a killed run leaves at most one behind and the next run writes
    over it: callers hold a lock.

    Raises:
        OSError: When the disk refuses, at any step; `target` is then as it was.
    """
    temporary = target.with_name(target.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            sync_file(stream)
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(target.parent)
