"""Draws procedural scenes with Pillow: stickers on a background, both kept for the next scene that needs them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from longclip_rt.errors import LongClipError
from longclip_rt.train.scenes.backgrounds import background
from longclip_rt.train.scenes.shapes import SHAPES
from longclip_rt.train.scenes.words import COLOURS, Colour
from longclip_rt.train.scenes.world import Scene

SMALLEST_IMAGE = 32

# Shares of the image's side. The row and the column of the main thing are wider than the others.
_SIDES = {"huge": 0.43, "big": 0.285, "small": 0.2}
_WIDE, _NARROW = 0.43, 0.285

# A sticker's drawing is this much larger than what is kept of it; images above 128 pixels need less.
_FINE, _COARSE = 4, 2

# There are 3,600 stickers (kinds, colours, textures, sizes) of one image size: 15 MB at 96 pixels, 70 MB at 224.
_KEPT_STICKERS = 4096

_LIGHT = (1.12, 0.84)  # Of a thing's top and bottom: it is lit from above.
_HALO: Colour = (255, 255, 255)
_OUTLINE: Colour = (25, 22, 28)
_DARK = 150  # Sum of red, green and blue below which a line in the outline's colour would not be seen.
_RIM = 0.1  # Thickness of a hollow thing, as a share of its side.
_HOLLOW = 0.3  # What a hollow thing lacks, at least, as a share of the body.


def render(scene: Scene, size: int = 96) -> Image.Image:
    """Draws a scene.

    Args:
        scene: What to draw.
        size: Side in pixels, at least 32.

    Returns:
        An RGB image of [size, size] pixels.

    Raises:
        LongClipError: The size is too small for textures to be seen.
    """
    if size < SMALLEST_IMAGE:
        raise LongClipError(f"Scenes cannot be drawn {size} pixels wide; ask for {SMALLEST_IMAGE} or more.")
    image = background(scene.setting, size, scene.offset)
    rows, columns = _edges(scene.things[0].cell[0], size), _edges(scene.things[0].cell[1], size)
    for thing in scene.things:
        sticker = _sticker(thing.kind, thing.colour, thing.texture, thing.size, size)
        if thing.flipped:
            sticker = ImageOps.mirror(sticker)
        row, column = thing.cell
        left = _placed(columns[column], columns[column + 1], sticker.width, thing.shift[0])
        top = _placed(rows[row], rows[row + 1], sticker.height, thing.shift[1])
        image.paste(sticker, (left, top), sticker)
    return image


def contact_sheet(scenes: Sequence[Scene], size: int = 96, columns: int = 8) -> Image.Image:
    """Draws scenes side by side, in rows of `columns`, for a look.

    Raises:
        LongClipError: There are no scenes, or no columns.
    """
    if not scenes or columns < 1:
        raise LongClipError(f"A contact sheet of {len(scenes)} scenes in {columns} columns is empty; give one or more.")
    gap = max(2, size // 24)
    rows = -(-len(scenes) // columns)
    width = min(columns, len(scenes)) * (size + gap) + gap
    sheet = Image.new("RGB", (width, rows * (size + gap) + gap), "white")
    for k, scene in enumerate(scenes):
        sheet.paste(render(scene, size), (gap + k % columns * (size + gap), gap + k // columns * (size + gap)))
    return sheet


def _edges(wide: int, size: int) -> list[float]:
    """The four borders of the three rows or columns, in pixels, where number `wide` holds the main thing."""
    edges = [0.0]
    for k in range(3):
        edges.append(edges[-1] + size * (_WIDE if k == wide else _NARROW))
    return edges


def _placed(start: float, end: float, length: int, shift: float) -> int:
    """Where a sticker begins: in the middle of its cell, moved by a share of the free room."""
    free = max(0.0, end - start - length)
    return round(start + (end - start - length) / 2 + shift * free / 2)


@functools.lru_cache(maxsize=_KEPT_STICKERS)
def _sticker(kind: str, colour: str, texture: str, size_word: str, size: int) -> Image.Image:
    """An RGBA picture of one thing with a dark outline and a light halo, as large as its size says.

    The two lines keep it visible on every background, also one of its own colour.
    """
    masks = _masks(kind, size_word, texture == "hollow", size)
    fill, contrast = COLOURS[colour]
    picture = Image.new("RGB", masks.mask.size, _HALO)
    picture.paste(_OUTLINE, mask=masks.outline)
    picture.paste(_textured(colour, texture, size_word, size), mask=masks.mask)
    picture.paste(contrast if sum(fill) < _DARK else _OUTLINE, mask=masks.ink)
    picture.putalpha(masks.halo)
    return picture.reduce(_scale(size))


@dataclass(frozen=True)
class _Masks:
    """Pictures of one side, with values 0 or 255.

    Attributes:
        mask: What has the thing's colour.
        ink: Lines and spots on it.
        outline: The thing and the dark line around it.
        halo: What is not transparent.
    """

    mask: Image.Image
    ink: Image.Image
    outline: Image.Image
    halo: Image.Image


@functools.lru_cache(maxsize=512)
def _masks(kind: str, size_word: str, hollow: bool, size: int) -> _Masks:
    """The masks of a sticker, before it is scaled down."""
    line = max(1.0, size / 96) * _scale(size)  # Width of the outline, and of the halo.
    full = round(_SIDES[size_word] * size) * _scale(size)
    margin = round(2 * line)
    inner = full - 2 * margin
    mask, ink = _silhouette(kind, inner, margin, full)
    outline, halo = _grown(mask, line), _grown(mask, 2 * line)
    if hollow:
        inside = _inside(mask, max(_RIM * inner, 1.6 * line))
        mask, outline, halo = (ImageChops.subtract(picture, inside) for picture in (mask, outline, halo))
        ink = ImageChops.multiply(ink, mask)
    return _Masks(mask, ink, outline, halo)


def _scale(size: int) -> int:
    """How much larger than in the image of `size` pixels a sticker is drawn."""
    return _FINE if size <= 128 else _COARSE


def _silhouette(kind: str, inner: int, margin: int, full: int) -> tuple[Image.Image, Image.Image]:
    """Mask and ink of a kind, each [full, full] with values 0 or 255; the shape is `margin` pixels from the border."""
    mask, ink = Image.new("L", (full, full)), Image.new("L", (full, full))
    on_mask, on_ink = ImageDraw.Draw(mask), ImageDraw.Draw(ink)
    for verb, what, numbers in SHAPES[kind]:
        draw = on_ink if verb == "ink" else on_mask
        value = 0 if verb == "hole" else 255
        if what == "line":
            points = [margin + number * inner for number in numbers[1:]]
            draw.line(points, fill=value, width=max(1, round(numbers[0] * inner)), joint="curve")
            continue
        points = [margin + number * inner for number in numbers]
        if what == "oval":
            draw.ellipse(points, fill=value)
        else:
            draw.polygon(points, fill=value)
    return mask, ImageChops.multiply(ink, mask)


def _grown(mask: Image.Image, pixels: float) -> Image.Image:
    """A mask whose border is moved outwards by about `pixels`: blurred, then cut below the half."""
    return mask.filter(ImageFilter.GaussianBlur(pixels)).point(lambda value: 255 if value > 40 else 0)


def _inside(mask: Image.Image, rim: float) -> Image.Image:
    """What a hollow thing lacks: all but a rim of about `rim` pixels, thinner where the thing itself is thin."""
    body = mask.histogram()[255]
    while True:
        inside = mask.filter(ImageFilter.GaussianBlur(rim)).point(lambda value: 255 if value > 215 else 0)
        if inside.histogram()[255] >= _HOLLOW * body or rim < 1:
            return inside
        rim *= 0.8


@functools.lru_cache(maxsize=512)
def _textured(colour: str, texture: str, size_word: str, size: int) -> Image.Image:
    """A square filled with a texture, as large as a sticker before it is scaled down."""
    fill, contrast = COLOURS[colour]
    side = round(_SIDES[size_word] * size) * _scale(size)
    # Small things get a finer pattern than large ones, but one that still spans several pixels of the image.
    pitch = round(0.13 * side + 0.02 * size * _scale(size))
    y, x = np.mgrid[0:side, 0:side]
    second: npt.NDArray[np.bool_] = np.zeros((side, side), bool)
    if texture == "striped":
        second = (x + y) % round(1.4 * pitch) < 0.55 * pitch
    elif texture == "checked":
        second = (x // (0.7 * pitch) + y // (0.7 * pitch)) % 2 == 1
    elif texture == "spotted":
        odd = (y // pitch % 2) * (pitch / 2)
        second = (((x + odd) % pitch) - pitch / 2) ** 2 + ((y % pitch) - pitch / 2) ** 2 < (0.31 * pitch) ** 2
    pixels = np.where(second[..., None], contrast, fill) * np.interp(y, (0, side), _LIGHT)[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
