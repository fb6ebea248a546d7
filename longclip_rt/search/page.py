"""What a page that stands alone is made of: its frame and style, tiles for pictures and words. No script, no links."""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from longclip_rt.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

# Twice the width of a card, for displays with two device pixels to a CSS pixel.
THUMBNAIL_PIXELS = 560
# More than a card shows; the rest is cut off by the style sheet.
SNIPPET_CHARACTERS = 700
# Texts up to this length are set in larger type, to fill their tile.
_SHORT_TEXT = 130
# Pillow's own limit, above which it only warns.
_MAX_PIXELS = 178_956_970

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

STYLE = """
:root { color-scheme: light dark; --page: #f4f3ef; --card: #fff; --tile: #e9e7e1; --ink: #1c1e21; --soft: #666b73;
  --line: #dedbd3; --accent: #17695b; --track: #e4e2db; --warn: #fff3d1; --warn-ink: #6b4700; --warn-line: #ecca78; }
@media (prefers-color-scheme: dark) { :root { --page: #121316; --card: #1b1d21; --tile: #24272c; --ink: #ebebed;
  --soft: #9ba1aa; --line: #2d3036; --accent: #58c4ad; --track: #2b2e34; --warn: #33290f; --warn-ink: #f3d68b;
  --warn-line: #5d4a17; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
header, main, footer { max-width: 82rem; margin: 0 auto; padding: 0 clamp(1rem, 3vw, 2.5rem); }
header { padding-top: clamp(1.5rem, 4vw, 3rem); padding-bottom: 1.75rem; }
.warning { background: var(--warn); color: var(--warn-ink); border-bottom: 1px solid var(--warn-line); margin: 0;
  padding: .7rem clamp(1rem, 3vw, 2.5rem); text-align: center; font-size: .925rem; }
.eyebrow { margin: 0 0 .6rem; color: var(--accent); font-size: .75rem; font-weight: 700; letter-spacing: .09em;
  text-transform: uppercase; }
.query { display: flex; gap: clamp(1rem, 3vw, 2rem); align-items: center; }
.query img { display: block; max-width: min(15rem, 42vw); max-height: 13rem; border-radius: 10px; }
h1 { margin: 0; font-weight: 650; font-size: clamp(1.35rem, 3.4vw, 2.1rem); line-height: 1.25; letter-spacing: -.015em;
  max-width: 46ch; overflow-wrap: anywhere; unicode-bidi: plaintext; }
h1.long { font-size: clamp(1rem, 1.6vw, 1.15rem); font-weight: 500; line-height: 1.6; letter-spacing: 0;
  max-width: 82ch; }
.about { margin: .8rem 0 0; color: var(--soft); font-size: .925rem; overflow-wrap: anywhere; }
.grid { list-style: none; margin: 0; padding: 0; display: grid; gap: clamp(.9rem, 1.6vw, 1.4rem);
  grid-template-columns: repeat(auto-fill, minmax(min(14.5rem, 100%), 1fr)); }
.card { container-type: inline-size; display: flex; flex-direction: column; min-width: 0;
  overflow: hidden; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; box-shadow: 0 1px 2px rgb(0 0 0 / .05); }
.tile { aspect-ratio: 1; --lines: 9; background: var(--tile); overflow: hidden; }
.tile img { display: block; width: 100%; height: 100%; object-fit: cover; }
.words { padding: 1.15rem 1.2rem; border-top: 3px solid var(--accent); background: none; }
.words p { margin: 0; font-size: .92rem; line-height: 1.5; max-height: 100%; overflow: hidden; overflow-wrap: anywhere;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: var(--lines); line-clamp: var(--lines);
  unicode-bidi: plaintext; }
.words p.short { font-size: 1.15rem; line-height: 1.4; --lines: 7; }
.absent { display: flex; flex-direction: column; align-items: center; justify-content: center; gap: .6rem;
  padding: 1rem; text-align: center; color: var(--soft); font-size: .875rem; }
.absent svg { width: 2.4rem; height: 2.4rem; opacity: .7; }
.facts { margin-top: auto; padding: .8rem 1.15rem 1rem; }
.numbers { display: flex; align-items: baseline; justify-content: space-between; font-variant-numeric: tabular-nums; }
.rank { color: var(--soft); font-size: .875rem; }
.score { font-weight: 650; }
.bar { height: 4px; margin: .4rem 0 .65rem; border-radius: 2px; background: var(--track); overflow: hidden; }
.bar span { display: block; height: 100%; border-radius: 2px; background: var(--accent); }
.id { margin: 0; color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; unicode-bidi: plaintext;
  overflow: hidden; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; line-clamp: 3; }
.none { padding: 3rem 1rem; border: 1px dashed var(--line); border-radius: 12px; text-align: center;
  color: var(--soft); }
footer { margin-top: 2.5rem; padding-bottom: 2.5rem; color: var(--soft); font-size: .8rem; }
footer dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 0; padding-top: 1.1rem;
  border-top: 1px solid var(--line); }
footer dt { font-weight: 650; color: var(--ink); }
footer dd { margin: 0; overflow-wrap: anywhere; }
footer p { margin: 1rem 0 0; }
@container (min-width: 17.5rem) { .tile { --lines: 10; } }
@container (max-width: 14.9rem) { .tile { --lines: 7; } .words { padding: .8rem .85rem; } .words p { font-size: .8rem; }
  .words p.short { font-size: .95rem; --lines: 6; } .facts { padding: .65rem .85rem .8rem; }
  .id { font-size: .72rem; } }
@container (max-width: 11rem) { .tile { --lines: 6; } .words p.short { font-size: .85rem; } }
@media (max-width: 34rem) { .grid { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
""".strip()

_ABSENT_ICON = (
    '<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="1.4" stroke-linecap="round" '
    'stroke-linejoin="round" aria-hidden="true"><rect x="3" y="4.5" width="18" height="15" rx="2"/>'
    '<path d="M3 16l4.5-4.5 3.5 3.5M13 16l3-3 5 5M4 21L20 3"/></svg>'
)


def page(title: str, body: str, style: str = "") -> str:
    """A whole page: one HTML file that runs no script and loads nothing.

    Args:
        title: Of the window, unescaped.
        body: HTML.
        style: Rules that are added to the common ones.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escaped(title)}</title>
<style>
{STYLE}{style}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def picture_tile(path: Path, name: str) -> str:
    """A square with a picture.

    Raises:
        InputError: It cannot be shown, with a reason of a few words.
    """
    return f'<div class="tile"><img src="{data_uri(open_picture(path))}" alt="{escaped(name)}"></div>'


def absent_tile(reason: str) -> str:
    """A square that says why nothing is there."""
    return f'<div class="tile absent">{_ABSENT_ICON}<span>{escaped(reason)}</span></div>'


def words_tile(words: str) -> str:
    """A square with the beginning of a text."""
    words = " ".join(words.split())
    if len(words) > SNIPPET_CHARACTERS:
        words = words[:SNIPPET_CHARACTERS] + "…"
    size = ' class="short"' if len(words) <= _SHORT_TEXT else ""
    return f'<div class="tile words"><p{size}>{escaped(words)}</p></div>'


def open_picture(path: Path) -> Image.Image:
    """A small RGB copy of a picture, upright, its transparent parts white.

    Raises:
        InputError: The picture cannot be decoded, with a reason of a few words.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata and sizes near the limit, of no interest on this page
            with Image.open(path) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise InputError(f"too many pixels ({image.width} × {image.height})")
                # Lets JPEG decode at a fraction of its size.
                image.draft("RGB", (2 * THUMBNAIL_PIXELS, 2 * THUMBNAIL_PIXELS))
                upright = ImageOps.exif_transpose(image)
                return _on_white(upright)
    except Image.DecompressionBombError as error:
        raise InputError("too many pixels") from error
    except UnidentifiedImageError as error:
        raise InputError("not a picture, or of an unknown format") from error
    except FileNotFoundError as error:
        raise InputError("file not found") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise for damaged files
        raise InputError("the picture is incomplete or damaged") from error


def _on_white(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # 16 and 32 bits a pixel, which convert("RGB") would clip to white
        values = np.asarray(image, np.float64)
        low, high = float(values.min()), float(values.max())
        image = Image.fromarray(((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    return image


def jpeg(image: Image.Image) -> bytes:
    """A picture as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def data_uri(image: Image.Image) -> str:
    """A picture as the address of an image, JPEG."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(image)).decode("ascii")


def number(score: float) -> str:
    """A score with four digits."""
    return f"{score:.4f}".replace("-", "\N{MINUS SIGN}")


def escaped(value: str) -> str:
    """Escaped for element content and for attributes in double quotes."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", value))
