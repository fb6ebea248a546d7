"""What to embed: lists, tables, folders, globs and single images, as one stream of entries.

Nothing here keeps more than one line, or the names of one folder or glob, in memory. A `.txt` file given as an argument
is a list; a `.txt` file named in a list or found in a folder is one text. In lists of paths, empty lines and lines that
start with `#` are skipped; in lists of texts only empty lines are, for a caption may start with `#`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from longclip_rt.embedding.inputs.content import FilesDigest
from longclip_rt.embedding.inputs.entries import Entry, EntryDigest, Line, Reading, Tally, is_url, lines_from_stream
from longclip_rt.embedding.inputs.tables import entries_from_jsonl, entries_from_parquet
from longclip_rt.errors import InputError
from longclip_rt.system.files import has_image_suffix

_IMAGE_HEADS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")

Form = Literal["list", "jsonl", "parquet", "folder", "glob", "image"]


@dataclass(frozen=True)
class Source:
    """One argument of the command.

    Attributes:
        name: As typed.
        form: How it is read.
        path: The file or folder; None for what can be read only once (stdin, a pipe) until `spool_streams`.
        base: The folder it lies in, as typed; "." for stdin, folders, globs and images.
    """

    name: str
    form: Form
    path: Path | None
    base: str = "."


@dataclass(frozen=True)
class InputSummary:
    """What `scan` found.

    Attributes:
        entries: Their number.
        digest: Of the entries as they stand in the sources.
        places: Digest of the places that relative paths lead to from the working directory; empty where none is.
        files: Digest of the states of the files named, see `FilesDigest`; empty where none is named.
        tally: What was skipped, and the columns chosen.
    """

    entries: int
    digest: str
    places: str
    files: str
    tally: Tally


@dataclass(frozen=True)
class Inputs:
    """Sources, and how their values are read.

    Attributes:
        sources: From `sources_from_arguments`.
        texts: Whether each value is itself a text; else it is a path.
        column: Column of tables; None: chosen by name.
    """

    sources: tuple[Source, ...]
    texts: bool = False
    column: str | None = None

    @property
    def base(self) -> str:
        """The folders that relative ids are looked up in after the working directory, joined by `os.pathsep`."""
        return os.pathsep.join(dict.fromkeys(source.base for source in self.sources))

    def entries(self, tally: Tally | None = None) -> Iterator[Entry]:
        """Streams the entries in order, the same at every call while the files stay the same.

        Raises:
            InputError: When a source cannot be read at all. Single bad lines come as entries with `error`.
        """
        tally = Tally() if tally is None else tally
        for source in self.sources:
            label = source.name if len(self.sources) > 1 else ""
            reading = Reading(source.name, label, source.base, self.texts, self.column, tally)
            try:
                yield from _entries_from_source(source, reading)
            except OSError as error:
                raise InputError(f"{source.name!r} cannot be read: {error.strerror or error}.") from error


def sources_from_arguments(
    arguments: Sequence[str], *, texts: bool = False, column: str | None = None
) -> tuple[Source, ...]:
    """Recognises what each argument is. Reads nothing but the first bytes of lists.

    Raises:
        InputError: When an argument names nothing, or cannot be what the options say.
    """
    if not arguments:
        raise InputError("Nothing to embed was given. Name a list, a folder, an image, or - for standard input.")
    if list(arguments).count("-") > 1:
        raise InputError("Standard input (-) can be given once only.")
    sources = tuple(_source_from_argument(argument, column) for argument in arguments)
    for source in sources:
        if texts and source.form in ("folder", "glob", "image"):
            raise InputError(f"{source.name!r} is no list of texts. With --texts give lists, .jsonl or .parquet files.")
    if column is not None and not any(source.form in ("jsonl", "parquet") for source in sources):
        raise InputError("The option --column is for .jsonl and .parquet files, and none was given.")
    return sources


def _source_from_argument(argument: str, column: str | None) -> Source:
    """What one argument is; standard input is JSON Lines when a column is named, else a list."""
    if argument == "-":
        return Source("-", "jsonl" if column is not None else "list", None)
    if is_url(argument):
        raise InputError(f"{argument!r} is a URL. Only files on this machine are read: download it first.")
    path = Path(argument)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if glob.has_magic(argument):
            return Source(argument, "glob", path)
        raise InputError(f"{argument!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{argument!r} is not a file name: {error}.") from error
    if stat.S_ISDIR(mode):
        return Source(argument, "folder", path)
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise InputError(f"{argument!r} is a device or a socket, which may never end. Give a file, or - and a pipe.")
    suffix = path.suffix.lower()
    form: Form = "list"
    if suffix in (".jsonl", ".ndjson"):
        form = "jsonl"
    elif suffix in (".parquet", ".pq"):
        form = "parquet"
    elif has_image_suffix(path) or (stat.S_ISREG(mode) and _begins_like_image(path)):
        form = "image"
    base = "." if form == "image" else str(path.parent)
    return Source(argument, form, path if stat.S_ISREG(mode) else None, base)


def _begins_like_image(path: Path) -> bool:
    """Whether a file without an image's suffix is one, so that it is not read as a list."""
    try:
        with path.open("rb") as stream:
            head = stream.read(12)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    return head.startswith(_IMAGE_HEADS) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def spool_streams(sources: Sequence[Source], folder: Path, limit: int) -> tuple[Source, ...]:
    """Copies what can be read only once (standard input, pipes) to `folder`, since the inputs are read twice.

    Args:
        sources: Recognised sources.
        folder: An existing folder; files `input-0`, `input-1`... are written to it. None stays of a copy that fails.
        limit: Most bytes of each.

    Raises:
        InputError: When a stream holds more than `limit` bytes.
        OSError: When the copy cannot be written or a pipe not be read.
    """
    spooled = []
    for index, source in enumerate(sources):
        if source.path is None:
            target = folder / f"input-{index}"
            try:
                with contextlib.ExitStack() as stack:
                    copy = stack.enter_context(target.open("wb"))
                    piped = (
                        sys.stdin.buffer if source.name == "-" else stack.enter_context(Path(source.name).open("rb"))
                    )
                    _copy(piped, copy, source.name, limit)
            except BaseException:
                target.unlink(missing_ok=True)
                raise
            source = dataclasses.replace(source, path=target)
        spooled.append(source)
    return tuple(spooled)


def _copy(stream: BinaryIO, copy: BinaryIO, name: str, limit: int) -> None:
    while piece := stream.read(1 << 20):
        limit -= len(piece)
        if limit < 0:
            raise InputError(
                f"{'Standard input' if name == '-' else repr(name)} holds more than --max-stream allows. Raise that, "
                "or write it to a file and give the file."
            )
        copy.write(piece)


def scan(inputs: Inputs) -> InputSummary:
    """Reads the inputs once, to count them and to know them again.

    Raises:
        InputError: When a source cannot be read, or there is nothing to embed.
    """
    tally = Tally()
    digest, files = EntryDigest(), FilesDigest()
    for entry in inputs.entries(tally):
        digest.add(entry)
        files.add(entry)
    if digest.count == 0:
        names = ", ".join(repr(source.name) for source in inputs.sources)
        raise InputError(
            f"There is nothing to embed in {names}: {tally.empty} empty lines, {tally.comments} comments, "
            f"{tally.others} files that are neither images nor .txt."
        )
    return InputSummary(digest.count, digest.hexdigest(), files.places, files.states, tally)


def _entries_from_source(source: Source, reading: Reading) -> Iterator[Entry]:
    """Entries of one source, whatever its form."""
    if source.form == "image":
        yield reading.entry(source.name, 1)
    elif source.form == "folder":
        for line, name in enumerate(_names_in_folder(source.name, reading.tally), 1):
            if isinstance(name, str):
                yield reading.entry(name, line)
            else:
                yield reading.reject(str(name.filename), line, f"The folder cannot be read: {name.strerror}.")
    elif source.form == "glob":
        # Path.glob would lose the pattern as typed: ids are what the glob says, "./a*" included.
        matches = sorted(glob.glob(source.name, recursive=True))  # noqa: PTH207
        names = [name for name in matches if not Path(name).is_dir()]
        if not names:
            raise InputError(f"{source.name!r} matches no file.")
        for line, name in enumerate(names, 1):
            yield reading.entry(name, line)
    else:
        assert source.path is not None, "spool_streams comes first"
        if source.form == "parquet":
            yield from entries_from_parquet(source.path, reading)
            return
        with source.path.open("rb") as stream:
            lines = lines_from_stream(stream, source.name)
            yield from (
                entries_from_jsonl(lines, reading) if source.form == "jsonl" else _entries_from_list(lines, reading)
            )


def _entries_from_list(lines: Iterable[Line], reading: Reading) -> Iterator[Entry]:
    """Entries of a list, one a line."""
    for line in lines:
        # Blanks around a path are slips of an editor; those around a text are the text's, and the tokenizer's affair.
        value = line.text if reading.texts else line.text.strip()
        if line.error is not None:
            yield reading.reject(value, line.number, line.error)
        elif not value.strip():
            reading.tally.empty += 1
        elif not reading.texts and value.startswith("#"):
            reading.tally.comments += 1
        else:
            yield reading.entry(value, line.number)


def _names_in_folder(folder: str, tally: Tally) -> Iterator[str | OSError]:
    """Images and `.txt` files below a folder, in sorted order; hidden names and links to folders are left out.

    An `OSError` stands for a folder below that cannot be listed.
    """
    try:
        with os.scandir(folder) as listing:
            found = sorted(listing, key=lambda item: item.name)
    except OSError as error:
        yield error
        return
    for item in found:
        if item.name.startswith("."):
            continue
        if item.is_dir(follow_symlinks=False):
            yield from _names_in_folder(item.path, tally)
        elif has_image_suffix(Path(item.name)) or item.name.lower().endswith(".txt"):
            yield item.path
        else:
            tally.others += 1
