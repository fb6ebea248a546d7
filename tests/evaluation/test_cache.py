from __future__ import annotations

import os
from pathlib import Path

import pytest
from layout_cases import picture

from longclip_rt.evaluation import cache
from longclip_rt.evaluation.cache import evaluations_home, opened_entry, prune


def entry(home: Path, name: str, size: int, used: int) -> Path:
    with opened_entry(home, name, name) as opened:
        (opened.folder / "data").write_bytes(bytes(size))
    os.utime(opened.folder / "lock", (used, used))
    return opened.folder


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    old, middle, new = (entry(tmp_path, name, 100, used) for used, name in enumerate(("old", "middle", "new"), 1000))
    (tmp_path / "not ours").mkdir()
    (tmp_path / "not ours" / "lock").touch()  # `--cache` may name a folder with other folders in it
    (tmp_path / "not ours" / "data").write_bytes(bytes(300))
    prune(tmp_path, 250, keep=new)
    assert [one.exists() for one in (old, middle, new)] == [False, True, True]
    prune(tmp_path, 50, keep=middle)
    assert [one.exists() for one in (middle, new)] == [True, False] and (tmp_path / "not ours" / "data").exists()


def test_what_another_run_uses_stays(tmp_path: Path) -> None:
    with opened_entry(tmp_path, "used", 1) as opened:
        (opened.folder / "data").write_bytes(bytes(100))
        prune(tmp_path, 10, keep=tmp_path / "another")
        assert (opened.folder / "data").exists()
    prune(tmp_path, 10, keep=tmp_path / "another")
    assert not opened.folder.exists()


def test_the_bound_holds_when_a_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MOST_BYTES", 150)
    old = entry(tmp_path, "old", 100, 1000)
    assert entry(tmp_path, "new", 100, 2000).exists() and not old.exists()


def test_a_picture_is_written_once_and_mended_when_it_was_cut(tmp_path: Path) -> None:
    with opened_entry(tmp_path, "x", 1) as opened:
        path = opened.store(picture(1))
        before = path.stat().st_mtime_ns
        assert path.suffix == ".png" and opened.store(picture(1)) == path and path.stat().st_mtime_ns == before
        path.write_bytes(picture(1)[:10])
        assert opened.store(picture(1)) == path and path.read_bytes() == picture(1)
    with opened_entry(tmp_path, "x", 1, fresh=True) as opened:
        assert not path.exists()


def test_it_lies_in_the_users_cache(own_cache: Path) -> None:
    assert evaluations_home() == own_cache / "longclip-rt" / "evaluations"
