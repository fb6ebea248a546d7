from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longclip_rt.errors import OutputError
from longclip_rt.formats.outputs import (
    FORMATS,
    OutputFiles,
    iter_embeddings,
    json_line,
    load_embeddings,
    read_metadata,
    table_from_rows,
    write_output,
)
from longclip_rt.system.files import output_errors, whole_file

DIM = 5


def make_tables(dtype: str, counts: list[int]) -> tuple[list[pa.Table], np.ndarray]:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((sum(counts), DIM)).astype(dtype)
    # Numbers whose shortest decimal form is long, tiny, or huge.
    vectors[0] = np.array([1 / 3, 1e-7, -0.0, 6e4, np.finfo(dtype).tiny], dtype)
    tables = []
    start = 0
    for count in counts:
        rows = range(start, start + count)
        tables.append(
            table_from_rows(
                [f'row {row} "ü",\n\u2028' for row in rows],
                ["image" if row % 3 else "text" for row in rows],
                vectors[start : start + count],
                np.arange(start, start + count, dtype=np.int32),
                np.array([row % 2 == 0 for row in rows], bool),
            )
        )
        start += count
    return tables, vectors


def make_output(path: Path, dtype: str = "float32", counts: tuple[int, ...] = (3, 0, 4), **metadata: str) -> np.ndarray:
    tables, vectors = make_tables(dtype, list(counts))
    rows = sum(counts)
    metadata = {
        "fingerprint": "f",
        "format": path.suffix,
        "dim": str(DIM),
        "dtype": dtype,
        "rows": str(rows),
        "model": "ü",
        **metadata,
    }
    write_output(path.parent, OutputFiles.from_path(path), tables, rows=rows, dim=DIM, dtype=dtype, metadata=metadata)
    return vectors


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_brings_rows_back_exactly(tmp_path, suffix, dtype):
    path = tmp_path / f"out{suffix}"
    vectors = make_output(path, dtype)
    loaded = load_embeddings(path)
    assert loaded.vectors.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(loaded.vectors, vectors)
    assert loaded.ids == [f'row {row} "ü",\n\u2028' for row in range(7)]
    assert loaded.kinds == ["text", "image", "image", "text", "image", "image", "text"]
    assert loaded.metadata == read_metadata(path)
    assert loaded.metadata["longclip_rt.model"] == "ü"


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("suffix", FORMATS)
def test_chunks_are_bounded_and_in_order(tmp_path, suffix, chunk_rows):
    path = tmp_path / f"out{suffix}"
    vectors = make_output(path)
    chunks = list(iter_embeddings(path, chunk_rows))
    assert all(1 <= len(chunk.ids) == len(chunk.kinds) == len(chunk.vectors) <= chunk_rows for chunk in chunks)
    np.testing.assert_array_equal(np.concatenate([chunk.vectors for chunk in chunks]), vectors)


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_output_without_rows_is_still_one(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    tables, _ = make_tables("float32", [1])
    metadata = {"fingerprint": "f", "format": suffix, "dim": str(DIM), "dtype": "float32", "rows": "0"}
    files = OutputFiles.from_path(path)
    write_output(tmp_path, files, [tables[0].slice(0, 0)], rows=0, dim=DIM, dtype="float32", metadata=metadata)
    assert load_embeddings(path).vectors.shape == (0, DIM)
    assert list(iter_embeddings(path)) == []


def test_parquet_columns(tmp_path):
    make_output(tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["id", "kind", "embedding", "tokens", "truncated"]
    assert table.schema.field("embedding").type == pa.list_(pa.field("element", pa.float32()), DIM)
    assert table.schema.field("tokens").type == pa.int32()
    # A text has tokens, an image has none.
    assert table["tokens"].to_pylist() == [0, None, None, 3, None, None, 6]
    assert table["truncated"].to_pylist() == [True, None, None, False, None, None, True]
    # One row group for each shard that has rows.
    assert pq.read_metadata(tmp_path / "out.parquet").num_row_groups == 2


def test_npy_is_plain_numpy_with_the_other_columns_beside_it(tmp_path):
    vectors = make_output(tmp_path / "out.npy", "float16")
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), vectors)
    rows = [json.loads(line) for line in (tmp_path / "out.ids.jsonl").read_bytes().splitlines()]
    assert rows[:2] == [
        {"id": 'row 0 "ü",\n\u2028', "kind": "text", "tokens": 0, "truncated": True},
        {"id": 'row 1 "ü",\n\u2028', "kind": "image", "tokens": None, "truncated": None},
    ]


def test_equal_rows_give_equal_bytes(tmp_path):
    for suffix in set(FORMATS) - {".lance"}:  # which names its files at random
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir(exist_ok=True)
            make_output(tmp_path / folder / f"out{suffix}")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_the_names_that_belong_to_an_output():
    files = OutputFiles.from_path(Path("x/a.b.npy"))
    assert files.all == tuple(
        Path("x") / name for name in ("a.b.ids.jsonl", "a.b.meta.json", "a.b.npy.rejects.jsonl", "a.b.npy")
    )
    assert OutputFiles.from_path(Path("a.parquet")).all == (Path("a.parquet.rejects.jsonl"), Path("a.parquet"))
    with pytest.raises(OutputError, match=r"ends with '.csv'. The output is .parquet, .npy, .jsonl, .lance or .faiss"):
        OutputFiles.from_path(Path("a.csv"))


def test_json_lines_hold_what_utf8_cannot():
    assert json.loads(json_line({"id": "caf\udce9"})) == {"id": "caf\udce9"}


def test_files_of_others_are_refused(tmp_path):
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "foreign.parquet")
    np.save(tmp_path / "foreign.npy", np.zeros((2, DIM)))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "list.meta.json").write_text("[]")
    (tmp_path / "list.jsonl").write_text("{}\n")
    (tmp_path / "broken.meta.json").write_text("{")
    (tmp_path / "broken.jsonl").write_text("{}\n")
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "empty.lance").mkdir()
    for name, message in [
        ("foreign.parquet", "does not carry the metadata"),
        ("foreign.npy", "'foreign.meta.json' is not beside it"),
        ("bad.parquet", "cannot be read as Parquet"),
        ("list.jsonl", "belongs to another file"),
        ("broken.jsonl", "is not JSON"),
        ("table.csv", "should end with"),
        ("absent.parquet", "cannot be read: No such file"),
        ("absent.npy", "cannot be read: No such file"),
        ("empty.lance", "cannot be read as a Lance table"),
    ]:
        for read in (load_embeddings, read_metadata, lambda path: next(iter_embeddings(path))):
            with pytest.raises(OutputError, match=message):
                read(tmp_path / name)


def test_the_metadata_of_another_format_is_not_taken(tmp_path):
    make_output(tmp_path / "out.npy")
    (tmp_path / "out.jsonl").write_text("{}\n")
    with pytest.raises(OutputError, match="belongs to another file"):
        read_metadata(tmp_path / "out.jsonl")


def test_damage_is_a_sentence(tmp_path):
    for suffix in FORMATS:
        make_output(tmp_path / f"{suffix[1:]}{suffix}", counts=(300, 300))
    parquet = tmp_path / "parquet.parquet"
    content = bytearray(parquet.read_bytes())
    content[4:2000] = b"\xff" * 1996
    parquet.write_bytes(content)
    ids = tmp_path / "npy.ids.jsonl"
    ids.write_bytes(ids.read_bytes()[:2000])
    jsonl = tmp_path / "jsonl.jsonl"
    jsonl.write_bytes(jsonl.read_bytes()[:2000])
    for data in (tmp_path / "lance.lance" / "data").iterdir():
        data.write_bytes(data.read_bytes()[:500])
    index = tmp_path / "faiss.faiss"
    index.write_bytes(index.read_bytes()[:-40] + bytes(40))
    for suffix in FORMATS:
        name = f"{suffix[1:]}{suffix}"
        with pytest.raises(OutputError, match=r"is damaged|cannot be read"):
            load_embeddings(tmp_path / name)


def test_rows_that_were_lost_are_noticed(tmp_path):
    make_output(tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    changed = "was changed after it was written"
    for kept, message in ((lines[:-1], changed), (lines + lines[:1], "more rows than the 7")):
        (tmp_path / "out.jsonl").write_bytes(b"".join(kept))
        with pytest.raises(OutputError, match=message):
            load_embeddings(tmp_path / "out.jsonl")


def test_metadata_without_a_shape_is_refused(tmp_path):
    make_output(tmp_path / "out.parquet", rows="many")
    with pytest.raises(OutputError, match="metadata is incomplete"):
        load_embeddings(tmp_path / "out.parquet")


def test_a_whole_file_replaces_the_old_one_or_leaves_it(tmp_path):
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(target) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old"
    with whole_file(target) as stream:
        stream.write(b"new")
    assert target.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("number", "message"),
    [(28, "No space .* goes on"), (30, "may write to"), (2, "Make the folder"), (5, "another place")],
)
def test_every_refusal_of_the_disk_has_a_remedy(number, message):
    with pytest.raises(OutputError, match=message), output_errors(Path("folder/out.parquet")):
        import os

        raise OSError(number, os.strerror(number))
