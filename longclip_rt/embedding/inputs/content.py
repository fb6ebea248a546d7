"""What an entry stands for: its file, or its text."""

from __future__ import annotations

import codecs
import stat
from pathlib import Path

from longclip_rt.embedding.inputs.entries import MAX_TEXT_BYTES, Entry
from longclip_rt.errors import InputError


def locate(entry: Entry) -> Path:
    """Finds the file that an entry names, in the working directory and then in the list's folder.

    Raises:
        InputError: When there is none, or it is not a regular file.
    """
    given = Path(entry.id)
    candidates = [given]
    if not given.is_absolute() and entry.base not in ("", "."):
        candidates.append(Path(entry.base) / given)
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
