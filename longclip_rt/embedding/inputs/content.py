"""What an entry stands for: its file, or its text."""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
from pathlib import Path

from longclip_rt.embedding.inputs.entries import MAX_TEXT_BYTES, Entry
from longclip_rt.errors import InputError


def _candidates(entry: Entry) -> list[Path]:
    """Where the file that an entry names may be: in the working directory, then in the list's folder."""
    given = Path(entry.id)
    if given.is_absolute() or entry.base in ("", "."):
        return [given]
    return [given, Path(entry.base) / given]


class Places:
    """A running SHA-256 over the places that relative paths lead to from here: other ones from another folder."""

    def __init__(self) -> None:
        self._here = Path.cwd()
        self._hash = hashlib.sha256()
        self._any = False

    def add(self, entry: Entry) -> None:
        """Takes one entry in. A file that is not there counts as if it were in the last place looked at."""
        if entry.inline or entry.error is not None or Path(entry.id).is_absolute():
            return
        *others, last = _candidates(entry)
        place = next((candidate for candidate in others if _is_file(candidate)), last)
        self._hash.update(os.fsencode(self._here / place) + b"\0")
        self._any = True

    def hexdigest(self) -> str:
        """The digest of what came so far; empty where no path was relative."""
        return self._hash.hexdigest() if self._any else ""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def locate(entry: Entry) -> Path:
    """Finds the file that an entry names, in the working directory and then in the list's folder.

    Raises:
        InputError: When there is none, or it is not a regular file.
    """
    candidates = _candidates(entry)
    trouble = "There is no such file"
    if len(candidates) > 1:
        trouble += f", neither in the working directory nor in the list's folder {entry.base!r}"
    for candidate in candidates:
        try:
            mode = candidate.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise InputError(f"The file cannot be opened: {error.strerror}.") from error
        if stat.S_ISREG(mode):
            return candidate
        # Opening a pipe or a device could block for ever or never end.
        trouble = (
            "It is a folder; give folders on the command line" if stat.S_ISDIR(mode) else "It is not a regular file"
        )
    raise InputError(trouble + ".")


def read_text(entry: Entry) -> str:
    """The text of an entry: its line, or the content of the `.txt` file that the line names.

    Raises:
        InputError: When the file is absent, empty, too large or not UTF-8.
    """
    if entry.inline:
        return entry.id
    path = locate(entry)
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise InputError(f"The file cannot be read: {error.strerror}.") from error
    if len(content) > MAX_TEXT_BYTES:
        raise InputError(f"The file is larger than {MAX_TEXT_BYTES} bytes. One .txt file is one text.")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError("The file is UTF-16. Save it as UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"The file is not valid UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    if "\0" in text:
        raise InputError("The file holds a NUL byte. Is this really a text?")
    if not text.strip():
        raise InputError("The file is empty.")
    return text
