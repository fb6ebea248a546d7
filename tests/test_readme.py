"""The README's quick start, word for word, in a copy of the repository."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def blocks() -> list[tuple[str, str]]:
    """Language and content of the code blocks under "Quick start"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## Quick start\n")[2].partition("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)


def test_the_quick_start_works(blocks: list[tuple[str, str]], tmp_path: Path) -> None:
    if sys.prefix == sys.base_prefix:
        pytest.fail("run the tests from a virtual environment, as `make test` does: the quick start uses .venv")
    # Otherwise `make demo` would install the copy into this environment.
    stamp = Path(sys.prefix) / ".demo-installed"
    if stamp.exists() and stamp.stat().st_mtime < (ROOT / "setup.py").stat().st_mtime:
        pytest.fail("setup.py changed after .venv was installed; run: make .venv/.dev-installed")
    assert [language for language, _ in blocks] == ["sh", "sh", "python"]
    copied = [
        "longclip_rt",
        "export",
        "kernels",
        "train",
        "examples",
        "setup.py",
        "constraints.txt",
        "pyproject.toml",
        "README.md",
        "Makefile",
    ]
    subprocess.run(["cp", "-a", *copied, str(tmp_path)], cwd=ROOT, check=True)
    # What a first `make` would install is here already; the stamp says so, as it does after `make test`.
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for language, block in blocks:
        program = ["bash", "-euc", block] if language == "sh" else [str(tmp_path / ".venv/bin/python"), "-c", block]
        result = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        if block.strip() == "make demo":
            assert re.search(r"found \d+ of 24 when it read the whole caption", result.stdout)
            assert "nothing of real photographs" in result.stdout
            assert {path.name for path in (tmp_path / "demo").iterdir()} == {
                "files.parquet",
                "gallery.html",
                "twins.html",
            }
        elif language == "sh":
            assert (tmp_path / "scenes.parquet").is_file() and (tmp_path / "gallery.html").is_file()
            assert len(re.findall(r"^ +\d  ", result.stdout, re.MULTILINE)) == 4 + 3
        else:
            assert re.fullmatch(r"\[\[0\.\d+\]\]\n", result.stdout)


def test_the_makefile_has_what_the_readme_names() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"`make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    named |= set(re.findall(r"`make (\w+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert named and named <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
