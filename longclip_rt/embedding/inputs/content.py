"""What an entry stands for: its file, or its text."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import os
import stat
from pathlib import Path

from longclip_rt.embedding.inputs.entries import MAX_TEXT_BYTES, Entry
from longclip_rt.errors import InputError
from longclip_rt.system.files import tells_of_system

# Bytes at either end of a file that are compared where its time is no help.
_END = 4096


def _candidates(entry: Entry) -> list[str]:
    """Where the file that an entry names may be: in the working directory, then in the list's folder."""
    if entry.base in ("", ".") or os.path.isabs(entry.id):  # noqa: PTH117 see FilesDigest
        return [entry.id]
    return [entry.id, os.path.join(entry.base, entry.id)]  # noqa: PTH118


def _ends(path: str, size: int) -> bytes:
    """A digest of the first and last bytes of a file."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # `open` makes twice as many system calls
    except OSError:
        return b"unreadable"
    try:
        content = os.read(handle, _END)
        if size > _END:
            os.lseek(handle, max(_END, size - _END), os.SEEK_SET)
            content += os.read(handle, _END)
    except OSError:
        return b"unreadable"
    finally:
        os.close(handle)
    return hashlib.sha256(content).digest()


class FilesDigest:
    """Running SHA-256s over the files that entries lead to from here: where they are, and whether they are the same.

    A file is taken for the same while it has the same size and the same time of its last change, as `rsync` takes it:
    to read a million files twice would double the work. That is one `stat` an entry, some microseconds. Archives give
    times in whole seconds, often one to all files: of files with such a time both ends are compared as well.
    """

    def __init__(self) -> None:
        self._here = os.fsencode(Path.cwd()) + b"/"
        self._places = hashlib.sha256()
        self._states = hashlib.sha256()
        self._relative = self._any = False

    def add(self, entry: Entry) -> bytes:
        """Takes one entry in. Returns what tells its file's state from another; empty where it names none."""
        if entry.inline or entry.error is not None:
            return b""
        path, state = entry.id, b"absent"
        for path in _candidates(entry):
            with contextlib.suppress(OSError, ValueError):
                status = os.stat(path)  # noqa: PTH116
                if stat.S_ISREG(status.st_mode):
                    state = b"%d %d" % (status.st_size, status.st_mtime_ns)
                    if status.st_mtime_ns % 10**9 == 0:
                        state += _ends(path, status.st_size)
                    break
        if not os.path.isabs(entry.id):  # noqa: PTH117 a Path for each of a million entries takes longer than its stat
            self._relative = True
            self._places.update(self._here + os.fsencode(path) + b"\0")
        self._any = True
        state += b"\0"
        self._states.update(state)
        return state

    @property
    def places(self) -> str:
        """The digest of the places of relative paths; empty where there were none."""
        return self._places.hexdigest() if self._relative else ""

    @property
    def states(self) -> str:
        """The digest of the states of all files; empty where no entry named one."""
        return self._states.hexdigest() if self._any else ""


def locate(entry: Entry) -> Path:
    """Finds the file that an entry names, in the working directory and then in the list's folder.

    Raises:
        InputError: When there is none, or it is not a regular file.
    """
    candidates = _candidates(entry)
    trouble = "There is no such file"
    if len(candidates) > 1:
        trouble += f", neither in the working directory nor in the list's folder {entry.base!r}"
    for candidate in map(Path, candidates):
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
        OSError: When open files or memory ran out.
    """
    if entry.inline:
        return entry.id
    path = locate(entry)
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        if tells_of_system(error):
            raise
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
