"""Closed and full standard streams, links, and little memory: a sentence, the right status, whole outputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from longclip_rt.bundle.bundle import BUILT_IN
from longclip_rt.formats.embeddings import load_embeddings

MODEL = BUILT_IN
PHOTO = Path(__file__).parents[2] / "examples" / "photos" / "clock.jpg"

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


def embed(folder: Path, rest: str, *, limit: str = "") -> subprocess.CompletedProcess[str]:
    command = f"{limit} {sys.executable} -m longclip_rt embed {PHOTO} -o out.parquet --bundle {MODEL} {rest}"
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("rest", [">&-", ">/dev/full", "2>/dev/full", ">&- 2>&-", "</dev/null >/dev/full 2>/dev/full"])
def test_a_finished_output_is_one_whatever_could_be_printed(rest: str, tmp_path: Path) -> None:
    result = embed(tmp_path, rest)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert len(load_embeddings(tmp_path / "out.parquet").ids) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet"]


@pytest.mark.parametrize(("to", "reason"), [(">/dev/full", "No space left on device"), (">&-", "it is closed")])
@pytest.mark.parametrize("arguments", ["info --json", "--help"])
def test_what_only_prints_fails_where_that_cannot_be_done(arguments: str, to: str, reason: str, tmp_path: Path) -> None:
    command = f"{sys.executable} -m longclip_rt {arguments} {to}"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, f"Error: Standard output cannot be used: {reason}.\n")


def test_too_little_memory_is_a_sentence(tmp_path: Path) -> None:
    result = embed(tmp_path, "--backend onnxruntime --workers 8", limit="ulimit -v 400000;")
    assert result.returncode == 1 and "Error: " in result.stderr and "Traceback" not in result.stderr
    assert embed(tmp_path, "--backend onnxruntime --workers 8").returncode == 0


def test_an_output_through_a_link_goes_to_the_file_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "out.parquet").symlink_to("far/real.parquet")
    assert embed(tmp_path, "").returncode == 0
    assert (tmp_path / "out.parquet").is_symlink() and len(load_embeddings(tmp_path / "far" / "real.parquet").ids) == 1
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["real.parquet"]
