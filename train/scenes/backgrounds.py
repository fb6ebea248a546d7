"""Backgrounds of procedural scenes: muted patterns, drawn once a process and cut out at an offset."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from longclip_rt.train.scenes.words import Colour

Pixels = npt.NDArray[np.float32]

# A kept pattern is this much wider and higher than a picture: the room in which the offset moves.
_ROOM = 1.5

# Colours in numpy's terms: float32 [3], 0 to 255.
_WATER, _SAND = np.array((120, 190, 220), np.float32), np.array((236, 216, 165), np.float32)
_CREST, _DEEP = np.array((165, 215, 225), np.float32), np.array((70, 145, 170), np.float32)
_EVENING, _GLOW = np.array((140, 95, 150), np.float32), np.array((250, 185, 115), np.float32)


def background(setting: str, size: int, offset: tuple[float, float]) -> Image.Image:
    """An RGB image of [size, size] pixels.

    Args:
        setting: Key of `SETTINGS`.
        size: Side in pixels.
        offset: (right, down), each in [0, 1). Backgrounds with a top and a bottom move to the right only.
    """
    pattern = _pattern(setting, size)
    left = int(offset[0] * (pattern.width - size))
    top = int(offset[1] * (pattern.height - size))
    return pattern.crop((left, top, left + size, top + size))


@functools.lru_cache(maxsize=64)
def _pattern(setting: str, size: int) -> Image.Image:
    width = round(_ROOM * size)
    height = size if setting in ("beach", "sunset") else width
    rng = np.random.default_rng(sum(map(ord, setting)))
    return _DRAWERS[setting](width, height, size / 96, rng)


def _noise(width: int, height: int, grain: float, rng: np.random.Generator) -> Pixels:
    """Smooth noise of [height, width], about -1 to 1, whose spots are `grain` pixels wide."""
    rough = rng.random((max(2, round(height / grain)) + 1, max(2, round(width / grain)) + 1), dtype=np.float32)
    smooth = Image.fromarray(rough * 255).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth, np.float32) / 127.5 - 1


def _tinted(base: Colour | Pixels, change: Pixels, strength: float) -> Image.Image:
    """A colour, or colours of [height, width, 3], made lighter and darker by `change` [height, width]."""
    pixels = np.asarray(base, np.float32) + strength * change[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _field(width: int, height: int, unit: float, rng: np.random.Generator) -> Image.Image:
    image = _tinted((150, 195, 110), _noise(width, height, 12 * unit, rng), 14)
    draw = ImageDraw.Draw(image)
    for x, y in rng.random((260, 2)) * (width, height):
        blade = [(x - 1.5 * unit, y - 3 * unit), (x, y), (x + 1.5 * unit, y - 3 * unit)]
        draw.line(blade, fill=(105, 160, 75), width=max(1, round(unit * 0.8)))
    return image


def _night(width: int, height: int, unit: float, rng: np.random.Generator) -> Image.Image:
    image = _tinted((28, 32, 78), _noise(width, height, 24 * unit, rng), 9)
    draw = ImageDraw.Draw(image)
    for x, y in rng.random((90, 2)) * (width, height):
        radius = 0.45 * unit
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(225, 225, 190))
    return image


def _beach(width: int, height: int, unit: float, rng: np.random.Generator) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    shore = (20 + 2 * np.sin(x / (7 * unit))) * unit
    base = np.where((y < shore)[..., None], _WATER, _SAND)
    base[np.abs(y - shore) < 1.5 * unit] = (250, 250, 250)
    return _tinted(base, rng.uniform(-1, 1, (height, width)).astype(np.float32), 11)


def _snow(width: int, height: int, unit: float, rng: np.random.Generator) -> Image.Image:
    image = _tinted((226, 234, 243), _noise(width, height, 16 * unit, rng), 14)
    draw = ImageDraw.Draw(image)
    for x, y in rng.random((110, 2)) * (width, height):
        draw.ellipse((x, y, x + 1.6 * unit, y + 1.6 * unit), fill=(255, 255, 255))
    return image


def _wall(width: int, height: int, unit: float, rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (width, height), (205, 203, 198))
    draw = ImageDraw.Draw(image)
    high, wide, gap = 10 * unit, 20 * unit, 1.6 * unit
    for row in range(int(height / high) + 1):
        for column in range(-1, int(width / wide) + 1):
            left, top = (column + row % 2 / 2) * wide, row * high
            gray = int(rng.integers(140, 165))
            draw.rectangle((left, top, left + wide - gap, top + high - gap), fill=(gray, gray, gray - 4))
    return image


def _floor(width: int, height: int, unit: float, rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    high = 12 * unit
    for row in range(int(height / high) + 1):
        shade = int(rng.integers(-12, 13))
        top = row * high
        draw.rectangle((0, top, width, top + high), fill=(205 + shade, 165 + shade, 120 + shade))
        draw.line((0, top, width, top), fill=(140, 100, 65), width=max(1, round(unit)))
        for x in rng.random(2) * width:
            draw.line((x, top, x, top + high), fill=(140, 100, 65), width=max(1, round(unit)))
    return image


def _sea(width: int, height: int, unit: float, rng: np.random.Generator) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / unit
    phase = y + 1.6 * np.sin(x / 4)
    crest = (phase % 8 < 1.4).astype(np.float32)
    base = np.where(crest[..., None] > 0, _CREST, _DEEP)
    return _tinted(base, _noise(width, height, 20 * unit, rng), 10).filter(ImageFilter.GaussianBlur(0.4 * unit))


def _sunset(width: int, height: int, unit: float, rng: np.random.Generator) -> Image.Image:
    share = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    base = (1 - share) * _EVENING + share * _GLOW
    clouds = _noise(width, height, 10 * unit, rng)
    stretched = Image.fromarray(clouds).resize((width * 3, height)).crop((0, 0, width, height))
    return _tinted(np.broadcast_to(base, (height, width, 3)), np.asarray(stretched), 14)


_DRAWERS = {
    "field": _field,
    "night": _night,
    "beach": _beach,
    "snow": _snow,
    "wall": _wall,
    "floor": _floor,
    "sea": _sea,
    "sunset": _sunset,
}
