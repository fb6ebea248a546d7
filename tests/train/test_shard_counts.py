from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from data_case import clip_tokenizer, picture, write_shards

from longclip_rt.errors import InputError, TrainingError
from longclip_rt.train.data.shard_counts import ShardCount, rows_of_shards
from longclip_rt.train.data.shards import ShardRow
from longclip_rt.train.data.sources import Naming, open_sources

NAMES = {
    "plain": "{:05}",
    "in folders": "part-{0}/{0:05}",
    "in long folders": "f" * 90 + "/" + "g" * 50 + "/{:05}",
    "long": "f" * 130 + "{:05}",
    "foreign": "ü/écran {:05}",
}


def write_tar_of_form(path: Path, name: str, form: int, compressed: bool = False) -> None:
    with tarfile.open(path, "w:gz" if compressed else "w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("__meta__/x.json"))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number in range(7):
            for suffix, content in (("png", picture(number)), ("txt", b"A text."), ("cls", b"3")):
                info = tarfile.TarInfo(f"{name.format(number)}.{suffix}")
                info.size, info.mtime = len(content), 1.5
                tar.addfile(info, io.BytesIO(content))


def count_by_reading(path: Path) -> int:
    return sum(1 for _ in open_sources(str(path), None, Naming(val_rows=0)).training.in_order())


# ustar has no place for the long name.
@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name in NAMES.values()
        for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        if not (form == tarfile.USTAR_FORMAT and name == NAMES["long"])
    ],
)
def test_counts_are_those_of_reading(tmp_path: Path, name: str, form: int) -> None:
    write_tar_of_form(tmp_path / "0.tar", name, form)
    assert rows_of_shards([tmp_path / "0.tar"], lambda name: True) == [ShardCount(7)]
    assert count_by_reading(tmp_path / "0.tar") == 7


def test_a_compressed_shard_is_counted(tmp_path: Path) -> None:
    write_tar_of_form(tmp_path / "0.tar", "{}", tarfile.PAX_FORMAT, compressed=True)
    assert gzip.decompress((tmp_path / "0.tar").read_bytes())
    assert rows_of_shards([tmp_path / "0.tar"], lambda name: True) == [ShardCount(7)]
    assert count_by_reading(tmp_path / "0.tar") == 7


def test_members_that_are_not_wanted_make_no_rows(tmp_path: Path) -> None:
    write_tar_of_form(tmp_path / "0.tar", "{}", tarfile.GNU_FORMAT)
    assert rows_of_shards([tmp_path / "0.tar"], lambda name: name.endswith("9.png")) == [ShardCount(0)]


@pytest.mark.parametrize("rows", [0, 6, 13])
def test_what_can_be_read_of_a_damaged_shard_is_counted(tmp_path: Path, rows: int) -> None:
    write_shards(tmp_path, [20])
    content = (tmp_path / "000.tar").read_bytes()
    bytes_a_row = 4 * 512  # picture and text, each with its header
    (tmp_path / "000.tar").write_bytes(content[: rows * bytes_a_row] + b"damage" * 1000)
    assert rows_of_shards([tmp_path / "000.tar"], lambda name: True) == [ShardCount(rows, damaged=True)]
    found = open_sources(str(tmp_path), None, Naming(val_rows=0))
    assert [row.reason for row in found.dropped] == [
        f"The shard is damaged after {rows} rows, and those behind it are lost."
    ]
    assert sum(isinstance(row, ShardRow) for row in found.training.in_order()) == rows


def test_a_shard_that_gives_fewer_rows_than_its_statistics_say_is_told(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    (tmp_path / "000_stats.json").write_text('{"successes": 5}')
    *rows, last = open_sources(str(tmp_path), None, Naming(val_rows=0)).training.in_order()
    assert [row.id for row in rows] == ["000.tar/00000", "000.tar/00001", "000.tar/00002"]
    with pytest.raises(InputError, match=r"gave 3 rows of 5"):
        last.pair(32, clip_tokenizer())


def test_a_file_that_is_no_tar_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"no tar file" * 100)
    assert rows_of_shards([tmp_path / "0.tar"], lambda name: True) == [ShardCount(0, damaged=True)]


def test_a_shard_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"cannot be read"):
        rows_of_shards([tmp_path], lambda name: True)


@pytest.mark.parametrize("content", ["{}", "not json", "[1]", '{"successes": "many"}'])
def test_statistics_that_say_nothing_are_passed_over(tmp_path: Path, content: str) -> None:
    write_shards(tmp_path, [3])
    (tmp_path / "000_stats.json").write_text(content)
    assert rows_of_shards([tmp_path / "000.tar"], lambda name: True) == [ShardCount(3)]
