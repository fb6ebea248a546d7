"""Procedural scenes: pictures with short and long captions, drawn from a seed, and their near-identical twins.

The world is small and combinatorial: 24 kinds of things in 10 colours, 5 textures and 3 sizes, four to seven of them in
a grid of 3 x 3 before one of 8 backgrounds. A scene needs no file and no download: `scene(seed, index)` gives its
symbols, `render` its picture, `short_caption` and `long_caption` its texts, `twin` a scene that differs in one detail.
"""

from __future__ import annotations

import json
from pathlib import Path

from longclip_rt.errors import LongClipError
from longclip_rt.system.files import directory_in_the_making
from longclip_rt.train.scenes.captions import long_caption, sentence_captions, short_caption
from longclip_rt.train.scenes.drawing import contact_sheet, render
from longclip_rt.train.scenes.twins import (
    ATTRIBUTES,
    Twin,
    detail_position,
    twin,
    with_another_detail,
    with_another_kind,
)
from longclip_rt.train.scenes.words import CELLS, COLOURS, KINDS, SETTINGS, SIZES, TEXTURES, class_prompt
from longclip_rt.train.scenes.world import Relation, Scene, Thing, scene

__all__ = [
    "ATTRIBUTES",
    "CELLS",
    "COLOURS",
    "KINDS",
    "SETTINGS",
    "SIZES",
    "TEXTURES",
    "Relation",
    "Scene",
    "Thing",
    "Twin",
    "class_prompt",
    "contact_sheet",
    "detail_position",
    "long_caption",
    "main_kind",
    "render",
    "scene",
    "sentence_captions",
    "short_caption",
    "twin",
    "with_another_detail",
    "with_another_kind",
    "write_scenes",
]

PAIRS_FILE = "scenes.jsonl"


def main_kind(scene: Scene) -> str:
    """The kind of the main thing, one of `KINDS`: the scene's class in zero-shot classification."""
    return scene.things[0].kind


def write_scenes(folder: str | Path, count: int, seed: int = 0, size: int = 224) -> Path:
    """Writes scenes 0 to count - 1 as PNG images, and their captions as JSON lines.

    Args:
        folder: The folder to make; it must not exist.
        count: Number of scenes, at least 1.
        seed: As in `scene`.
        size: Side of the images in pixels.

    Returns:
        The file `scenes.jsonl`, whose lines hold "image" (a path relative to it), "caption" (long) and "short_caption".

    Raises:
        OutputError: The folder exists or cannot be written.
        LongClipError: A number is out of range.
    """
    if count < 1:
        raise LongClipError(f"{count} scenes cannot be written; ask for at least 1.")
    folder = Path(folder)
    with directory_in_the_making(folder) as staging:
        images = staging / "images"
        images.mkdir()
        with (staging / PAIRS_FILE).open("w", encoding="utf-8") as lines:
            for index in range(count):
                drawn = scene(seed, index)
                name = f"images/{index:07}.png"
                render(drawn, size).save(staging / name)
                row = {"image": name, "caption": long_caption(drawn), "short_caption": short_caption(drawn)}
                lines.write(json.dumps(row) + "\n")
    return folder / PAIRS_FILE
