from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from layout_cases import CASES, LONG, put, put_json, put_lines, table_jsonl, webdataset

from longclip_rt.errors import InputError, LongClipError, MissingExtraError
from longclip_rt.evaluation.cache import opened_entry
from longclip_rt.evaluation.collection import Collection
from longclip_rt.evaluation.data import KINDS, DataName, data_from_name, load_collection
from longclip_rt.train.data.table_files import Columns
from longclip_rt.train.scenes.rows import scenes_from_name

NO_MODEL: Any = SimpleNamespace(tokenizer=None)


def loaded(data: DataName, home: Path, size: int = 32) -> Collection:
    with opened_entry(home, data.kind, data.as_json()) as entry:
        return load_collection(data, entry, NO_MODEL, size)


@pytest.mark.parametrize("name", CASES)
def test_a_slice_in_the_data_sets_own_layout(name: str, tmp_path: Path) -> None:
    write, captions, reasons = CASES[name]
    (tmp_path / "data").mkdir()
    found = loaded(write(tmp_path / "data"), tmp_path / "cache")
    by_image: list[list[str]] = [[] for _ in found.images]
    for text, image in zip(found.texts, found.of, strict=True):
        by_image[image].append(text)
    assert sorted(map(tuple, by_image)) == sorted(captions)
    assert all(path.is_file() for path in found.images)
    assert len(found.skipped) == len(reasons)
    for reason in set(reasons):
        said = [one for one in found.skipped if reason in one.reason]
        assert len(said) == reasons.count(reason), found.skipped[:5]


def test_every_kind_has_a_slice() -> None:
    assert {name.partition(" ")[0] for name in CASES} == {*KINDS} - {"scenes"}


def test_scenes_are_those_that_no_run_trains_or_validates_on(tmp_path: Path) -> None:
    assert data_from_name("scenes:", None, "test", Columns()) == data_from_name("scenes", None, "test", Columns())
    assert data_from_name("scenes:", None, "test", Columns()).path == "1000"
    found = loaded(DataName("scenes", "3"), tmp_path)
    assert len(found.images) == len(found.texts) == 3 and not found.skipped
    tested = scenes_from_name("scenes:3").for_tests()
    assert tested.seed not in {scenes_from_name("scenes:3").seed, scenes_from_name("scenes:3").held_out(3).seed}
    with pytest.raises(LongClipError, match="seed below"):  # it cannot be named, so nobody trains on it
        scenes_from_name(f"scenes:3@{tested.seed}")
    largest = scenes_from_name(f"scenes:3@{(1 << 31) - 1}")
    assert largest.held_out(3).seed < tested.seed
    twins = scenes_from_name("scenes:3?twins=1&prompts=1").for_tests()
    assert twins.twins == twins.prompts == 0


def test_pictures_lie_where_the_option_says(tmp_path: Path) -> None:
    path = put_json(
        tmp_path / "captions_val2017.json",
        {"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]},
    )
    found = loaded(DataName("coco", str(path), images=tmp_path / "mine"), tmp_path / "cache")
    assert found.images == (tmp_path / "mine" / "x.jpg",)
    put(tmp_path / "val2017", "x.jpg")
    assert loaded(DataName("coco", str(tmp_path)), tmp_path / "cache").images == (tmp_path / "val2017" / "x.jpg",)


def test_a_column_can_be_named(tmp_path: Path) -> None:
    path = put_lines(tmp_path / "x.jsonl", [{"file": "1.png", "words": "A dog", "caption": "not this one"}])
    data = data_from_name(f"table:{path}", None, "test", Columns("file", "words"))
    assert loaded(data, tmp_path / "cache").texts == ("A dog",)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("scene:3", None, "is not understood"),
        ("coco", None, "is not understood"),
        ("coco:", None, "is not understood"),
        ("coco:absent.json", None, "does not exist"),
        ("coco:x.json", "{", "is not JSON"),
        ("coco:x.json", "[]", "no list 'images'"),
        ("coco:x.json", '{"images": [1], "annotations": []}', "no list 'images' of objects"),
        ("coco:x.json", '{"images": [{"id": 1}], "annotations": []}', "It names no image"),
        ("karpathy:x.json", '{"images": [{"split": "test", "sentences": 3}]}', "It names no image"),
        ("coco:x.json", '{"images": [], "annotations": []}', "has no image with a caption"),
        ("karpathy:x.json", '{"images": [{"split": "val"}]}', "no split 'test'; there are val"),
        ("flickr:x.csv", "a,b\n1,2\n", "'image' and 'caption' are needed"),
        ("flickr:x.token", b"\xff\xfe", "is not UTF-8"),
        ("sharegpt4v:x.json", b"[\xff", "is not UTF-8"),
        ("iiw:x.jsonl", '{"image": "/", "IIW": "x", "image/key": 1}\n{"IIW": 1}', "names no image"),
        ("coco:" + "a" * 300, None, "cannot be read"),
        ("urban1k:.", None, "no folders 'image' and 'caption'"),
        ("dci:.", None, "holds no *-data.json"),
        ("docci:.", None, "nor a folder with *.jsonlines"),
        ("table:x.csv", "a,b\n1,2\n", "has no column 'image'"),
        ("table:x.csv", b"image,caption\n\xff,x\n", "no CSV file in UTF-8"),
        ("table:x.csv", 'image,caption\n1.png,"a cup\n2.png,a hat\n', "unexpected end of data"),
        ("flickr:x.csv", 'image,caption\n1.png,"a cup\n2.png,a hat\n', "unexpected end of data"),
        ("webdataset:x.jsonl", '{"image": "1.png", "caption": "x"}\n', "is jsonl, not webdataset"),
        ("scenes:many", None, "is not understood"),
    ],
)
def test_what_is_no_data_set_is_told(
    name: str, content: str | bytes | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name.partition(":")[2]).write_bytes(raw)
    with pytest.raises(LongClipError) as caught:
        loaded(data_from_name(name, None, "test", Columns()), tmp_path / "cache")
    assert said in str(caught.value)


def test_without_webdataset_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = webdataset(tmp_path)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(MissingExtraError, match=r'"longclip-rt\[train\]"'):
        loaded(data, tmp_path / "cache")


def test_a_row_that_names_a_text_is_no_picture(tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    path = put_lines(tmp_path / "x.jsonl", [{"image": "a.txt", "caption": "x"}, {"image": "1.png", "caption": LONG}])
    found = loaded(DataName("table", str(path)), tmp_path / "cache")
    assert [one.reason for one in found.skipped] == ["'a.txt' is no picture."]
    assert found.texts == (LONG.strip(),)


def test_two_runs_on_one_data_set_do_not_meet(tmp_path: Path) -> None:
    data = table_jsonl(tmp_path)
    with (
        opened_entry(tmp_path / "cache", "table", data.as_json()),
        pytest.raises(LongClipError, match="evaluates on 'table'"),
        opened_entry(tmp_path / "cache", "table", data.as_json()),
    ):
        pass
    assert isinstance(loaded(data, tmp_path / "cache"), Collection)
    with pytest.raises(InputError, match="KIND:PATH"):
        data_from_name(":x", None, "test", Columns())


def test_several_files_or_twins_are_not_chosen_among_in_silence(tmp_path: Path) -> None:
    for name in ("coco", "flickr8k"):
        put_json(tmp_path / f"dataset_{name}.json", {"images": []})
    with pytest.raises(InputError, match=r"dataset_coco\.json, dataset_flickr8k\.json. Name one"):
        loaded(DataName("karpathy", str(tmp_path)), tmp_path / "cache")
    put(tmp_path / "image", "1.jpg", "1.png")
    (tmp_path / "caption").mkdir()
    (tmp_path / "caption/1.txt").write_text("A dog")
    found = loaded(DataName("urban1k", str(tmp_path)), tmp_path / "cache")
    assert [one.id for one in found.skipped] == ["image/1.png"] and found.images[0].name == "1.jpg"
    (tmp_path / "caption/2.txt").mkdir()
    with pytest.raises(InputError, match=r"2\.txt' cannot be read"):  # and not that the cache cannot be written
        loaded(DataName("urban1k", str(tmp_path)), tmp_path / "cache")
    odd = put_lines(tmp_path / "odd.jsonl", [{"image": "/", "IIW": "x"}])
    assert loaded(DataName("iiw", str(odd)), tmp_path / "cache").names == ("/",)
