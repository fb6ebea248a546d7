"""A small slice of each data set in its own layout: three images, of which the last one cannot be used."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from longclip_rt.evaluation.data import DataName

LONG = "A red square lies to the left of everything else. " * 12


def picture(number: int, size: int = 32) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), (40 * number % 256, 90, 255 - 40 * number % 256)).save(stream, "PNG")
    return stream.getvalue()


def put(folder: Path, *names: str) -> None:
    """Writes a picture of each name."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))


def put_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def put_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def coco(folder: Path) -> DataName:
    put(folder / "val2017", "000000000139.jpg", "000000000285.jpg")
    captions = [(139, f"caption {n}") for n in range(6)] + [(285, "a bear"), (285, "a bear"), (7, ""), (99, "nobody")]
    content = {
        "images": [{"id": number, "file_name": f"{number:012}.jpg"} for number in (139, 285, 7)],
        "annotations": [{"image_id": number, "id": 1, "caption": text} for number, text in captions],
    }
    return DataName("coco", str(put_json(folder / "annotations" / "captions_val2017.json", content)))


def karpathy(folder: Path) -> DataName:
    put(folder / "val2014", "a.jpg", "b.jpg")
    rows = [
        {"filepath": "val2014", "filename": f"{name}.jpg", "split": split, "cocoid": 1, "sentences": sentences}
        for name, split, sentences in (
            ("a", "test", [{"raw": "one"}, {"raw": "two"}]),
            ("b", "test", [{"raw": "three"}]),
            ("c", "test", []),
            ("d", "restval", [{"raw": "not of this split"}]),
        )
    ]
    return DataName("karpathy", str(put_json(folder / "dataset_coco.json", {"images": rows, "dataset": "coco"})))


def flickr_token(folder: Path) -> DataName:
    put(folder / "flickr30k-images", "1.jpg", "2.jpg")
    lines = ["1.jpg#0\tA dog .", "1.jpg#1\tA brown dog .", "2.jpg#0\tA cat .", "3.jpg#0\t ", "no tab"]
    (folder / "results_20130124.token").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return DataName("flickr", str(folder / "results_20130124.token"))


def flickr_csv(folder: Path) -> DataName:
    put(folder / "Images", "1.jpg", "2.jpg")
    text = 'image,caption\n1.jpg,A dog .\n1.jpg,"A dog, brown ."\n2.jpg,A cat .\n3.jpg,\n4.jpg,too,many,cells\n'
    (folder / "captions.txt").write_text(text, encoding="utf-8")
    return DataName("flickr", str(folder / "captions.txt"))


def sharegpt4v(folder: Path) -> DataName:
    put(folder, "coco/train2017/1.jpg", "sam/images/2.jpg")
    texts = ("First.\nSecond.", "Third.", "")
    rows: list[Any] = [
        {"id": name, "image": name, "conversations": [{"value": "<image>"}, {"from": "gpt", "value": text}]}
        for name, text in zip(("coco/train2017/1.jpg", "sam/images/2.jpg", "3.jpg"), texts, strict=True)
    ]
    rows.append({"id": "4", "image": "4.jpg", "conversations": []})
    rows += rows[:1] * 996 + [rows[0] | {"image": "after the first thousand.jpg"}]
    path = put_json(folder / "share-captioner_coco_lcs_sam_1246k_1107.json", rows)
    return DataName("sharegpt4v", str(path), images=folder)


def urban1k(folder: Path) -> DataName:
    put(folder / "image", "1.jpg", "2.jpg", "10.jpg")
    (folder / "caption").mkdir()
    for name, text in (("1", "The image\nand no more"), ("2", "A street"), ("10", "\nsecond line")):
        (folder / "caption" / f"{name}.txt").write_text(text)
    return DataName("urban1k", str(folder))


def docci(folder: Path) -> DataName:
    put(folder / "images", "test_00000.jpg", "test_00001.jpg")
    rows: list[Any] = [
        {"split": split, "example_id": name, "image_file": f"{name}.jpg", "description": text}
        for split, name, text in (
            ("test", "test_00000", LONG),
            ("train", "train_00000", "not of this split"),
            ("test", "test_00001", "A cat"),
            ("test", "test_00002", None),
        )
    ]
    return DataName("docci", str(put_lines(folder / "docci_descriptions.jsonlines", rows)))


def iiw(folder: Path) -> DataName:
    put(folder / "images", "aar_1.jpg", "2.png")
    rows = [
        {"image/key": "aar_1", "image/url": "gs://x", "IIW": "One"},
        {"image": "2.png", "IIW": "Two"},
        {"IIW": "x"},
    ]
    return DataName("iiw", str(put_lines(folder / "data.jsonl", rows)))


def dci(folder: Path) -> DataName:
    put(folder / "photos", "sa_1.jpg", "sa_2.jpg")
    for name, row in (
        ("1", {"image": "sa_1.jpg", "short_caption": "A dog.", "extra_caption": "It runs."}),
        ("2", {"image": "sa_2.jpg", "short_caption": "A cat.", "extra_caption": ""}),
        ("3", {"short_caption": "No image."}),
    ):
        put_json(folder / "annotations" / f"{name}-data.json", row)
    return DataName("dci", str(folder))


ROWS: list[dict[str, Any]] = [
    {"image": "1.png", "caption": "A dog"},
    {"image": "2.png", "caption": "A cat"},
    {"image": "1.png", "caption": "A brown dog"},
    {"image": "3.png", "caption": ""},
]


def table_jsonl(folder: Path) -> DataName:
    put(folder, "1.png", "2.png")
    return DataName("table", str(put_lines(folder / "pairs.jsonl", ROWS)))


def table_csv(folder: Path) -> DataName:
    put(folder, "1.png", "2.png")
    lines = ["image,caption", *(f'{row["image"]},"{row["caption"]}"' for row in ROWS)]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return DataName("table", str(folder / "pairs.csv"))


def table_parquet(folder: Path) -> DataName:
    """With the pictures inside."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row | {"image": picture(int(row["image"][0]))} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    return DataName("table", str(folder / "pairs.parquet"))


def webdataset(folder: Path) -> DataName:
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, content in (
            ("a.png", picture(1)),
            ("a.txt", b"A dog"),
            ("b.png", picture(2)),
            ("b.json", json.dumps({"caption": "A cat"}).encode()),
            ("c.txt", b"no picture"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return DataName("webdataset", str(folder / "0.tar"))


Captions = list[tuple[str, ...]]
CASES: dict[str, tuple[Callable[[Path], DataName], Captions, tuple[str, ...]]] = {
    "coco": (
        coco,
        [tuple(f"caption {n}" for n in range(5)), ("a bear",)],
        ("duplicate", "caption is empty", "no caption", "an image that is not listed"),
    ),
    "karpathy": (karpathy, [("one", "two"), ("three",)], ("no caption",)),
    "flickr token": (
        flickr_token,
        [("A dog .", "A brown dog ."), ("A cat .",)],
        ("no tab", "caption is empty", "no caption"),
    ),
    "flickr csv": (
        flickr_csv,
        [("A dog .", "A dog, brown ."), ("A cat .",)],
        ("number of cells", "caption is empty", "no caption"),
    ),
    "sharegpt4v": (
        sharegpt4v,
        [("First. Second.",), ("Third.",)],
        ("caption is empty", "no caption", "no second turn", *["duplicate"] * 996),
    ),
    "urban1k": (urban1k, [("The image",), ("A street",)], ("caption is empty", "no caption")),
    "docci": (docci, [(LONG.strip(),), ("A cat",)], ("caption is empty", "no caption")),
    "iiw": (iiw, [("One",), ("Two",)], ("names no image",)),
    "dci": (dci, [("A dog. It runs.",), ("A cat.",)], ("names no image",)),
    "table jsonl": (table_jsonl, [("A dog", "A brown dog"), ("A cat",)], ("caption is empty",)),
    "table csv": (table_csv, [("A dog", "A brown dog"), ("A cat",)], ("caption is empty",)),
    "table parquet": (table_parquet, [("A dog", "A brown dog"), ("A cat",)], ("caption is empty",)),
    "webdataset": (webdataset, [("A dog",), ("A cat",)], ("no image",)),
}
"""Name -> what writes the slice, the captions of its images, and a part of the reason of each that is skipped."""
