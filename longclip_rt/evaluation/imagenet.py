"""ImageNet-1k's validation images: a folder for each WordNet id, or one folder and Kaggle's table of answers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longclip_rt.errors import InputError
from longclip_rt.evaluation.collection import Skipped
from longclip_rt.system.extras import require
from longclip_rt.system.files import has_image_suffix
from longclip_rt.train.data.table_files import csv_rows

_WNID = re.compile(r"n\d{8}")
_USUAL = ("", "val", "validation", "ILSVRC2012_img_val", "Data/CLS-LOC/val", "ILSVRC/Data/CLS-LOC/val")
ANSWERS = "LOC_val_solution.csv"

Loaded = tuple[tuple[Path, ...], NDArray[np.int64], tuple[str, ...], tuple[str, ...], tuple[Skipped, ...]]
"""Images, labels int64 [N], WordNet ids and names of the classes, and what takes no part."""


def imagenet_folder(path: Path) -> Path | None:
    """The folder with a folder for each WordNet id, or with the images that Kaggle's table is about."""
    for name in _USUAL:
        folder = path / name
        if folder.is_dir() and any(_WNID.fullmatch(one.name) for one in folder.iterdir()):
            return folder
    if (path / ANSWERS).is_file():
        return next((path / name for name in reversed(_USUAL) if (path / name).is_dir()), None)
    return None


def load_imagenet(path: Path) -> Loaded:
    """Reads the validation images; the names of the classes are open_clip's, in the order of the WordNet ids.

    Raises:
        InputError: It is not of this layout, or has classes that are not of ImageNet-1k.
        MissingExtraError: open_clip is not installed.
    """
    folder = imagenet_folder(path)
    if folder is None:
        raise InputError(
            f"{str(path)!r} is not ImageNet's layout: expected a folder for each WordNet id (n01440764, ...), or "
            f"{ANSWERS} beside the images."
        )
    names: tuple[str, ...] = tuple(require("open_clip", "evaluate").IMAGENET_CLASSNAMES)
    wnids: tuple[str, ...] = tuple(require("timm.data", "evaluate").ImageNetInfo("imagenet-1k").label_names())
    place = {wnid: number for number, wnid in enumerate(wnids)}
    images, labels, skipped = [], [], []
    if (path / ANSWERS).is_file() and not any(_WNID.fullmatch(one.name) for one in folder.iterdir()):
        for number, row in csv_rows(path / ANSWERS):
            wnid = row.get("PredictionString", "").split(" ")[0] if isinstance(row, dict) else ""
            if wnid not in place or isinstance(row, str):
                skipped.append(Skipped(f"{ANSWERS}:{number}", "The row names no class of ImageNet-1k."))
            else:
                images.append(folder / f"{row.get('ImageId')}.JPEG")
                labels.append(place[wnid])
    else:
        for sub in sorted(one for one in folder.iterdir() if one.is_dir()):
            if sub.name not in place:
                skipped.append(Skipped(sub.name, "The folder is no class of ImageNet-1k."))
                continue
            found = sorted(one for one in sub.iterdir() if has_image_suffix(one))
            images += found
            labels += [place[sub.name]] * len(found)
    if not images:
        raise InputError(f"{str(folder)!r} holds no image of ImageNet-1k's classes.")
    return tuple(images), np.array(labels, np.int64), wnids, names, tuple(skipped)
