from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fake_embedder import FakeEmbedder

from longclip_rt.commands.embed import embed
from longclip_rt.errors import InputError, OutputError
from longclip_rt.formats.outputs import load_embeddings


@pytest.fixture(autouse=True)
def loaded(tmp_path, monkeypatch) -> Iterator[list[tuple]]:
    """A folder with texts, and a runtime that makes fake embedders; returns what was asked of it."""
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("a red cup\n\na blue cup of coffee\n")
    Path("files.txt").write_text("# one is absent\ntexts.txt\nabsent.jpg\n")
    calls: list[tuple] = []
    made: list[FakeEmbedder] = []

    def from_bundle(path=None, backend="auto", precision="auto", pca=None, pca_mode="project", devices=None):
        calls.append((path, backend, precision, pca, pca_mode, devices))
        made.append(FakeEmbedder())
        return made[-1]

    runtime = types.ModuleType("longclip_rt.runtime")
    runtime.Embedder = types.SimpleNamespace(from_bundle=from_bundle)
    monkeypatch.setitem(sys.modules, "longclip_rt.runtime", runtime)
    yield calls
    assert all(embedder.closed for embedder in made)


def run(*arguments: str, **options) -> Result:
    return CliRunner().invoke(embed, arguments, catch_exceptions=False, **options)


def test_stdout_is_the_name_of_the_output_and_nothing_else():
    result = run("texts.txt", "--texts")
    assert (result.exit_code, result.stdout) == (0, "texts.parquet\n")
    assert load_embeddings("texts.parquet").ids == ["a red cup", "a blue cup of coffee"]
    assert "texts.parquet: 2 rows, 0 images and 2 texts, 0 of them truncated." in result.stderr
    assert "Skipped: 1 empty line." in result.stderr
    assert "a second." in result.stderr
    assert "%|" not in result.stderr  # No bar: this is no terminal, and it took less than two seconds.


def test_rejects_make_the_status_one_unless_they_are_allowed():
    result = run("files.txt")
    assert (result.exit_code, result.stdout) == (1, "files.parquet\n")
    assert "1 reject, listed in files.parquet.rejects.jsonl." in result.stderr
    assert "Skipped: 1 comment." in result.stderr
    # The same when it is complete already.
    again = run("files.txt")
    assert again.exit_code == 1
    assert "1 reject, listed in" in again.stderr
    assert "Nothing was left to embed." in again.stderr
    assert run("files.txt", "--allow-rejects").exit_code == 0


def test_options_reach_the_embedder_and_the_pipeline(loaded):
    result = run(
        *("texts.txt", "--texts", "-o", "out.npy", "--bundle", "model", "--backend", "openvino", "--precision", "bf16"),
        *("--devices", "1,0", "--pca", "bundle", "--pca-mode", "reconstruct"),
        *("--batch-size", "1", "--workers", "1", "--no-truncate", "--dtype", "float16", "--shard-size", "1"),
    )
    assert result.exit_code == 0
    assert loaded == [(Path("model"), "openvino", "bf16", "bundle", "reconstruct", (1, 0))]
    metadata = load_embeddings("out.npy").metadata
    expected = {"dtype": "float16", "truncate": "false", "batch_size": "1", "shard_size": "1"}
    assert {key: metadata["longclip_rt." + key] for key in expected} == expected


def test_columns_are_named_on_stderr():
    Path("t.jsonl").write_text('{"caption": "a red cup"}\n')
    assert "Reading column 'caption' of t.jsonl." in run("t.jsonl", "--texts").stderr


def test_standard_input(loaded):
    result = run("-", "--texts", input="one\ntwo\n")
    assert (result.exit_code, result.stdout) == (0, "embeddings.parquet\n")
    assert load_embeddings("embeddings.parquet").ids == ["one", "two"]


def test_quiet_says_nothing():
    result = run("texts.txt", "--texts", "--quiet")
    assert (result.stdout, result.stderr) == ("texts.parquet\n", "")


def test_existing_outputs_and_begun_work():
    Path("texts.parquet").write_text("precious")
    with pytest.raises(OutputError, match="--overwrite"):
        run("texts.txt", "--texts")
    assert run("texts.txt", "--texts", "--overwrite", "--restart").exit_code == 0


def test_a_slip_shows_before_a_model_is_loaded(loaded):
    with pytest.raises(InputError, match=r"'absent.txt' cannot be read"):
        run("absent.txt")
    assert loaded == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'FILE...'"),
        (["texts.txt", "-o", "out.csv"], "'out.csv' should end with .parquet, .npy, .jsonl, .lance or .faiss"),
        (["texts.txt", "--workers", "0"], "0 is not in the range"),
        (["texts.txt", "--backend", "magic"], "'magic' is not one of"),
        (["texts.txt", "--dtype", "float64"], "'float64' is not one of"),
    ],
)
def test_usage_errors_have_status_two(arguments, message, loaded):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert loaded == []


def test_a_terminal_gets_a_progress_bar(monkeypatch):
    runner = CliRunner()
    with runner.isolation() as (_, stderr, _output):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        embed.main(["texts.txt", "--texts"], standalone_mode=False)
        sys.stderr.flush()
        shown = stderr.getvalue().decode()
    assert "2/2" in shown


def test_help_explains_and_shows_examples():
    result = run("--help")
    assert result.exit_code == 0
    assert "longclip-rt embed files.txt" in result.stdout
    assert "rejects.jsonl" in result.stdout
