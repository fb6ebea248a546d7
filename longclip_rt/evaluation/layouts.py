"""Retrieval data sets in their own layouts, one reader each: a file or folder to images with captions."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip_rt.errors import InputError
from longclip_rt.evaluation.collection import Item, Skipped
from longclip_rt.system.files import has_image_suffix
from longclip_rt.train.data.table_files import Columns, Record, csv_rows, records_from_json

Found = Iterator[Item | Skipped]

CAPTIONS = 5
"""Captions an image that COCO's and Flickr30k's protocols take; a few images have six or seven."""

KARPATHY_FILES = "dataset_*.json"
SHAREGPT4V_ROWS = 1000

_SUFFIXES = (".jpg", ".png", ".jpeg", ".webp")


@dataclass(frozen=True)
class Layout:
    """Where a data set lies.

    Attributes:
        path: Its file or folder.
        images: Folder of its pictures; None: where the data set's own layout has it.
        split: Which part of it, where it has several.
    """

    path: Path
    images: Path | None
    split: str

    def folder(self, *usual: str) -> Path:
        """The folder of pictures: the one that was named, else the first of the usual ones that is there.

        Args:
            usual: Relative to the folder of `path`.
        """
        base = self.path if self.path.is_dir() else self.path.parent
        if self.images is not None:
            return self.images
        return next((base / name for name in usual if (base / name).is_dir()), base)

    def file(self, name: str) -> Path:
        """`path` itself where it is a file, else the file of this name (a pattern) in it.

        Raises:
            InputError: There is none.
        """
        if self.path.is_file():
            return self.path
        found = sorted(self.path.glob(name)) if self.path.is_dir() else []
        if not found:
            raise InputError(f"{str(self.path)!r} is no such file, nor a folder with {name}. Name the right one.")
        return found[0]


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not JSON: {error}. Download it again.") from error


def _lists(content: Any, path: Path, *names: str) -> Iterator[list[Any]]:
    """The lists of objects of these names in a JSON object."""
    for name in names:
        value = content.get(name) if isinstance(content, Mapping) else None
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise InputError(
                f"{str(path)!r} has no list {name!r} of objects, so it is not of this layout. Name another KIND."
            )
        yield value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8. Save it as UTF-8.") from error
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Numbered JSON objects of a file with one a line, or why a line holds none."""
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"The line is not JSON: {error}."
            continue
        yield number, row if isinstance(row, dict) else f"The line is JSON of type {type(row).__name__}."


def _texts(values: Iterable[object]) -> tuple[str, ...]:
    return tuple(value if isinstance(value, str) else "" for value in values)


def _named(name: object, where: str, folder: Path, texts: tuple[str, ...]) -> Item | Skipped:
    """An image by its name in a folder."""
    if not isinstance(name, str) or not name:
        return Skipped(where, "It names no image.")
    return Item(name, folder / name, texts)


def coco(layout: Layout) -> Found:
    """COCO's captions JSON: `images` and `annotations`; the first five captions of each image, as in the reference."""
    path = layout.file("**/captions_val2017.json")
    content = _content(path)
    images, annotations = _lists(content, path, "images", "annotations")
    captions: dict[str, list[object]] = {}
    for one in annotations:
        captions.setdefault(str(one.get("image_id")), []).append(one.get("caption"))
    here = Layout(path, layout.images, layout.split)
    folder = here.folder("val2017", "../val2017", "../images/val2017", "images", "../images")
    for one in images:
        texts = _texts(captions.pop(str(one.get("id")), [])[:CAPTIONS])
        yield _named(one.get("file_name"), f"image {one.get('id')}", folder, texts)
    for number, others in captions.items():
        yield Skipped(f"image_id {number}", f"Captions of an image that is not listed: {len(others)}.")


def karpathy(layout: Layout) -> Found:
    """Karpathy's splits of COCO and Flickr30k (`dataset_coco.json`, `dataset_flickr30k.json`)."""
    path = layout.file(KARPATHY_FILES)
    if len(several := sorted(one.name for one in layout.path.glob(KARPATHY_FILES))) > 1:
        raise InputError(f"{str(layout.path)!r} holds {', '.join(several)}. Name one of them.")
    (images,) = _lists(_content(path), path, "images")
    folder = Layout(path, layout.images, layout.split).folder("images", "flickr30k-images", "../images")
    splits = {str(one.get("split")) for one in images}
    if layout.split not in splits:
        raise InputError(f"{str(path)!r} has no split {layout.split!r}; there are {', '.join(sorted(splits))}.")
    for one in images:
        if one.get("split") == layout.split:
            parts = (one.get("filepath"), one.get("filename"))
            name = "/".join(part for part in parts if isinstance(part, str) and part)
            sentences = one.get("sentences")
            found = [one for one in sentences if isinstance(one, dict)] if isinstance(sentences, list) else []
            texts = _texts(sentence.get("raw") for sentence in found[:CAPTIONS])
            yield _named(name, f"imgid {one.get('imgid')}", folder, texts)


def flickr(layout: Layout) -> Found:
    """Flickr30k: the token file (`NAME.jpg#0<TAB>caption`), or a CSV with `image,caption`; all images of it."""
    path = layout.file("*.token") if not layout.path.is_dir() or any(layout.path.glob("*.token")) else layout.path
    if path.is_dir():
        path = layout.file("*.csv") if any(path.glob("*.csv")) else layout.file("captions.txt")
    folder = Layout(path, layout.images, layout.split).folder("flickr30k-images", "images", "Images")
    captions: dict[str, list[str]] = {}
    if path.suffix == ".token":
        for number, line in _lines(path):
            head, tab, text = line.rstrip("\r").partition("\t")
            name = re.sub(r"#\d+$", "", head)
            if not tab:
                yield Skipped(f"{path.name}:{number}", "The line has no tab between image and caption.")
            else:
                captions.setdefault(name, []).append(text)
    else:
        for number, row in csv_rows(path):
            if isinstance(row, str):
                yield Skipped(f"{path.name}:{number}", row)
            elif not {"image", "caption"} <= row.keys():
                named = ", ".join(map(repr, row))
                raise InputError(f"{str(path)!r} has the columns {named}; 'image' and 'caption' are needed.")
            else:
                captions.setdefault(row["image"], []).append(row["caption"])
    for name, texts in captions.items():
        yield Item(name, folder / name, tuple(texts))


def sharegpt4v(layout: Layout) -> Found:
    """ShareGPT4V's json: the first 1,000 rows, which the reference holds out of training."""
    path = layout.file("share-captioner_coco_lcs_sam_1246k_1107.json")
    folder = layout.images or path.parent
    for number, record in itertools.islice(_records(path), SHAREGPT4V_ROWS):
        name = f"{path.name}:{number}"
        if isinstance(record, str):
            yield Skipped(name, record)
        elif not isinstance(record[0], str) or not record[0]:
            yield Skipped(name, "It names no image.")
        else:
            yield Item(name, folder / record[0], _texts([record[1]]))


def _records(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        yield from records_from_json(path, Columns())
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8. Save it as UTF-8.") from error


def urban1k(layout: Layout) -> Found:
    """Urban1k: `image/N.jpg` and `caption/N.txt`, of which the first line is the caption, as in the reference."""
    folder = layout.folder("image")
    texts = layout.path / "caption"
    if not texts.is_dir() or not folder.is_dir():
        raise InputError(f"{str(layout.path)!r} has no folders 'image' and 'caption'. Name the folder of Urban1k.")
    pictures: dict[str, Path] = {}
    for path in sorted(one for one in folder.iterdir() if has_image_suffix(one)):
        if path.stem in pictures:
            yield Skipped(f"image/{path.name}", f"Its caption belongs to {pictures[path.stem].name!r} already.")
        else:
            pictures[path.stem] = path
    captions = {path.stem: path for path in texts.glob("*.txt")}
    for stem in sorted(pictures.keys() | captions.keys(), key=lambda one: (len(one), one)):
        if stem not in pictures:
            yield Item(f"caption/{stem}.txt", folder / f"{stem}.jpg", (_first_line(captions[stem]),))
        else:
            found = (_first_line(captions[stem]),) if stem in captions else ()
            yield Item(f"image/{pictures[stem].name}", pictures[stem], found)


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig", errors="replace").partition("\n")[0]


def docci(layout: Layout) -> Found:
    """DOCCI: `docci_descriptions.jsonlines` and `images/`; the split `test` has 5,000."""
    path = layout.file("*.jsonlines")
    folder = Layout(path, layout.images, layout.split).folder("images")
    for number, row in _objects(path):
        if isinstance(row, str):
            yield Skipped(f"{path.name}:{number}", row)
        elif row.get("split") == layout.split:
            yield _named(row.get("image_file"), f"{path.name}:{number}", folder, _texts([row.get("description")]))


def iiw(layout: Layout) -> Found:
    """ImageInWords: `data.jsonl` with the text `IIW` and the image `image/key` (IIW-400) or `image`."""
    path = layout.file("data.jsonl")
    folder = Layout(path, layout.images, layout.split).folder("images", "image")
    for number, row in _objects(path):
        if isinstance(row, str):
            yield Skipped(f"{path.name}:{number}", row)
            continue
        nested = row.get("image")
        key = row.get("image/key") or (nested.get("key") if isinstance(nested, dict) else nested)
        if not isinstance(key, str) or not key:
            yield Skipped(f"{path.name}:{number}", "It names no image ('image/key' or 'image').")
        else:
            yield Item(key, _with_suffix(folder / key), _texts([row.get("IIW")]))


def _with_suffix(path: Path) -> Path:
    """The file of a name that may lack its suffix."""
    found = (path.parent / (path.name + suffix) for suffix in _SUFFIXES)
    return path if path.is_file() else next((one for one in found if one.is_file()), path)


def dci(layout: Layout) -> Found:
    """DCI: `annotations/*-data.json` with `image`, `short_caption` and `extra_caption`, which are read as one text."""
    folder = layout.path / "annotations"
    files = sorted(folder.glob("*-data.json"))
    if not files:
        raise InputError(f"{str(folder)!r} holds no *-data.json. Name the folder of DCI, which has 'annotations'.")
    pictures = layout.folder("photos", "images")
    for file in files:
        try:
            row = _content(file)
        except InputError as error:
            yield Skipped(file.name, str(error))
            continue
        if not isinstance(row, dict) or not isinstance(row.get("image"), str):
            yield Skipped(file.name, "It names no image.")
            continue
        parts = _texts([row.get("short_caption"), row.get("extra_caption")])
        yield Item(file.name, pictures / row["image"], (" ".join(part.strip() for part in parts).strip(),))


READERS: Mapping[str, Callable[[Layout], Found]] = {
    "coco": coco,
    "karpathy": karpathy,
    "flickr": flickr,
    "sharegpt4v": sharegpt4v,
    "urban1k": urban1k,
    "docci": docci,
    "iiw": iiw,
    "dci": dci,
}
"""KIND -> its reader."""
