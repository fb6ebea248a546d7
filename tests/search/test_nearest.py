from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from longclip_rt.commands.search import search as command
from longclip_rt.errors import BundleError, InputError, OutputError
from longclip_rt.formats.embeddings import Embeddings
from longclip_rt.formats.outputs import FORMATS, OutputFiles, table_from_rows, write_output
from longclip_rt.search.hits import Hit
from longclip_rt.search.nearest import kind_of_query, search, search_query

PHOTO = Path(__file__).parents[2] / "examples" / "photos" / "coffee.jpg"
BUNDLE = "ab12" * 16
DIM = 8


def write(
    path: Path, vectors: np.ndarray, ids: list[str] | None = None, kinds: list[str] | None = None, **metadata: str
) -> Path:
    rows = len(vectors)
    ids = [f"photo{row}.jpg" for row in range(rows)] if ids is None else ids
    kinds = ["text" if id_.endswith(".txt") else "image" for id_ in ids] if kinds is None else kinds
    tables = [table_from_rows(ids, kinds, vectors, np.full(rows, 5, np.int32), np.zeros(rows, bool))]
    facts = {"fingerprint": "f", "dim": str(vectors.shape[1]), "rows": str(rows), "dtype": str(vectors.dtype)}
    facts["format"] = path.suffix
    facts |= {"bundle": BUNDLE, "model": "ViT-B-16", "trained": "true", **metadata}
    write_output(
        path.parent,
        OutputFiles.from_path(path),
        tables if rows else [],
        rows=rows,
        dim=vectors.shape[1],
        dtype=str(vectors.dtype),
        metadata=facts,
        index=facts.pop("index", "flat"),
    )
    return path


def unit_vectors(rows: int, dim: int = DIM, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_hits_are_the_largest_cosines(tmp_path: Path, suffix: str, chunk_rows: int) -> None:
    vectors = unit_vectors(50)
    query = unit_vectors(1, seed=1)[0]
    path = write(tmp_path / f"e{suffix}", vectors)
    expected = vectors.astype(np.float64) @ query
    hits = search(path, query, 6, chunk_rows=chunk_rows)
    assert [hit.row for hit in hits] == np.argsort(-expected)[:6].tolist()
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5, 6]
    assert [hit.id for hit in hits] == [f"photo{hit.row}.jpg" for hit in hits]
    assert {hit.kind for hit in hits} == {"image"}
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(expected)[::-1][:6], atol=1e-6)


@pytest.mark.parametrize("chunk_rows", [1, 7, 100, 1000])
@pytest.mark.parametrize("dim", [1, 7, 512])
def test_equal_vectors_score_equal_and_keep_the_files_order(tmp_path: Path, chunk_rows: int, dim: int) -> None:
    base = unit_vectors(3, dim, seed=2)
    choice = np.random.default_rng(3).integers(0, 3, 300)
    query = unit_vectors(1, dim, seed=4)[0]
    path = write(tmp_path / "e.parquet", base[choice])
    scores = (base.astype(np.float64) @ query).astype(np.float32)
    expected = sorted(range(300), key=lambda row: (-scores[choice[row]], row))
    for k in (1, 20, 130, 300):
        assert [hit.row for hit in search(path, query, k, chunk_rows=chunk_rows)] == expected[:k]


def test_k_larger_than_the_file_gives_all_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "e.parquet", unit_vectors(3))
    assert sorted(hit.row for hit in search(path, unit_vectors(1)[0], 1000)) == [0, 1, 2]


def test_k_below_one_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "e.parquet", unit_vectors(3))
    with pytest.raises(InputError, match="at least 1"):
        search(path, unit_vectors(1)[0], 0)


def test_a_file_without_rows_has_no_hits(tmp_path: Path) -> None:
    assert search(write(tmp_path / "e.parquet", unit_vectors(0)), unit_vectors(1)[0], 3) == []


def test_kinds_choose_rows_and_keep_their_numbers(tmp_path: Path) -> None:
    vectors = np.tile(unit_vectors(1), (4, 1))
    path = write(tmp_path / "e.parquet", vectors, ids=["a.jpg", "a.txt", "b.jpg", "b.txt"])
    assert [(hit.id, hit.row) for hit in search(path, vectors[0], 4, {"text"})] == [("a.txt", 1), ("b.txt", 3)]
    assert [hit.id for hit in search(path, vectors[0], 4, ("image",), chunk_rows=1)] == ["a.jpg", "b.jpg"]
    assert search(path, vectors[0], 4, []) == []


def test_float16_and_vectors_of_any_length_give_cosines(tmp_path: Path) -> None:
    vectors = unit_vectors(20, 64, dtype=np.float16)
    query = unit_vectors(1, 64, seed=1)[0]
    exact = vectors.astype(np.float64)
    expected = np.sort(exact @ query / np.linalg.norm(exact, axis=1) / np.linalg.norm(query.astype(np.float64)))[::-1]
    half = search(write(tmp_path / "half.parquet", vectors), query, 20)
    long = search(write(tmp_path / "long.parquet", 3 * vectors.astype(np.float32)), 100 * query, 20)
    np.testing.assert_allclose([hit.score for hit in half], expected, atol=1e-7)
    np.testing.assert_allclose([hit.score for hit in long], expected, atol=1e-7)
    assert [hit.row for hit in half] == [hit.row for hit in long]


def test_a_zero_vector_scores_zero_and_one_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    vectors = unit_vectors(4)
    vectors[2] = 0
    path = write(tmp_path / "zero.parquet", vectors)
    assert next(hit.score for hit in search(path, vectors[0], 4) if hit.row == 2) == 0.0
    vectors[3, 1] = np.nan
    with pytest.raises(OutputError, match=r"Row 3 of .*nan\.parquet"):
        search(write(tmp_path / "nan.parquet", vectors), vectors[0], 4, chunk_rows=2)


@pytest.mark.parametrize("query", [np.zeros(DIM), np.full(DIM, np.nan), np.ones((1, DIM)), np.ones(DIM + 1)])
def test_a_query_that_does_not_fit_is_refused(tmp_path: Path, query: np.ndarray) -> None:
    path = write(tmp_path / "e.parquet", unit_vectors(3))
    with pytest.raises(InputError, match=r"one finite vector|9 values .* have 8"):
        search(path, query, 1)


def test_no_more_than_two_chunks_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Embeddings] = weakref.WeakSet()
    most = 0

    def chunks(path: Path, chunk_rows: int) -> Iterator[Embeddings]:
        nonlocal most
        for number in range(50):
            chunk = Embeddings(["i"] * chunk_rows, ["image"] * chunk_rows, unit_vectors(chunk_rows, seed=number), {})
            alive.add(chunk)
            most = max(most, len(alive))
            yield chunk

    monkeypatch.setattr(Embeddings, "__hash__", object.__hash__)
    monkeypatch.setattr("longclip_rt.formats.embeddings.iter_embeddings", chunks)
    assert len(search(tmp_path, unit_vectors(1)[0], 9, chunk_rows=10)) == 9
    assert 1 <= most <= 2


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    rows, dim, shards = 1000, 256, 30
    vectors = unit_vectors(rows, dim)
    ids = [f"{row}.jpg" for row in range(rows)]
    shard = table_from_rows(ids, ["image"] * rows, vectors, np.zeros(rows, np.int32), np.zeros(rows, bool))
    path = tmp_path / "large.parquet"
    facts = {"fingerprint": "f", "dim": str(dim), "rows": str(rows * shards), "dtype": "float32"}
    files = OutputFiles.from_path(path)
    write_output(tmp_path, files, [shard] * shards, rows=rows * shards, dim=dim, dtype="float32", metadata=facts)
    most = 0

    class Watch(list[str]):
        """Kinds that note how much memory Arrow holds whenever a row is looked at."""

        def __contains__(self, kind: object) -> bool:
            nonlocal most
            most = max(most, pa.total_allocated_bytes())
            return True

    before = pa.total_allocated_bytes()
    assert len(search(path, vectors[0], 3, Watch(), chunk_rows=500)) == 3
    assert 0 < most - before < path.stat().st_size / 4


class FakeEmbedder:
    """Puts a text on the axis of its first letter and an image on that of its file name."""

    loaded: list[tuple[Any, str, str]]
    closed = 0
    bundle = BUNDLE

    def __init__(self) -> None:
        self.tokenizer = SimpleNamespace(encode=lambda texts: [self._tokens(text) for text in texts])

    @staticmethod
    def _tokens(text: str) -> Any:
        words = text.split()
        return SimpleNamespace(
            ids=np.array([ord(text.strip()[0])], np.int32), length=len(words) + 2, truncated=len(words) > 246
        )

    def close(self) -> None:
        type(self).closed += 1

    @classmethod
    def from_bundle(cls, path: Any, backend: str = "auto", precision: str = "auto") -> FakeEmbedder:
        cls.loaded.append((path, backend, precision))
        return cls()

    def describe(self) -> dict[str, str]:
        return {"bundle": self.bundle, "model": "ViT-B-16", "backend": "openvino", "precision": "bf16"}

    def encode_tokens(self, ids: np.ndarray) -> np.ndarray:
        return np.eye(DIM, dtype=np.float32)[(ids[:, 0] - ord("a")) % DIM]

    def embed_images(self, images: list[Any]) -> np.ndarray:
        return np.eye(DIM, dtype=np.float32)[[(ord(Path(image).name[0]) - ord("a")) % DIM for image in images]]


@pytest.fixture
def embedder(monkeypatch: pytest.MonkeyPatch) -> type[FakeEmbedder]:
    FakeEmbedder.loaded, FakeEmbedder.closed = [], 0
    monkeypatch.setattr(FakeEmbedder, "bundle", BUNDLE)
    monkeypatch.setitem(sys.modules, "longclip_rt.runtime", SimpleNamespace(Embedder=FakeEmbedder))
    known = {BUNDLE: Path("/bundles/b16")}
    monkeypatch.setitem(sys.modules, "longclip_rt.bundle.bundle", SimpleNamespace(find_bundle=known.get))
    return FakeEmbedder


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """One row for each of the letters a to h, images and captions in turn."""
    ids = [f"{letter}.{'jpg' if index % 2 == 0 else 'txt'}" for index, letter in enumerate("abcdefgh")]
    return write(tmp_path / "stored.parquet", np.eye(DIM, dtype=np.float32), ids=ids)


def test_a_text_query_is_embedded_by_the_files_own_model(stored: Path, embedder: type[FakeEmbedder]) -> None:
    answer = search_query(stored, "dogs on a beach", 3, backend="torch", precision="fp32")
    assert answer.query_kind == "text"
    assert answer.hits[0] == Hit(1, 1.0, "d.txt", "text", 3)
    assert [hit.row for hit in answer.hits[1:]] == [0, 1]
    assert (answer.tokens, answer.truncated, answer.trained) == (6, False, True)
    assert answer.embedder["backend"] == "openvino"
    assert embedder.loaded == [(Path("/bundles/b16"), "torch", "fp32")] and embedder.closed == 1


def test_an_image_query_is_recognised_and_can_be_forced(stored: Path, embedder: type[FakeEmbedder]) -> None:
    assert search_query(stored, str(PHOTO), 1).hits[0].id == "c.jpg"
    assert search_query(stored, str(PHOTO), 1).query_kind == "image"
    assert search_query(stored, "gone.jpg", 1).query_kind == "text"
    forced = search_query(stored, "e" + str(PHOTO), 1, query_kind="image")
    assert (forced.query_kind, forced.tokens) == ("image", 0)
    assert search_query(stored, str(PHOTO), 1, query_kind="text").query_kind == "text"


@pytest.mark.parametrize("query", ["a dog", "notes.txt", "missing.png", "x" * 5000 + ".jpg", "nul\0.jpg", ".", ""])
def test_what_is_no_existing_image_is_a_text(query: str) -> None:
    assert kind_of_query(query) == "text"


def test_an_existing_image_is_one_whatever_its_case(tmp_path: Path) -> None:
    (tmp_path / "A.JPEG").touch()
    (tmp_path / "folder.png").mkdir()
    assert kind_of_query(str(tmp_path / "A.JPEG")) == "image"
    assert kind_of_query(str(tmp_path / "folder.png")) == "text"


def test_an_unknown_model_is_an_error_that_names_it(tmp_path: Path, embedder: type[FakeEmbedder]) -> None:
    path = write(tmp_path / "e.parquet", unit_vectors(2), bundle="cd34" * 16)
    with pytest.raises(BundleError, match=r"cd34cd34cd34 \(ViT-B-16\).*--bundle"):
        search_query(path, "a dog")
    assert embedder.loaded == []


def test_another_model_is_an_error(stored: Path, embedder: type[FakeEmbedder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedder, "bundle", "ef56" * 16)
    with pytest.raises(BundleError, match=r"ab12ab12ab12 .* other is ef56ef56ef56.*cannot be compared"):
        search_query(stored, "a dog", bundle="other")


def test_a_file_that_names_no_model_is_an_error(tmp_path: Path, embedder: type[FakeEmbedder]) -> None:
    with pytest.raises(BundleError, match="does not say which model"):
        search_query(write(tmp_path / "e.parquet", unit_vectors(2), bundle=""), "a dog", bundle="any")


def test_an_empty_text_is_refused_before_a_model_is_loaded(stored: Path, embedder: type[FakeEmbedder]) -> None:
    with pytest.raises(InputError, match="query is empty"):
        search_query(stored, " \n")
    assert embedder.loaded == []


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_command_prints_a_table(stored: Path, embedder: type[FakeEmbedder]) -> None:
    result = run(stored, "dogs", "-k", "2")
    assert result.exit_code == 0
    assert result.stdout == "rank    score  kind   id\n   1   1.0000  text   d.txt\n   2   0.0000  image  a.jpg\n"
    assert result.stderr == ""


def test_command_prints_json_lines(stored: Path, embedder: type[FakeEmbedder]) -> None:
    result = run(stored, "dogs", "-k", "2", "--json", "--kind", "image")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows == [
        {"rank": 1, "score": 0.0, "id": "a.jpg", "kind": "image", "row": 0},
        {"rank": 2, "score": 0.0, "id": "c.jpg", "kind": "image", "row": 2},
    ]


def test_command_passes_its_options_on(stored: Path, embedder: type[FakeEmbedder]) -> None:
    assert run(stored, "x", "--bundle", "b", "--backend", "torch", "--precision", "fp16").exit_code == 0
    assert embedder.loaded == [(Path("b"), "torch", "fp16")]
    assert "c.jpg" in run(stored, PHOTO, "-k", "1").stdout
    assert "c.jpg" not in run(stored, PHOTO, "-k", "1", "--text").stdout
    assert "e.txt" not in run(stored, "gone.jpg", "-k", "1", "--image").stdout


def test_command_says_what_to_mistrust_on_stderr(tmp_path: Path, embedder: type[FakeEmbedder]) -> None:
    path = write(tmp_path / "e.parquet", unit_vectors(2), trained="false")
    result = run(path, "word " * 300, "--json")
    assert "untrained" in result.stderr
    assert "302 tokens" in result.stderr
    assert len([json.loads(line) for line in result.stdout.splitlines()]) == 2
    nothing = run(path, "a dog", "--kind", "text")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "nothing of that kind" in nothing.stderr


def test_command_writes_a_page(stored: Path, embedder: type[FakeEmbedder], tmp_path: Path) -> None:
    result = run(stored, "dogs", "--html", tmp_path / "page.html")
    assert result.exit_code == 0
    assert "page.html" in result.stderr
    assert "d.txt" in (tmp_path / "page.html").read_text("utf-8")


@pytest.mark.parametrize(
    "arguments", [["-k", "0"], ["-k", "many"], ["--kind", "sound"], ["--html", "photo.jpg"], ["--backend", "abacus"]]
)
def test_command_refuses_wrong_usage(stored: Path, embedder: type[FakeEmbedder], arguments: list[str]) -> None:
    assert run(stored, "dogs", *arguments).exit_code == 2


def test_command_lets_typed_errors_through(tmp_path: Path, embedder: type[FakeEmbedder]) -> None:
    result = run(tmp_path / "gone.parquet", "dogs")
    assert isinstance(result.exception, OutputError)
    assert "gone.parquet" in str(result.exception)


def test_ids_cannot_steer_the_terminal_or_break_the_table(tmp_path: Path, embedder: type[FakeEmbedder]) -> None:
    ids = ["a\x1b[2Jred\nline\ttab", "b" * 500]
    path = write(tmp_path / "e.parquet", np.eye(2, DIM, dtype=np.float32), ids=ids, kinds=["text", "text"])
    lines = run(path, "a").stdout.splitlines()
    assert len(lines) == 3
    assert lines[1].endswith("a [2Jred line tab")
    assert lines[2].endswith("b" * 500)


def test_help_has_examples_and_loads_nothing_heavy() -> None:
    assert "Examples:" in run("--help").stdout
    heavy = "import sys, longclip_rt.commands.search; print(*{'numpy', 'pyarrow', 'PIL', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(("suffix", "index"), [(".lance", "flat"), (".faiss", "flat"), (".faiss", "hnsw")])
def test_command_says_whether_the_answer_is_exact(
    tmp_path: Path, suffix: str, index: str, embedder: type[FakeEmbedder]
) -> None:
    path = write(tmp_path / f"e{suffix}", np.eye(4, DIM, dtype=np.float32), index=index)
    result, exact = run(path, "dogs", "--html", tmp_path / "page.html"), run(path, "dogs", "--exact")
    assert "Exact: compared with every vector." in exact.stderr
    assert result.stdout == exact.stdout
    told = "Exact:" if index == "flat" else f"Approximate: found by the {index} index"
    assert told in result.stderr
    assert ("approximate, by the hnsw index" in (tmp_path / "page.html").read_text("utf-8")) == (index == "hnsw")
