"""Files: their kinds and hashes, how they are written whole or not at all, and the disk's failures as sentences."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from longclip_rt.errors import LongClipError, OutputError

_CHUNK = 1 << 20
_IMAGE_SUFFIX = re.compile(r"\.(jpe?g|jpe|jfif|png|gif|bmp|webp|tiff?|p[bgpn]m|jp2|avif|tga|ico)")
_LONGEST_PATH = 4096  # bytes, Linux's limit; others have lower ones
_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


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
            advice = "Make room and run the same command again (train: with --resume): it goes on where it stopped."
        elif error.errno in _DENIED:
            advice = "Choose a folder you may write to."
        elif error.errno == errno.ENOENT:
            advice = f"Make the folder {str(target.parent)!r} first."
        elif error.errno in _EXHAUSTED:
            advice = "Raise the limit (ulimit) and run the same command again."
        else:
            advice = "Choose another place."
        raise OutputError(f"{str(target)!r} cannot be written: {reason}. {advice}") from error


def path_from_argument(value: object, what: str, refusal: type[LongClipError]) -> Path:
    """The path that a caller gave.

    Args:
        value: What was given.
        what: What it should name, for the message.
        refusal: What is raised.

    Raises:
        LongClipError: As `refusal`, when it is no path.
    """
    try:
        path = Path(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise refusal(f"{what} is named by a str or a Path; got {type(value).__name__}.") from error
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise refusal(f"{what} is named by a path; {str(path)!r} is not valid Unicode.") from error
    if b"\0" in encoded or len(encoded) > _LONGEST_PATH:
        raise refusal(f"{what} is named by a path; {str(path)[:60]!r}... holds a NUL, or is longer than any.")
    return path


def tells_of_system(error: OSError) -> bool:
    """Whether an error on opening a file says that open files or memory ran out, and nothing of that file."""
    return error.errno in _EXHAUSTED


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


def behind_links(path: Path) -> Path:
    """The file that a link names, so that the file is replaced and the link stays; what is no link, as it is.

    Raises:
        OSError: When links lead round in a circle.
    """
    if not path.is_symlink():
        return path
    found = Path(os.path.realpath(path))  # `Path.resolve` fails on a circle in another way in each Python
    if found.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return found


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `target`; when the block ends well it is synced and takes the name `target`.

    The temporary name is fixed (`<target>.tmp`), so that a killed run leaves at most one behind and the next run writes
    over it: callers hold a lock.

    Raises:
        OSError: When the disk refuses, at any step; `target` is then as it was.
    """
    target = behind_links(target)
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


def has_image_suffix(path: Path) -> bool:
    """Whether a file is an image by its name."""
    return _IMAGE_SUFFIX.fullmatch(path.suffix.lower()) is not None


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """The SHA-256 of a value's canonical JSON: sorted keys, no white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_text_atomically(path: Path, text: str) -> None:
    """Writes UTF-8 text so that `path` holds either its old content or all of the new.

    Raises:
        OutputError: The folder cannot be written, or the disk is full.
    """
    with output_errors(path), whole_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def directory_in_the_making(target: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends well, and vanishes when it fails.

    Args:
        target: The folder to make. It must not exist; its parents are made.

    Raises:
        OutputError: `target` exists, or its parent cannot be written.
    """
    if target.exists():
        raise OutputError(f"{target} exists already. Choose another name, or remove it first.")
    staging = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        try:
            yield staging
            staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
