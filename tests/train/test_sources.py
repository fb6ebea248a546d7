from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_case import caption, clip_tokenizer, picture, write_pairs, write_shards, write_tar

from longclip_rt.errors import InputError, TrainingError
from longclip_rt.train.data.rows import Pair
from longclip_rt.train.data.sources import Naming, Sources, open_sources
from longclip_rt.train.data.table_files import Columns


def sources(data: str | Path, val_rows: int = 0, **naming: Any) -> Sources:
    return open_sources(str(data), None, Naming(val_rows=val_rows, **naming))


def pairs_of(found: Sources) -> list[Pair | str]:
    """What each row gives: a pair, or the reason why there is none."""
    results: list[Pair | str] = []
    for row in found.training.in_order():
        try:
            results.append(row.pair(32, clip_tokenizer()))
        except InputError as error:
            results.append(str(error))
    return results


def share_gpt4v_row(image: str, text: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "What do you see?\n<image>"}, {"from": "gpt", "value": text}]
    return {"id": "000000000009", "image": image, "conversations": turns}


def test_sharegpt4v_is_read_as_the_reference_reads_it(tmp_path: Path) -> None:
    text = "In the center, a vibrant blue tray.\n\nOn it. Is food. "
    rows = [share_gpt4v_row("coco/9.jpg", text), share_gpt4v_row("sam/1.jpg", "One sentence only")]
    path = tmp_path / "share.json"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    found = sources(path)
    assert (found.training.kind, found.training.count) == ("json", 2)
    assert pairs_of(found) == [
        Pair(
            str(tmp_path / "coco/9.jpg"),
            "In the center, a vibrant blue tray.  On it. Is food.",
            "In the center, a vibrant blue tray",
        ),
        Pair(str(tmp_path / "sam/1.jpg"), "One sentence only", "One sentence only"),
    ]
    assert [row.id for row in found.training.in_order()] == ["share.json:1", "share.json:2"]


@pytest.mark.parametrize("characters", [1, 7, 64])
def test_a_json_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, characters: int) -> None:
    monkeypatch.setattr("longclip_rt.train.data.table_files._CHARACTERS_AT_ONCE", characters)
    rows = [share_gpt4v_row(f"{number}.jpg", f'Ünï "{number}", ] and }}.') for number in range(9)]
    path = tmp_path / "share.json"
    path.write_text("\ufeff " + json.dumps(rows, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [pair.long for pair in pairs_of(sources(path))] == [f'Ünï "{number}", ] and }}.' for number in range(9)]


def test_items_of_a_json_list_that_are_no_rows_are_dropped(tmp_path: Path) -> None:
    rows = [share_gpt4v_row("a.jpg", "A"), 17, {"image": "b.jpg", "conversations": []}, share_gpt4v_row("c.jpg", "C")]
    path = tmp_path / "share.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    found = sources(path)
    assert [pair.long for pair in pairs_of(found)] == ["A", "C"]
    assert [row.id for row in found.dropped] == ["share.json:2", "share.json:3"]
    assert found.read == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image": "a.jpg"}', r"no JSON list of rows.*\.jsonl"),
        ("", r"no JSON list of rows"),
        ('[{"image": "a.jpg", "caption": "A"}, {"image": ', r"not valid JSON"),
        ('[{"image": "a.jpg", "caption": "A"},', r"ends in the middle"),
        ('[{"image": "a.jpg", "caption": "A"} {broken}]', r"not valid JSON"),
    ],
)
def test_a_damaged_json_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "share.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TrainingError, match=message):
        sources(path)


def test_json_lines_have_short_captions_and_may_be_broken(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [
        '{"image": "a.jpg", "caption": "A long. Text.", "extra": 1}',
        "",
        '{"image": "b.jpg", "caption": "A lo',
        '["c.jpg", "C"]',
        '{"image": "d.jpg", "caption": "D long.", "short_caption": "D\\nshort"}',
        '{"image": "e.jpg", "caption": "E. Long.", "short_caption": " "}',
        '{"caption": "F long."}',
        '{"image": "g.jpg", "caption": 7}',
        '{"image": "/abs/h.jpg", "caption": "\\ud800 h"}',
    ]
    path.write_bytes("\r\n".join(lines).encode() + b'\n{"image": "\xff.jpg", "caption": "I"}\n')
    found = sources(path)
    assert pairs_of(found) == [
        Pair(str(tmp_path / "a.jpg"), "A long. Text.", "A long"),
        Pair(str(tmp_path / "d.jpg"), "D long.", "D short"),
        Pair(str(tmp_path / "e.jpg"), "E. Long.", "E"),
        Pair("/abs/h.jpg", "? h", "? h"),
    ]
    reasons = {row.id: row.reason for row in found.dropped}
    assert reasons.keys() == {f"pairs.jsonl:{line}" for line in (3, 4, 7, 8, 10)}
    assert reasons["pairs.jsonl:3"].startswith("The line is not JSON")
    assert reasons["pairs.jsonl:4"] == "It is a JSON list, not an object."
    assert reasons["pairs.jsonl:7"] == "It has no image."
    assert reasons["pairs.jsonl:8"] == "Its caption is of type int, not a text."
    assert "not valid UTF-8" in reasons["pairs.jsonl:10"]


def test_images_are_looked_up_in_the_folder_named(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs", 2)
    found = sources(path, images=tmp_path / "photos")
    assert [pair.image for pair in pairs_of(found)] == [str(tmp_path / f"photos/images/{k}.png") for k in (0, 1)]


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"photo": "a.jpg", "image": "b.jpg", "story": "A story.", "title": "A title"}\n')
    found = sources(path, columns=Columns("photo", "story", "title"))
    assert pairs_of(found) == [Pair(str(tmp_path / "a.jpg"), "A story.", "A title")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(), r"no column 'long_caption' or .*its columns: 'image', 'story'.*--long-column"),
        (Columns("photo"), r"no column 'photo'; its columns: 'image', 'story'.*--image-column"),
        (Columns(None, "story", "title"), r"no column 'title'.*--short-column"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_missing_column_is_told_with_those_there_are(
    tmp_path: Path, columns: Columns, message: str, suffix: str
) -> None:
    row = {"image": "a.jpg", "story": "A story."}
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    with pytest.raises(TrainingError, match=message):
        sources(path, columns=columns)


def test_parquet_holds_paths(tmp_path: Path) -> None:
    rows = [
        {"path": "a.jpg", "text": "A. Long", "short": None},
        {"path": None, "text": "B", "short": None},
        {"path": "c.jpg", "text": "C. Long", "short": "C!"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    found = sources(tmp_path / "pairs.parquet")
    assert found.training.kind == "parquet"
    assert pairs_of(found) == [
        Pair(str(tmp_path / "a.jpg"), "A. Long", "A"),
        Pair(str(tmp_path / "c.jpg"), "C. Long", "C!"),
    ]
    assert [row.id for row in found.dropped] == ["pairs.parquet:2"]


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_holds_images(tmp_path: Path, nested: bool) -> None:
    contents = [picture(number) for number in range(3)]
    images = [{"bytes": content, "path": "x.png"} for content in contents] if nested else contents
    rows = [{"image": image, **share_gpt4v_row("", caption(k))} | {"image": image} for k, image in enumerate(images)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    assert [pair.image for pair in pairs_of(sources(tmp_path / "pairs.parquet"))] == contents


def test_images_in_tables_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longclip_rt.train.data.tables._MAX_IMAGE_BYTES", 100)
    rows = [{"image": picture(number), "caption": caption(number)} for number in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    with pytest.raises(TrainingError, match=r"WebDataset shards"):
        sources(tmp_path / "pairs.parquet")


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.parquet").write_bytes(b"no table")
    with pytest.raises(TrainingError, match=r"cannot be read as Parquet"):
        sources(tmp_path / "pairs.parquet")


@pytest.mark.parametrize("name", ["{0..2}.jsonl", "*.jsonl", "."])
def test_many_tables_are_one(tmp_path: Path, name: str) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text(f'{{"image": "a.jpg", "caption": "In {number}."}}\n' * 2)
    found = sources(tmp_path / name)
    assert [pair.long for pair in pairs_of(found)] == [f"In {number}." for number in (0, 0, 1, 1, 2, 2)]
    ids = [row.id for row in found.training.in_order()]
    assert ids == [f"{number}.jsonl:{line}" for number in range(3) for line in (1, 2)]


@pytest.mark.parametrize("name", ["{000..002}.tar", "*.tar", ""])
def test_shards_are_named_by_numbers_glob_or_folder(tmp_path: Path, name: str) -> None:
    write_shards(tmp_path, [2, 3, 4])
    found = sources(tmp_path / name)
    assert (found.training.kind, found.training.count) == ("webdataset", 9)
    assert pairs_of(found) == [Pair(picture(k), caption(k), f"Picture {k}") for k in range(9)]


def test_shards_of_img2dataset(tmp_path: Path) -> None:
    def members(key: str, **contents: bytes) -> list[tuple[str, bytes]]:
        return [(f"{key}.{suffix}", content) for suffix, content in contents.items()]

    write_tar(
        tmp_path / "00000.tar",
        [
            *members("00000/a", jpg=b"A", txt=b"A alt text.", json=b'{"caption": "A alt text.", "url": "x", "sha": 1}'),
            *members(
                "00000/b", json=b'{"long_caption": "B long.", "caption": "B", "short_caption": "B short"}', webp=b"B"
            ),
            *members("00000/c", jpg=b"C"),
            *members("00000/d", txt=b"D"),
            *members("00000/e", jpg=b"E", json=b"{broken"),
            *members("00000/f", PNG=b"F", txt=b" ", cls=b"7"),
            *members("00000/g", jpeg=b"G", json=b"[1]"),
            ("__00000__/meta.json", b"{}"),
        ],
    )
    (tmp_path / "00000.parquet").write_bytes(b"")
    found = sources(tmp_path)
    assert found.training.count == 7
    a, b, c, d, e, f, g = pairs_of(found)
    assert a == Pair(b"A", "A alt text.", "A alt text.")
    assert b == Pair(b"B", "B long.", "B short")
    assert [c, d] == ["It has no caption.", "It has no image (.jpg, .jpeg, .png, .webp)."]
    assert str(e).startswith("Its .json is not valid JSON")
    assert f == "Its caption is empty."
    assert g == "Its .json holds a list, not an object."
    assert next(found.training.in_order()).id == "00000.tar/00000/a"
    # A field that is named comes before the text.
    assert pairs_of(sources(tmp_path, columns=Columns(None, "url", "caption")))[0] == Pair(b"A", "x", "A alt text.")


def test_the_rows_of_shards_are_counted_from_statistics(tmp_path: Path) -> None:
    write_shards(tmp_path, [2, 3])
    (tmp_path / "000_stats.json").write_text('{"count": 8, "successes": 5, "status_dict": {"success": 5}}')
    assert sources(tmp_path).training.count == 8


@pytest.mark.parametrize(("val_rows", "expected"), [(1000, 5), (3, 3)])
def test_the_first_rows_of_shards_validate(tmp_path: Path, val_rows: int, expected: int) -> None:
    write_shards(tmp_path, [4, 46])
    found = sources(tmp_path, val_rows=val_rows)
    assert (found.validation.count, found.training.count) == (expected, 50 - expected)
    ids = [[row.id for row in part.in_order()] for part in (found.validation, found.training)]
    assert [name.partition("/")[2] for part in ids for name in part] == [f"{number:05}" for number in range(50)]
    assert len(ids[0]) == expected


def test_the_first_thousand_rows_of_many_validate(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f'{{"image": "{k}.jpg", "caption": "{k}"}}\n' for k in range(12_000)))
    found = sources(path, val_rows=1000)
    assert (found.validation.count, found.training.count) == (1000, 11_000)
    assert next(found.training.in_order()).id == "pairs.jsonl:1001"


def test_scenes_are_named_by_count_and_seed() -> None:
    found = sources("scenes:5@7?captions=prefix&twins=1")
    assert (found.training.kind, found.training.count) == ("scenes", 5)
    ids = [row.id for row in found.training.in_order()]
    assert [name.partition("/")[0] for name in ids] == [f"scenes@7:{index}" for index in (0, 0, 2, 2, 4)]
    image = pairs_of(found)[0].image
    assert image.size == (32, 32)
    assert [row.id for row in sources("scenes:2").training.in_order()] == ["scenes@0:0", "scenes@0:1"]


@pytest.mark.parametrize(
    "name",
    [
        "scenes:",
        "scenes:0@1",
        "scenes:5@x",
        "scenes:5@2147483648",
        "scenes:5?twins=2",
        "scenes:5?twins=a",
        "scenes:5?x=1",
        "scenes:5?captions=tall",
        "scenes:-5",
    ],
)
def test_scenes_that_are_named_wrongly_are_refused(name: str) -> None:
    with pytest.raises(TrainingError, match=r"scenes:200000@0"):
        sources(name)


def test_scenes_of_one_seed_do_not_both_train_and_validate() -> None:
    with pytest.raises(TrainingError, match=r"Give them another seed"):
        open_sources("scenes:50@4", "scenes:5@4", Naming())
    assert open_sources("scenes:50@4", "scenes:5@5", Naming()).validation.count == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://host/pairs.jsonl", r"Download it first"),
        ("pipe:cat 000.tar", r"Download it first"),
        ("absent.jsonl", r"'.*absent\.jsonl' does not exist\."),
        ("{0..3}.tar", r"0\.tar' does not exist, and 3 others do not either"),
        ("list.csv", r"not of a kind that can be read"),
        ("empty", r"holds no \.json"),
        ("mixed", r"all of one kind"),
    ],
)
def test_names_of_nothing_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "list.csv").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for other in ("mixed/a.jsonl", "mixed/b.parquet"):
        (tmp_path / other).touch()
    with pytest.raises(TrainingError, match=message):
        sources(name if ":" in name else tmp_path / name)
