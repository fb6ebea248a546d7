"""One column of a `.jsonl` or `.parquet` file as entries."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from longclip_rt.embedding.inputs.entries import CLIPPED, Entry, Line, Reading
from longclip_rt.errors import InputError

logger = logging.getLogger("longclip_rt")

TEXT_COLUMNS = ("text", "caption")
PATH_COLUMNS = ("image", "path")
_ROWS_AT_ONCE = 1024


def choose_column(available: Sequence[str], reading: Reading) -> str:
    """The column to read: the one asked for, else the first of the usual names that is there.

    Raises:
        InputError: When it is not there; the message lists what is.
    """
    usual = TEXT_COLUMNS if reading.texts else PATH_COLUMNS
    wanted = usual if reading.column is None else (reading.column,)
    for name in wanted:
        if name in available:
            reading.tally.columns[reading.name] = name
            return name
    present = ", ".join(repr(name) for name in available) or "none"
    other = PATH_COLUMNS if reading.texts else TEXT_COLUMNS
    if reading.column is None and any(name in available for name in other):
        advice = "Drop --texts to read paths" if reading.texts else "Add --texts to embed the texts themselves"
        advice += ", or name a column with --column"
    else:
        advice = "Name one of them with --column"
    sought = " or ".join(repr(name) for name in wanted)
    raise InputError(f"{reading.name!r} has no column {sought}; its columns: {present}. {advice}.")


def entries_from_jsonl(lines: Iterable[Line], reading: Reading) -> Iterator[Entry]:
    """Entries of a JSON Lines file; a line that is not an object with the column as a string becomes a reject.

    Raises:
        InputError: When the first object has no column that could be meant.
    """
    column: str | None = None
    for line in lines:
        if line.error is None and not line.text.strip():
            reading.tally.empty += 1
            continue
        row, error = (None, line.error) if line.error is not None else _object_from_json(line.text)
        if row is None:
            yield reading.reject(line.text[:CLIPPED], line.number, error or "")
            continue
        if column is None:
            column = choose_column(tuple(row), reading)
        value = row.get(column)
        if isinstance(value, str):
            yield reading.entry(value, line.number)
        else:
            found = "is missing" if column not in row else f"is {type(value).__name__}, not a string"
            yield reading.reject(line.text[:CLIPPED], line.number, f"{column!r} {found}.")


def _object_from_json(text: str) -> tuple[dict[str, object] | None, str | None]:
    """The JSON object of a line, or why there is none."""
    try:
        row = json.loads(text)
    except ValueError as error:
        return None, f"The line is not JSON: {error}."
    except RecursionError:
        return None, "The line is JSON that is nested too deep."
    if not isinstance(row, dict):
        return None, f"The line is JSON of type {type(row).__name__}, not an object."
    return row, None


def entries_from_parquet(path: Path, reading: Reading) -> Iterator[Entry]:
    """Entries of a Parquet file's column of strings; a null or a cell that is not UTF-8 becomes a reject.

    Raises:
        InputError: When the file is no Parquet, or has no such column of strings.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as table:
            column = choose_column(table.schema_arrow.names, reading)
            if table.schema_arrow.names.count(column) > 1:
                raise InputError(f"{reading.name!r} has several columns {column!r}. Rename all but one.")
            kind = table.schema_arrow.field(column).type
            value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if value_kind not in (pa.string(), pa.large_string(), pa.string_view()):
                raise InputError(f"column {column!r} of {reading.name!r} holds {kind}; a column of strings is needed.")
            line = 0
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[column]):
                for value in _strings(batch.column(column)):  # by name: "a.b" also selects b of a
                    line += 1
                    if isinstance(value, str):
                        yield reading.entry(value, line)
                    else:
                        yield reading.reject("", line, f"The cell is {'null' if value is None else 'not valid UTF-8'}.")
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # Arrow says of damaged pages too that they are an OSError, but without a number
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"{reading.name!r} cannot be read as Parquet: {reason}.") from error


def _strings(column: Any) -> Iterator[str | UnicodeDecodeError | None]:
    """The cells of an Arrow array of strings; an error stands for one that is not UTF-8, which Arrow does not check."""
    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:
        for cell in column:
            try:
                yield cell.as_py()
            except UnicodeDecodeError as error:
                yield error
