"""One self-contained HTML page for the hits of a search: no script, and nothing is loaded from anywhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from longclip_rt.errors import InputError
from longclip_rt.search.page import (
    SNIPPET_CHARACTERS,
    absent_tile,
    data_uri,
    escaped,
    number,
    open_picture,
    page,
    picture_tile,
    words_tile,
)
from longclip_rt.version import __version__

if TYPE_CHECKING:
    from longclip_rt.search.hits import Hit
    from longclip_rt.search.nearest import Answer


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
    body = f"{_warning(answer)}{_header(answer)}\n<main>\n{grid}\n</main>\n{_footer(answer)}"
    return page(f"{title} · longclip-rt search", body)


def _warning(answer: Answer) -> str:
    if answer.trained:
        return ""
    return '<p class="warning" role="note"><strong>The model is untrained</strong>, so the ranking means nothing.</p>\n'


def _header(answer: Answer) -> str:
    count = len(answer.hits)
    found = f"{count or 'no'} nearest {'neighbour' if count == 1 else 'neighbours'} in {escaped(answer.path.name)}"
    if answer.index:
        found += f" · approximate, by the {answer.index} index"
    if answer.truncated:
        found += f" · the query has {answer.tokens} tokens, and only its beginning was used"
    size = ' class="long"' if len(answer.query) > 160 else ""
    heading = f"<h1{size}>{escaped(answer.query)}</h1>"
    picture = ""
    if answer.query_kind == "image":
        heading = f"<h1>{escaped(Path(answer.query).name)}</h1>"
        try:
            picture = f'<img src="{data_uri(open_picture(Path(answer.query)))}" alt="{escaped(answer.query)}">'
        except InputError as error:
            picture = f'<p class="about">{escaped(str(error))}</p>'
    return (
        f'<header>\n<p class="eyebrow">{answer.query_kind} query</p>\n<div class="query">{picture}<div>{heading}\n'
        f'<p class="about">{found}</p></div></div>\n</header>'
    )


def _card(hit: Hit, best: float, folders: list[Path], ids_are_texts: bool) -> str:
    inline = hit.kind == "text" and (ids_are_texts or not hit.id.lower().endswith(".txt"))
    width = 100 * max(0.0, hit.score) / best if best > 0 else 0.0
    try:
        if hit.kind == "image":
            tile = picture_tile(_find(hit.id, folders), hit.id)
        else:
            tile = words_tile(hit.id if inline else _beginning(_find(hit.id, folders)))
    except InputError as error:
        tile = absent_tile(str(error))
    name = f"row {hit.row}" if inline else hit.id  # a text that is its own id stands in the tile already
    return (
        f'<li class="card">{tile}<div class="facts"><div class="numbers"><span class="rank">#{hit.rank}</span>'
        f'<span class="score">{number(hit.score)}</span></div>'
        f'<div class="bar" aria-hidden="true"><span style="width:{width:.1f}%"></span></div>'
        f'<p class="id" title="{escaped(name)}">{escaped(name)}</p></div></li>'
    )


def _beginning(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(4 * SNIPPET_CHARACTERS).decode("utf-8-sig", "replace")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}") from error


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
    rows = "".join(f"<div><dt>{name}</dt><dd>{escaped(value)}</dd></div>" for name, value in facts.items() if value)
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
