"""A page with the worst misses: what was asked, what was chosen, and what was right. One file that loads nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longclip_rt.errors import InputError
from longclip_rt.evaluation.report import percent
from longclip_rt.evaluation.retrieval import CLIP_TOKENS
from longclip_rt.evaluation.retrieval_run import RetrievalReport
from longclip_rt.metrics import Places
from longclip_rt.model.tokenizer import Tokenizer
from longclip_rt.search.page import absent_tile, escaped, number, page, picture_tile

_STYLE = """
.misses { list-style: none; margin: 0; padding: 0; display: grid; gap: 1.4rem; }
.miss { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 1fr) minmax(0, 1fr); background: var(--card);
  border: 1px solid var(--line); border-radius: 12px; overflow: hidden; }
.miss.picture { grid-template-columns: minmax(0, 2fr) minmax(0, 3fr) minmax(0, 3fr); }
.miss > div { padding: 1.1rem 1.2rem; min-width: 0; } .miss > div + div { border-left: 1px solid var(--line); }
.miss .tile { border-radius: 8px; } .miss h3 { margin: 0 0 .6rem; font-size: .8rem; color: var(--soft);
  font-weight: 600; } .miss h3 b { color: var(--ink); }
.caption { margin: 0; font-size: .9rem; overflow-wrap: anywhere; unicode-bidi: plaintext; }
.caption mark { background: var(--warn); color: var(--warn-ink); border-radius: 3px; }
.caption s { color: var(--soft); }
.right { box-shadow: inset 0 3px var(--accent); }
h2 { margin: 2.2rem 0 1rem; font-size: 1.2rem; }
.miss .id { margin-top: .6rem; }
@media (max-width: 44rem) { .miss, .miss.picture { grid-template-columns: 1fr 1fr; }
  .miss > div:first-child { grid-column: 1 / 3; } }
"""


def save_misses(report: RetrievalReport, target: Path, count: int) -> None:
    """Writes the page of `page_of_misses`; the file is whole or absent.

    Raises:
        OutputError: `target` cannot be written.
    """
    from longclip_rt.system.files import write_text_atomically

    write_text_atomically(target, page_of_misses(report, count))


def page_of_misses(report: RetrievalReport, count: int) -> str:
    """HTML with the first model's worst misses in both directions, the worst first.

    Args:
        report: Of the evaluation.
        count: Most misses of each direction.
    """
    found = report.retrievals[0]
    captions = [_by_image(report, row) for row in worst(found.t2i, count)]
    images = [_by_caption(report, row) for row in worst(found.i2t, count)]
    shares = found.as_json()
    about = (
        f"{report.data.kind}: {shares['images']:,} images and {shares['texts']:,} captions. Of the captions "
        f"{percent(shares['t2i_r1'])}% find their image in first place, of the images {percent(shares['i2t_r1'])}% one "
        f"of their captions."
    )
    legend = (
        f"Words that CLIP's {CLIP_TOKENS} tokens do not reach are <mark>marked</mark>; words that this model does not "
        "reach are <s>struck out</s>."
    )
    warning = ""
    if report.made[0].made_by["trained"] != "true":
        warning = '<p class="warning" role="note"><strong>The model is untrained</strong>, so all of it is chance.</p>'
    body = (
        f'{warning}<header>\n<p class="eyebrow">worst misses</p>\n<h1>{escaped(report.made[0].label)}</h1>\n'
        f'<p class="about">{escaped(about)}</p>\n<p class="about caption">{legend}</p>\n</header>\n<main>\n'
        f"{_section('Captions that chose another image', captions)}\n"
        f"{_section('Images that chose a caption of another image', images)}\n</main>\n<footer></footer>"
    )
    return page("Worst misses · longclip-rt evaluate", body, _STYLE)


def worst(places: Places, count: int) -> NDArray[np.intp]:
    """The queries whose own targets come last, the worst first; those that found theirs are left out, int [n]."""
    missed = np.flatnonzero(places.above > 0)
    order: NDArray[np.intp] = missed[np.argsort(-places.ranks()[missed], kind="stable")][:count]
    return order


def _section(title: str, misses: list[str]) -> str:
    inside = "\n".join(misses)
    return f"<h2>{title}</h2>\n" + (
        f'<ol class="misses">\n{inside}\n</ol>' if misses else '<p class="none">There is none.</p>'
    )


def _by_image(report: RetrievalReport, row: int) -> str:
    places, kept = report.retrievals[0].t2i, report.kept
    text = report.collection.texts[int(kept.texts[row])]
    return (
        f'<li class="miss"><div><h3>Caption of <b>{report.retrievals[0].tokens[row]}</b> tokens</h3>'
        f"{marked(text, report.tokenizer)}</div>\n"
        f"{_answer('Chosen', _picture(report, int(places.rival[row])), 1, float(places.theirs[row]))}\n"
        f"{_answer('Right', _picture(report, int(places.best[row])), _place(places, row), float(places.own[row]))}</li>"
    )


def _by_caption(report: RetrievalReport, row: int) -> str:
    places, kept = report.retrievals[0].i2t, report.kept
    chosen, right = (
        marked(report.collection.texts[int(kept.texts[int(text)])], report.tokenizer)
        for text in (places.rival[row], places.best[row])
    )
    return (
        f'<li class="miss picture"><div><h3>Image</h3>{_picture(report, row)}</div>\n'
        f"{_answer('Chosen', chosen, 1, float(places.theirs[row]))}\n"
        f"{_answer('Right', right, _place(places, row), float(places.own[row]))}</li>"
    )


def _place(places: Places, row: int) -> int:
    return int(places.above[row]) + 1


def _answer(title: str, content: str, place: int, score: float) -> str:
    kind = ' class="right"' if title == "Right" else ""
    return f"<div{kind}><h3><b>{title}</b>, place {place:,}, {number(score)}</h3>{content}</div>"


def _picture(report: RetrievalReport, image: int) -> str:
    row = int(report.kept.images[image])
    name = report.collection.names[row]
    try:
        tile = picture_tile(report.collection.images[row], name)
    except InputError as error:
        tile = absent_tile(str(error))
    return f'{tile}<p class="id">{escaped(name)}</p>'


def marked(text: str, tokenizer: Tokenizer) -> str:
    """A caption as HTML: words beyond CLIP's tokens marked, words beyond the model's own struck out.

    No token spans a blank, so the tokens up to a word are the sum over the words. A word that is cut in the middle
    counts as beyond.
    """
    words = text.split()
    lengths = [tokens.length - 2 for tokens in tokenizer.encode(words)]  # each has a start and an end of its own
    reached = np.cumsum(lengths) + 2
    clip, context = (int(np.count_nonzero(reached <= limit)) for limit in (CLIP_TOKENS, tokenizer.context_length))
    parts = (("", words[:clip]), ("mark", words[clip:context]), ("s", words[max(clip, context) :]))
    pieces = []
    for tag, some in parts:
        if some:
            inside = escaped(" ".join(some))
            pieces.append(f"<{tag}>{inside}</{tag}>" if tag else inside)
    return f'<p class="caption">{" ".join(pieces)}</p>'
