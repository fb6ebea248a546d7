"""A short form of `make fuzz`: some seeds of every target, the kept ones, and what the runner itself promises."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
import targets

SEEDS = 8


@pytest.mark.parametrize("name", targets.TARGETS)
def test_no_seed_finds_anything(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seeds = [*range(SEEDS), *(seed for _, seed in fuzz.kept_seeds([name]))]
    outcomes = {}
    for number, seed in enumerate(seeds):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcomes[seed] = fuzz.trial(targets.TARGETS[name], seed, folder)
    found = {seed: outcome for seed, outcome in outcomes.items() if outcome[0] not in ("used", "refused")}
    assert not found


BAD = """
import os, time
from longclip_rt.errors import InputError

def turn(rng, folder):
    (folder / "input").write_text("what was tried")
    match rng.randrange(5):
        case 0: time.sleep(60)
        case 1: os._exit(3)
        case 2: raise KeyError("a fault")
        case 3: assert False, "a wrong vector"
        case 4: raise InputError("a sentence")

TARGETS = {"turn": turn}
"""


def test_hangs_crashes_and_tracebacks_are_found_kept_and_counted(tmp_path: Path) -> None:
    """Of the kept seeds; new ones of this target would find as much."""
    (tmp_path / "bad.py").write_text(BAD)
    source = Path(fuzz.__file__).read_text()
    (tmp_path / "fuzz.py").write_text(source.replace("HANG_SECONDS = 30", "HANG_SECONDS = 1"))
    seed_of = {random.Random(seed).randrange(5): seed for seed in range(100)}
    (tmp_path / "seeds.txt").write_text("# kept\n" + "".join(f"turn {seed}  # x\n" for seed in seed_of.values()))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{fuzz.BEGIN}old\n{fuzz.END}after\n")
    findings = tmp_path / "findings"
    options = ["--module", "bad", "--seconds", "0", "--page", str(page), "--findings", str(findings)]
    result = subprocess.run(
        [sys.executable, tmp_path / "fuzz.py", *options],
        env={**os.environ, "PYTHONPATH": str(fuzz.ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stderr
    for number, outcome in enumerate(("hang", "crash", "traceback", "wrong result")):
        assert f"FOUND turn {seed_of[number]}: {outcome}: " in result.stderr
        assert (findings / f"turn-{seed_of[number]}" / "input").read_text() == "what was tried"
        assert (findings / f"turn-{seed_of[number]}" / "finding.txt").read_text().startswith(outcome)
    assert not (findings / f"turn-{seed_of[4]}").exists()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| turn | 5 | 0 | 1 | 1 crash, 1 hang, 1 traceback, 1 wrong result |" in text


def test_a_new_finding_s_seed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.py").write_text("def fail(rng, folder):\n    raise KeyError(1)\n\nTARGETS = {'fail': fail}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(fuzz, "SEEDS", tmp_path / "seeds.txt")
    fuzz.SEEDS.write_text("# none\n")
    fuzz.fuzz(["fail"], 0, 17, "bad", tmp_path / "findings")
    assert fuzz.SEEDS.read_text() == "# none\nfail 17  # traceback: KeyError: 1\n"
