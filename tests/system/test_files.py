from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from longclip_rt.errors import OutputError
from longclip_rt.system.files import (
    behind_links,
    directory_in_the_making,
    output_errors,
    sha256_of_file,
    sha256_of_json,
    whole_file,
    write_text_atomically,
)


def test_hashes_are_those_of_the_content(tmp_path: Path) -> None:
    content = os.urandom(3 * (1 << 20) + 17)
    (tmp_path / "big").write_bytes(content)
    assert sha256_of_file(tmp_path / "big") == hashlib.sha256(content).hexdigest()
    assert sha256_of_json({"b": 1, "a": [True]}) == sha256_of_json({"a": [True], "b": 1})
    assert sha256_of_json({"a": 1}) != sha256_of_json({"a": 2})


def test_a_file_is_replaced_whole_and_readable_as_others_are(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    plain = tmp_path / "plain"
    plain.write_text("")
    write_text_atomically(target, "néw\n")
    assert target.read_bytes() == "néw\n".encode()
    assert target.stat().st_mode == plain.stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "plain"]


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("between")
    (tmp_path / "between").symlink_to("far/file")
    write_text_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file").read_text() == "new"
    assert behind_links(tmp_path / "plain") == tmp_path / "plain"


def test_links_in_a_circle_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OutputError, match="cannot be written: Too many levels of symbolic links"):
        write_text_atomically(tmp_path / "a", "new")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError), whole_file(target) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.ENOSPC, "Make room"), (errno.EROFS, "may write to"), (errno.ENOENT, "Make the folder")]
)
def test_the_disks_refusals_are_sentences(tmp_path: Path, code: int, advice: str) -> None:
    with pytest.raises(OutputError, match=advice), output_errors(tmp_path / "out"):
        raise OSError(code, os.strerror(code))


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    with directory_in_the_making(target) as staging:
        (staging / "a").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a"]
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_that_fails_leaves_nothing_and_an_existing_one_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with pytest.raises(KeyError), directory_in_the_making(target) as staging:
        (staging / "a").write_text("1")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    with pytest.raises(OutputError, match="exists already"), directory_in_the_making(target):
        pass
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), directory_in_the_making(tmp_path / "file" / "bundle"):
        pass
