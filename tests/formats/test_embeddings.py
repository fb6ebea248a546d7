"""What was changed in an embeddings file after it was written is found, and no row gets another's vector."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pca_files import correlated, write_embeddings

from longclip_rt.errors import OutputError
from longclip_rt.formats.embeddings import load_embeddings
from longclip_rt.search.nearest import search

ROWS, DIM = 6, 8


def column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def vectors_of(table: pa.Table) -> list[list[float]]:
    found: list[list[float]] = table.column("embedding").to_pylist()
    return found


def null_cell(table: pa.Table) -> pa.Table:
    values = [None if row == 2 else vector for row, vector in enumerate(vectors_of(table))]
    return column(table, "embedding", pa.array(values, table.schema.field("embedding").type))


def null_number(table: pa.Table) -> pa.Table:
    values = [[None, *vector[1:]] if row == 2 else vector for row, vector in enumerate(vectors_of(table))]
    return column(table, "embedding", pa.array(values, table.schema.field("embedding").type))


def other_widths(table: pa.Table) -> pa.Table:
    first, second, *rest = vectors_of(table)
    values = [first[:-1], [*second, first[-1]], *rest]  # as many numbers as before
    return column(table, "embedding", pa.array(values, pa.list_(pa.float32())))


def integer_ids(table: pa.Table) -> pa.Table:
    return column(table, "id", pa.array(range(ROWS)))


def null_id(table: pa.Table) -> pa.Table:
    return column(table, "id", pa.array([None, *table.column("id").to_pylist()[1:]], pa.string()))


def no_list(table: pa.Table) -> pa.Table:
    return column(table, "embedding", pa.array(["a vector"] * ROWS))


def a_row_less(table: pa.Table) -> pa.Table:
    return table.slice(1)


def forget_hashes(path: Path) -> None:
    """Makes the metadata those of an older version, which wrote no hashes."""
    meta = path.with_suffix(".meta.json")
    kept = {key: value for key, value in json.loads(meta.read_text()).items() if not key.endswith("sha256")}
    meta.write_text(json.dumps(kept))


def swap_rows(content: bytes) -> bytes:
    """The last two vectors of an array change places."""
    size = DIM * 4
    return content[: -2 * size] + content[-size:] + content[-2 * size : -size]


def swap_lines(content: bytes) -> bytes:
    """The first two lines change places."""
    first, second, *others = content.splitlines(keepends=True)
    return b"".join([second, first, *others])


def another_digit(content: bytes) -> bytes:
    """A number of a vector in JSON has another last digit."""
    place = content.index(b",", content.index(b"embedding") + 13) - 1
    return content[:place] + (b"3" if content[place : place + 1] != b"3" else b"4") + content[place + 1 :]


def another_bit(content: bytes) -> bytes:
    """A number of a vector in Parquet has another last bit."""
    place = content.index(correlated(ROWS, DIM)[2].astype("<f4").tobytes())
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("name", "file", "change"),
    [
        ("e.npy", "e.npy", swap_rows),
        ("e.npy", "e.ids.jsonl", swap_lines),
        ("e.jsonl", "e.jsonl", another_digit),
        ("e.parquet", "e.parquet", another_bit),
    ],
)
def test_bytes_that_were_changed_are_damage(
    name: str, file: str, change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = write_embeddings(tmp_path / name, correlated(ROWS, DIM))
    load_embeddings(path)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(change(content))
    assert (tmp_path / file).read_bytes() != content
    with pytest.raises(OutputError, match=r"is damaged: .*(was changed after it was written|CRC)"):
        load_embeddings(path)


def test_files_of_a_version_without_hashes_are_read(tmp_path: Path) -> None:
    for name in ("e.npy", "e.jsonl"):
        path = write_embeddings(tmp_path / name, correlated(ROWS, DIM))
        forget_hashes(path)
        assert len(load_embeddings(path).ids) == ROWS


CHANGES = [null_cell, null_number, other_widths, integer_ids, null_id, no_list, a_row_less]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_cell_of_a_parquet_file_is_damage(change: Callable[[pa.Table], pa.Table], tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.parquet", correlated(ROWS, DIM))
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(OutputError, match="is damaged"):
        load_embeddings(path)


@pytest.mark.parametrize("field", ["id", "kind", "embedding"])
@pytest.mark.parametrize("value", [None, 7, [1.0]])
def test_a_changed_field_of_a_json_line_is_damage(field: str, value: object, tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.jsonl", correlated(ROWS, DIM))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2][field] = value
    forget_hashes(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(OutputError, match="is damaged"):
        load_embeddings(path)


@pytest.mark.parametrize("shape", [(ROWS, DIM + 1), (ROWS - 1, DIM), (ROWS * DIM,)])
def test_another_array_is_damage(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.npy", correlated(ROWS, DIM))
    np.save(path, np.ones(shape, np.float32))
    with pytest.raises(OutputError, match="is damaged"):
        load_embeddings(path)


def test_another_number_of_rows_is_damage_to_a_search_too(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.jsonl", correlated(ROWS, DIM))
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    forget_hashes(path)
    with pytest.raises(OutputError, match="is damaged: there are 5 rows in place of 6"):
        search(path, np.ones(DIM))


def test_an_id_more_is_damage(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.npy", correlated(ROWS, DIM))
    ids = tmp_path / "e.ids.jsonl"
    ids.write_bytes(b'{"id": "before them all", "kind": "text"}\n' + ids.read_bytes())
    for read in (load_embeddings, lambda path: search(path, np.ones(DIM))):
        with pytest.raises(OutputError, match="is damaged: there are more ids than the 6 vectors"):
            read(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and so on", b"\x93NUMPY"])
def test_what_is_no_array_is_damage(content: bytes, tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.npy", correlated(ROWS, DIM))
    path.write_bytes(content)
    with pytest.raises(OutputError, match="is damaged"):
        load_embeddings(path)


@pytest.mark.parametrize("odd", [str, lambda number: True, lambda number: None, lambda number: [number]])
def test_what_is_no_number_among_numbers_is_damage(odd: Callable[[float], object], tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.jsonl", correlated(ROWS, DIM))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["embedding"][0] = odd(rows[2]["embedding"][0])
    forget_hashes(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(OutputError, match="does not hold numbers alone"):
        load_embeddings(path)


def test_metadata_that_cannot_be_read_are_a_sentence(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.parquet", correlated(ROWS, DIM))
    table = pq.read_table(path)
    for key, value, message in (
        (b"longclip_rt.model", b"\xff", "its metadata are not UTF-8"),
        (b"longclip_rt.rows", b"9" * 15, "more than the memory can hold"),
    ):
        changed = {**table.schema.metadata, key: value}
        pq.write_table(table.replace_schema_metadata(changed), path)
        with pytest.raises(OutputError, match=message):
            load_embeddings(path)
    other = write_embeddings(tmp_path / "e.npy", correlated(ROWS, DIM))
    (tmp_path / "e.meta.json").write_text("[" * 100_000)
    with pytest.raises(OutputError, match=r"'e.meta.json' is not JSON"):
        load_embeddings(other)
