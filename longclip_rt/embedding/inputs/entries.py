"""One thing to embed: what a line of the input says, checked as far as it can be without opening anything."""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Literal

from longclip_rt.errors import InputError

Kind = Literal["image", "text"]

# Far above any caption (248 tokens are about 1,000 characters) and any path; it bounds memory when a list is not one.
MAX_TEXT_BYTES = 1 << 20
# What is kept of a line that is too long to keep.
CLIPPED = 200
LONG_LINE = f"The line is longer than {MAX_TEXT_BYTES} bytes. Is this really a list?"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the input.

    Attributes:
        line: Line in the list (from 1), row of a table, or position in a folder or glob.
        id: The line as it stands: a path, or the text itself.
        kind: "image" or "text".
        inline: Whether `id` is the text itself and not a path.
        base: Folder that a relative path is looked up in after the working directory.
        source: The argument it came from, where there are several; else "".
        error: Why it cannot be embedded, when that shows before its content is read.
    """

    line: int
    id: str
    kind: Kind
    inline: bool = False
    base: str = "."
    source: str = ""
    error: str | None = None


class EntryDigest:
    """A running SHA-256 over entries: equal exactly when the same entries came in the same order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.count = 0

    def add(self, entry: Entry, state: bytes = b"") -> None:
        """Takes one entry in, and what is known of its file's state."""
        self.count += 1
        head = f"{entry.line}\0{entry.kind}\0{int(entry.inline)}\0{entry.base}\0{entry.source}\0{entry.error or ''}\0"
        text = entry.id.encode("utf-8")
        # The length keeps two entries from reading as one.
        self._hash.update(f"{len(text)}\0{head}".encode("utf-8", "backslashreplace") + state + text)

    def hexdigest(self) -> str:
        """The digest of what came so far, 64 hexadecimal digits."""
        return self._hash.hexdigest()


def is_url(value: str) -> bool:
    """Whether `value` begins like `https://` or `s3://`."""
    return _URL.match(value) is not None


def entry_from_value(value: str, line: int, *, texts: bool, base: str, source: str) -> Entry:
    """The entry that a line or a table's cell stands for: a text, or a path to an image or a `.txt` file.

    Args:
        value: The line without its end.
        line: Its number, from 1.
        texts: Whether it is itself a text.
        base: The list's folder.
        source: The argument it came from, or "".
    """
    error: str | None = None
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        # File names that are not UTF-8, and JSON's lone surrogates: no output format can hold them.
        value = value.encode("utf-8", "backslashreplace").decode("utf-8")
        size = len(value)
        error = "It is not valid Unicode. Rename the file, or mend the text."
    kind: Kind = "text" if texts or value.lower().endswith(".txt") else "image"
    if size > MAX_TEXT_BYTES:
        value = value[:CLIPPED] + "…"
        error = LONG_LINE
    if error is None:
        if "\0" in value:
            error = "It holds a NUL byte. Is this really a text?"
        elif not value.strip():
            error = "The text is empty." if texts else "The path is empty."
        elif not texts and is_url(value):
            error = "It is a URL. Only files on this machine are read: download it first."
    return Entry(line, value, kind, inline=texts, base=base, source=source, error=error)


@dataclass
class Tally:
    """What one pass over the inputs left out, and which columns it chose.

    Attributes:
        empty: Empty lines.
        comments: Lines that start with `#`.
        others: Files of folders that are neither images nor `.txt`.
        columns: Column read, for each table.
    """

    empty: int = 0
    comments: int = 0
    others: int = 0
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """How the values of one source become entries.

    Attributes:
        name: The argument as typed, for messages.
        label: `Entry.source`: the argument where there are several, else "".
        base: `Entry.base`.
        texts: Whether values are texts.
        column: Column asked for; None: chosen by name.
        tally: Counts what is skipped.
    """

    name: str
    label: str
    base: str
    texts: bool
    column: str | None
    tally: Tally

    def entry(self, value: str, line: int) -> Entry:
        """The entry of a value that was read."""
        return entry_from_value(value, line, texts=self.texts, base=self.base, source=self.label)

    def reject(self, value: str, line: int, error: str) -> Entry:
        """The entry of a value that could not be read."""
        kind: Kind = "text" if self.texts else "image"
        return Entry(line, value, kind, inline=self.texts, base=self.base, source=self.label, error=error)


@dataclass(frozen=True, slots=True)
class Line:
    """A line without its end; `text` is what can be shown of it when `error` says why it cannot be read."""

    number: int
    text: str
    error: str | None = None


def lines_from_stream(stream: BinaryIO, name: str) -> Iterator[Line]:
    """Reads UTF-8 lines in bounded memory, with or without a byte order mark, ended by LF or CRLF.

    Raises:
        InputError: When the file is UTF-16.
    """
    number = 0
    while raw := stream.readline(MAX_TEXT_BYTES + 1):
        number += 1
        if number == 1:
            if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise InputError(f"{name!r} is UTF-16, as PowerShell's > writes it. Save it as UTF-8.")
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if len(raw) > MAX_TEXT_BYTES and not raw.endswith(b"\n"):
            while (rest := stream.readline(MAX_TEXT_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield Line(number, raw[:CLIPPED].decode("utf-8", "replace") + "…", LONG_LINE)
            continue
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        try:
            yield Line(number, raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            shown = raw.decode("utf-8", "backslashreplace")
            yield Line(number, shown, f"The line is not valid UTF-8 (byte {error.start}). Save the list as UTF-8.")
