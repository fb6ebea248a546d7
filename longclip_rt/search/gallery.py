"""One self-contained HTML page for the hits of a search: no script, and nothing is loaded from anywhere."""

from __future__ import annotations

import base64
import html
import io
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from longclip_rt.errors import InputError
from longclip_rt.version import __version__

if TYPE_CHECKING:
    from PIL import Image

    from longclip_rt.search.hits import Hit
    from longclip_rt.search.nearest import Answer

# Twice the width of a card, for displays with two device pixels to a CSS pixel.
THUMBNAIL_PIXELS = 560
# More than a card shows; the rest is cut off by the style sheet.
SNIPPET_CHARACTERS = 700
# Texts up to this length are set in larger type, to fill their tile.
_SHORT_TEXT = 130
# Pillow's own limit, above which it only warns.
_MAX_PIXELS = 178_956_970

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

_STYLE = """
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


def save_gallery(answer: Answer, target: str | Path) -> None:
    """Writes the page of `page_from_answer`; the file is whole or absent.

    Raises:
        OutputError: `target` cannot be written.
    """
    from longclip_rt.system.files import write_text_atomically

    write_text_atomically(Path(target), page_from_answer(answer))


def page_from_answer(answer: Answer) -> str:
    """HTML with the query, a card for each hit, and the model in the footer; pictures are inside as JPEG.

    Pictures and `.txt` files are looked up from the working directory, the folder of the embeddings and the folder of
    the list they came from; one that is missing or unreadable gets a tile with the reason.
    """
    best = max((hit.score for hit in answer.hits), default=0.0)
    folders = _folders(answer)
    ids_are_texts = answer.metadata.get("longclip_rt.lines_are") == "texts"
    cards = "\n".join(_card(hit, best, folders, ids_are_texts) for hit in answer.hits)
    grid = f'<ol class="grid">\n{cards}\n</ol>' if cards else '<p class="none">There is nothing of that kind.</p>'
    title = answer.query if len(answer.query) <= 80 else answer.query[:79] + "…"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(title)} · longclip-rt search</title>
<style>
{_STYLE}
</style>
</head>
<body>
{_warning(answer)}{_header(answer)}
<main>
{grid}
</main>
{_footer(answer)}
</body>
</html>
"""


def _warning(answer: Answer) -> str:
    if answer.trained:
        return ""
    return '<p class="warning" role="note"><strong>The model is untrained</strong>, so the ranking means nothing.</p>\n'


def _header(answer: Answer) -> str:
    count = len(answer.hits)
    found = f"{count or 'no'} nearest {'neighbour' if count == 1 else 'neighbours'} in {_text(answer.path.name)}"
    if answer.index:
        found += f" · approximate, by the {answer.index} index"
    if answer.truncated:
        found += f" · the query has {answer.tokens} tokens, and only its beginning was used"
    size = ' class="long"' if len(answer.query) > 160 else ""
    heading = f"<h1{size}>{_text(answer.query)}</h1>"
    picture = ""
    if answer.query_kind == "image":
        heading = f"<h1>{_text(Path(answer.query).name)}</h1>"
        try:
            picture = f'<img src="{_data_uri(_open_picture(Path(answer.query)))}" alt="{_text(answer.query)}">'
        except InputError as error:
            picture = f'<p class="about">{_text(str(error))}</p>'
    return (
        f'<header>\n<p class="eyebrow">{answer.query_kind} query</p>\n<div class="query">{picture}<div>{heading}\n'
        f'<p class="about">{found}</p></div></div>\n</header>'
    )


def _card(hit: Hit, best: float, folders: list[Path], ids_are_texts: bool) -> str:
    inline = hit.kind == "text" and (ids_are_texts or not hit.id.lower().endswith(".txt"))
    width = 100 * max(0.0, hit.score) / best if best > 0 else 0.0
    try:
        if hit.kind == "image":
            tile = _picture_tile(hit, folders)
        else:
            tile = _words_tile(hit.id if inline else _beginning(_find(hit.id, folders)))
    except InputError as error:
        tile = f'<div class="tile absent">{_ABSENT_ICON}<span>{_text(str(error))}</span></div>'
    name = f"row {hit.row}" if inline else hit.id  # a text that is its own id stands in the tile already
    return (
        f'<li class="card">{tile}<div class="facts"><div class="numbers"><span class="rank">#{hit.rank}</span>'
        f'<span class="score">{_number(hit.score)}</span></div>'
        f'<div class="bar" aria-hidden="true"><span style="width:{width:.1f}%"></span></div>'
        f'<p class="id" title="{_text(name)}">{_text(name)}</p></div></li>'
    )


def _picture_tile(hit: Hit, folders: list[Path]) -> str:
    picture = _data_uri(_open_picture(_find(hit.id, folders)))
    return f'<div class="tile"><img src="{picture}" alt="{_text(hit.id)}"></div>'


def _beginning(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(4 * SNIPPET_CHARACTERS).decode("utf-8-sig", "replace")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}") from error


def _words_tile(words: str) -> str:
    words = " ".join(words.split())
    if len(words) > SNIPPET_CHARACTERS:
        words = words[:SNIPPET_CHARACTERS] + "…"
    size = ' class="short"' if len(words) <= _SHORT_TEXT else ""
    return f'<div class="tile words"><p{size}>{_text(words)}</p></div>'


def _footer(answer: Answer) -> str:
    describe = answer.embedder
    facts = {
        "Model": describe.get("model", answer.metadata.get("longclip_rt.model", "unnamed")),
        "Bundle": describe.get("bundle", "")[:12],
        "Backend": f"{describe.get('backend', '')} {describe.get('backend_version', '')}".strip(),
        "Precision": describe.get("precision", ""),
        "PCA": f"{describe['pca'][:12]}, K = {describe['pca_k']}, {describe['pca_mode']}" if "pca" in describe else "",
        "Embeddings": str(answer.path),
    }
    rows = "".join(f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items() if value)
    return (
        f"<footer>\n<dl>{rows}</dl>\n<p>Scores are cosine similarities; a bar compares its score with the best one. "
        "Texts and images score on different levels: compare like with like. A tile shows the square in the middle of "
        f"a picture, as the model sees it. longclip-rt {__version__}</p>\n</footer>"
    )


def _folders(answer: Answer) -> list[Path]:
    """Where ids are looked up, in order: working directory, the embeddings' folder, the lists' folders."""
    home = answer.path.parent
    bases = [base for base in answer.metadata.get("longclip_rt.base", "").split(os.pathsep) if base]
    return [Path(), home, *(folder / base for base in bases for folder in (Path(), home))]


def _find(name: str, folders: list[Path]) -> Path:
    for folder in folders:
        try:
            if (folder / name).is_file():
                return folder / name
        except (OSError, ValueError):  # too long for a file name, or with a NUL
            break
    raise InputError("file not found")


def _open_picture(path: Path) -> Image.Image:
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


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _number(score: float) -> str:
    return f"{score:.4f}".replace("-", "\N{MINUS SIGN}")


def _text(value: str) -> str:
    """Escaped for element content and for attributes in double quotes."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", value))
