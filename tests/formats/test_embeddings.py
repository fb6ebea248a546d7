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


@pytest.mark.parametrize("change", [null_cell, null_number, other_widths, integer_ids, null_id])
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
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(OutputError, match="is damaged"):
        load_embeddings(path)


@pytest.mark.parametrize("shape", [(ROWS, DIM + 1), (ROWS - 1, DIM), (ROWS * DIM,)])
def test_another_array_is_damage(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.npy", correlated(ROWS, DIM))
    np.save(path, np.ones(shape, np.float32))
    with pytest.raises(OutputError, match=r"is damaged|rows and not the"):
        load_embeddings(path)
