"""The rows of ShareGPT4V's json, JSON Lines, CSV and Parquet, one by one: three cells each, or why there are none."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from longclip_rt.embedding.inputs.entries import lines_from_stream
from longclip_rt.errors import InputError, TrainingError

IMAGE_COLUMNS = ("image", "image_path", "path", "file_name", "jpg")
LONG_COLUMNS = ("long_caption", "caption", "text", "txt", "conversations")
SHORT_COLUMNS = ("short_caption", "caption_short", "short")

# Characters read at a time; more than any row of a json has; and rows of Parquet that are Python objects at a time.
_CHARACTERS_AT_ONCE = 1 << 22
_MAX_ROW_CHARACTERS = 1 << 26
_ROWS_AT_ONCE = 1024


Record = tuple[object, object, object] | str
"""A row's image, long and short caption as they stand in the file, None where one is missing; or why it has none."""


@dataclass(frozen=True)
class Columns:
    """Which columns to read; None finds one by the usual names. A short caption may be missing."""

    image: str | None = None
    long: str | None = None
    short: str | None = None

    def found_in(self, available: Sequence[str], name: str) -> Columns:
        """The columns that are there.

        Raises:
            TrainingError: One is missing; the message lists what is there.
        """
        return Columns(
            _choose(self.image, IMAGE_COLUMNS, available, name, "--image-column"),
            _choose(self.long, LONG_COLUMNS, available, name, "--long-column"),
            _choose(self.short, SHORT_COLUMNS, available, name, "--short-column", needed=self.short is not None),
        )


def _choose(
    wanted: str | None, usual: Sequence[str], available: Sequence[str], name: str, option: str, needed: bool = True
) -> str | None:
    sought = usual if wanted is None else (wanted,)
    for column in sought:
        if column in available:
            return column
    if not needed:
        return None
    raise TrainingError(
        f"{name!r} has no column {' or '.join(map(repr, sought))}; its columns: "
        f"{', '.join(map(repr, available)) or 'none'}. Name the right one with {option}."
    )


def _record(row: object, columns: Columns) -> Record:
    """The three cells of a row that is an object."""
    if not isinstance(row, Mapping):
        return f"It is a JSON {type(row).__name__}, not an object."
    assert columns.image is not None and columns.long is not None
    long = row.get(columns.long)
    if columns.long == "conversations":
        # ShareGPT4V: a question, and the caption as its answer.
        try:
            long = long[1]["value"]  # type: ignore[index]
        except (LookupError, TypeError):
            return "Its conversation has no second turn with a value."
    # Where the first row had no short caption, a later one may still have.
    short = next((name for name in SHORT_COLUMNS if name in row), None) if columns.short is None else columns.short
    return row.get(columns.image), long, row.get(short)


def _records(rows: Iterable[tuple[int, object, str]], columns: Columns, name: str) -> Iterator[tuple[int, Record]]:
    """Records of JSON rows, given as number, value, and why there is no value."""
    found: Columns | None = None
    for number, row, trouble in rows:
        if found is None and isinstance(row, Mapping):
            found = columns.found_in(tuple(row), name)
        if trouble or found is None:
            yield number, trouble or f"It is a JSON {type(row).__name__}, not an object."
        else:
            yield number, _record(row, found)


def records_from_jsonl(path: Path, columns: Columns) -> Iterator[tuple[int, Record]]:
    """JSON Lines: one object a line; a line that is none becomes a reason."""

    def rows() -> Iterator[tuple[int, object, str]]:
        for line in lines_from_stream(stream, str(path)):
            if line.error is None and not line.text.strip():
                continue
            try:
                yield line.number, None if line.error else json.loads(line.text), line.error or ""
            except (ValueError, RecursionError) as error:
                yield line.number, None, f"The line is not JSON: {error}."

    with path.open("rb") as stream:
        try:
            yield from _records(rows(), columns, str(path))
        except InputError as error:
            raise TrainingError(str(error)) from error


def records_from_json(path: Path, columns: Columns) -> Iterator[tuple[int, Record]]:
    """A JSON list of objects, such as ShareGPT4V's; an item that is none becomes a reason."""
    with path.open(encoding="utf-8-sig") as stream:
        rows = enumerate(_items_of_json_list(stream, str(path)), 1)
        yield from _records(((number, row, "") for number, row in rows), columns, str(path))


def _items_of_json_list(stream: TextIO, name: str) -> Iterator[object]:
    """The items of a JSON list one by one, because all of them at once do not fit into a small memory."""
    decoder = json.JSONDecoder()
    text, place, more = "", 0, True

    def skip(characters: str) -> str:
        """Goes on to the next character that is not one of these, and returns it; "" at the end."""
        nonlocal text, place, more
        while True:
            while place < len(text) and text[place] in characters:
                place += 1
            if place < len(text):
                return text[place]
            if not more:
                return ""
            text, place = stream.read(_CHARACTERS_AT_ONCE), 0
            more = bool(text)

    if skip(" \t\r\n") != "[":
        raise TrainingError(
            f"{name!r} is no JSON list of rows. Files with one JSON object a line should be named .jsonl."
        )
    place += 1
    while (character := skip(" \t\r\n,")) != "]":
        if not character:
            raise TrainingError(f"{name!r} ends in the middle of its JSON list. Download or write it again.")
        while True:
            try:
                item, stop = decoder.raw_decode(text, place)
                if stop < len(text) or not more:
                    break
            except RecursionError as error:
                raise TrainingError(f"{name!r} is JSON that is nested too deep.") from error
            except ValueError as error:
                if not more or len(text) - place > _MAX_ROW_CHARACTERS:
                    raise TrainingError(f"{name!r} is not valid JSON: {error}. Mend it or write it again.") from error
            # The item may go on behind what was read. Reading as much again keeps the number of attempts small.
            read = stream.read(max(_CHARACTERS_AT_ONCE, len(text) - place))
            text, place, more = text[place:] + read, 0, bool(read)
        yield item
        place = stop


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Numbered rows of a CSV file with a header, or why a row is none.

    Raises:
        TrainingError: It is no CSV file in UTF-8.
    """
    with path.open(encoding="utf-8-sig", newline="") as stream:
        try:
            # Strict: a quote that is opened and not closed would make one cell of all rows behind it.
            reader = csv.DictReader(stream, skipinitialspace=True, strict=True)
            for number, row in enumerate(reader, 1):
                fits = None not in row and None not in row.values()
                yield number, row if fits else "The row has another number of cells than the header."
        except (UnicodeDecodeError, csv.Error) as error:
            raise TrainingError(f"{str(path)!r} is no CSV file in UTF-8: {error}. Save it anew.") from error


def records_from_csv(path: Path, columns: Columns) -> Iterator[tuple[int, Record]]:
    """The rows of a CSV file with a header."""
    rows = ((number, row, row if isinstance(row, str) else "") for number, row in csv_rows(path))
    yield from _records(rows, columns, str(path))


def records_from_parquet(path: Path, columns: Columns) -> Iterator[tuple[int, Record]]:
    """The rows of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            found = columns.found_in(file.schema_arrow.names, str(path))
            wanted = [name for name in (found.image, found.long, found.short) if name is not None]
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _record(row, found)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise TrainingError(f"{str(path)!r} cannot be read as Parquet: {error}.") from error
