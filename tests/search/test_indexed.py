"""Searches by the indexes of Lance and FAISS, against the exact answer."""

from __future__ import annotations

import sys
from pathlib import Path

import faiss
import lancedb
import numpy as np
import pytest

from longclip_rt.errors import InputError, MissingExtraError, OutputError
from longclip_rt.formats.embeddings import load_embeddings, read_metadata
from longclip_rt.formats.ivf import clusters, probes, subvectors
from longclip_rt.formats.outputs import OutputFiles, table_from_rows, write_output
from longclip_rt.search.indexed import approximate_index, search_index
from longclip_rt.search.nearest import search

DIM, ROWS = 24, 2000
CASES = [(".lance", "ivf-pq"), (".faiss", "hnsw"), (".faiss", "ivf-pq")]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)  # on a busy machine the threads of OpenMP wait for each other in circles


def vectors(rows: int = ROWS, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((20, DIM))
    drawn = centres[rng.integers(0, 20, rows)] + 0.5 * rng.standard_normal((rows, DIM))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def write(path: Path, index: str, given: np.ndarray, dtype: str = "float32") -> Path:
    given = given.astype(dtype)
    tables = []
    for start in range(0, len(given), 700):
        piece = given[start : start + 700]
        kinds = ["image" if row % 3 else "text" for row in range(start, start + len(piece))]
        ids = [f"i{row}" for row in range(start, start + len(piece))]
        tables.append(table_from_rows(ids, kinds, piece, np.zeros(len(piece), np.int32), np.zeros(len(piece), bool)))
    facts = {"fingerprint": "f", "format": path.suffix, "dim": DIM, "rows": len(given), "dtype": dtype}
    metadata = {key: str(value) for key, value in facts.items()}
    files = OutputFiles.from_path(path)
    write_output(path.parent, files, tables, rows=len(given), dim=DIM, dtype=dtype, metadata=metadata, index=index)
    return path


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("stored")
    given = vectors()
    return {case: write(folder / f"{case[1]}{case[0]}", case[1], given) for case in [*CASES, (".parquet", "flat")]}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kinds", [None, ("image",)])
def test_most_of_the_nearest_are_found(
    case: tuple[str, str], kinds: tuple[str, ...] | None, stored: dict[tuple[str, str], Path]
) -> None:
    path, exact = stored[case], stored[".parquet", "flat"]
    metadata = read_metadata(path)
    assert approximate_index(metadata) == case[1] and approximate_index(read_metadata(exact)) == ""
    found = 0
    for query in vectors(10, seed=1):
        expected = search(exact, query, 10, kinds)
        hits = search_index(path, query, 10, kinds, metadata)
        assert [hit.rank for hit in hits] == list(range(1, 11))
        assert all(hit.id == f"i{hit.row}" and hit.kind == ("image" if hit.row % 3 else "text") for hit in hits)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        found += len({hit.row for hit in hits} & {hit.row for hit in expected})
        true = {hit.row: hit.score for hit in expected}
        common = [(hit.score, true[hit.row]) for hit in hits if hit.row in true]
        rough = 0.1 if case == (".faiss", "ivf-pq") else 1e-5  # its scores are those of the codes
        np.testing.assert_allclose(*np.array(common).T, atol=rough)
    assert found >= (95 if case != (".faiss", "ivf-pq") else 60), "of 100"


@pytest.mark.parametrize("case", CASES)
def test_the_vectors_are_there_for_an_exact_answer_but_in_codes(
    case: tuple[str, str], stored: dict[tuple[str, str], Path]
) -> None:
    if case == (".faiss", "ivf-pq"):
        with pytest.raises(OutputError, match="can only be searched"):
            search(stored[case], vectors(1)[0])
        return
    np.testing.assert_array_equal(load_embeddings(stored[case]).vectors, vectors())


@pytest.mark.parametrize("index", ["flat", "hnsw"])
def test_faiss_stores_halves(index: str, tmp_path: Path) -> None:
    path = write(tmp_path / "half.faiss", index, vectors(300), "float16")
    np.testing.assert_array_equal(load_embeddings(path).vectors, vectors(300).astype(np.float16))
    assert path.stat().st_size < 300 * DIM * 2 + (1000 if index == "flat" else 300 * 320)


def test_too_few_rows_for_codes_are_written_flat_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for suffix in (".lance", ".faiss"):
        path = write(tmp_path / f"few{suffix}", "ivf-pq", vectors(255))
        assert approximate_index(read_metadata(path)) == ""
        assert "255 rows are too few for ivf-pq, which takes 256: written as flat" in caplog.text
        np.testing.assert_array_equal(load_embeddings(path).vectors, vectors(255))
        caplog.clear()


def test_lancedb_opens_the_table(stored: dict[tuple[str, str], Path]) -> None:
    path = stored[".lance", "ivf-pq"]
    table = lancedb.connect(path.parent).open_table(path.stem)
    assert table.schema.metadata[b"longclip_rt.index"] == b"ivf-pq" and len(table.list_indices()) == 1
    hits = table.search(vectors()[7]).distance_type("cosine").where("kind = 'image'").limit(1).to_list()
    assert hits[0]["id"] == "i7"


@pytest.mark.parametrize("case", CASES)
def test_bad_queries_and_damage_are_sentences(case: tuple[str, str], tmp_path: Path) -> None:
    path = write(tmp_path / f"e{case[0]}", case[1], vectors(300))
    metadata = read_metadata(path)
    with pytest.raises(InputError, match="k is 0"):
        search_index(path, vectors(1)[0], 0, None, metadata)
    with pytest.raises(InputError, match="The query has 3 values"):
        search_index(path, np.ones(3), 1, None, metadata)
    assert search_index(path, vectors(1)[0], 1, ("sound",), metadata) == []
    files = sorted((path / "_indices").rglob("*.idx")) if path.is_dir() else [path]
    for file in files:
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(OutputError, match="is damaged"):
        search_index(path, vectors(1)[0], 1, None, metadata)


def test_ids_of_another_index_are_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "e.faiss", "hnsw", vectors(300))
    ids = tmp_path / "e.ids.jsonl"
    ids.write_bytes(b"".join(ids.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(OutputError, match=r"'e\.ids\.jsonl' lacks rows"):
        search_index(path, vectors(1)[0], 200, None, read_metadata(path))
    ids.unlink()
    with pytest.raises(OutputError, match=r"e\.ids\.jsonl' cannot be read: No such file"):
        search_index(path, vectors(1)[0], 3, None, read_metadata(path))


@pytest.mark.parametrize(("suffix", "module"), [(".lance", "lance"), (".faiss", "faiss")])
def test_the_extra_is_named(suffix: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"longclip-rt\[{module}\]"):
        write(tmp_path / f"e{suffix}", "flat", vectors(3))


def test_sizes_of_an_index() -> None:
    assert [clusters(rows) for rows in (1, 256, 2000, 1_000_000)] == [1, 6, 51, 4000]
    assert [probes(count) for count in (1, 51, 4000)] == [1, 16, 400]
    assert [subvectors(dim) for dim in (512, 30, 7)] == [128, 15, 7]
