"""`longclip-rt search`: the stored embeddings nearest to a text or an image."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from longclip_rt.commands.options import runs_the_model

if TYPE_CHECKING:
    from longclip_rt.search.nearest import Answer, Kind

_LEAST_ID_WIDTH = 20


def _page_name(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuses a name that is no page's: a slip of the hand must not replace the embeddings or a photograph."""
    if value is not None and value.suffix.lower() not in (".html", ".htm"):
        raise click.BadParameter(f"{str(value)!r} should end with .html")
    return value


@click.command()
@click.argument("embeddings", type=click.Path(path_type=Path))
@click.argument("query")
@click.option(
    "-k", "k", type=click.IntRange(min=1), default=5, show_default=True, metavar="N", help="How many hits to show."
)
@click.option("--text", "query_kind", flag_value="text", default=None, help="QUERY is a text, whatever it looks like.")
@click.option("--image", "query_kind", flag_value="image", help="QUERY is the path of an image.")
@click.option(
    "--kind",
    type=click.Choice(["image", "text", "all"]),
    default="all",
    show_default=True,
    help="Search among images or among texts only.",
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The model that made EMBEDDINGS. Default: the known bundle with the hash that the file names.",
)
@runs_the_model
@click.option(
    "--pca",
    metavar="FILE",
    help="The PCA that made EMBEDDINGS, where they are PCA vectors and the bundle does not carry it.",
)
@click.option("--exact", is_flag=True, help="Compare with every vector, though EMBEDDINGS has an index.")
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    callback=_page_name,
    help="Also write a page with thumbnails and scores; it is one file and loads nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line: rank, score, id, kind, row.")
def search(
    embeddings: Path,
    query: str,
    k: int,
    query_kind: Kind | None,
    kind: str,
    bundle: Path | None,
    backend: str,
    precision: str,
    pca: str | None,
    exact: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Find what is nearest to QUERY in EMBEDDINGS, a file that `longclip-rt embed` wrote.

    QUERY is a text, or an image if it is the path of an existing file with an image's suffix. The score is the cosine
    similarity. The answer is exact, but approximate where a .lance or .faiss has an index; stderr says which. Texts and
    images score on different levels: to rank images for a text, add --kind image.

    \b
    Examples:
      longclip-rt search files.parquet "an espresso in a red cup" --kind image
      longclip-rt search files.parquet "$(cat description.txt)" -k 20 --html gallery.html
      longclip-rt search files.parquet photo.jpg -k 3 --json
      longclip-rt search files.lance "an espresso" --exact
      longclip-rt search short.parquet "an espresso" --pca pca.safetensors
    """
    from longclip_rt.search.nearest import search_query

    answer = search_query(
        embeddings,
        query,
        k,
        query_kind=query_kind,
        kinds=None if kind == "all" else (kind,),
        bundle=bundle,
        backend=backend,
        precision=precision,
        pca=pca,
        exact=exact,
    )
    for note in _notes(answer):
        click.echo(note, err=True)
    if as_json:
        for hit in answer.hits:
            click.echo(json.dumps(asdict(hit), ensure_ascii=False))
    elif answer.hits:
        click.echo(_table(answer))
    if html is not None:
        from longclip_rt.search.gallery import save_gallery

        save_gallery(answer, html)
        click.echo(f"Wrote {html}.", err=True)


def _notes(answer: Answer) -> list[str]:
    notes = []
    if not answer.trained:
        notes.append("The model is untrained, so the ranking means nothing.")
    if answer.truncated:
        notes.append(f"The query has {answer.tokens} tokens, more than the model reads; only its beginning was used.")
    if not answer.hits:
        notes.append(f"There is nothing of that kind in {answer.path}.")
    if answer.index:
        notes.append(f"Approximate: found by the {answer.index} index, which may miss some of the nearest.")
    elif answer.path.suffix in (".lance", ".faiss"):
        notes.append("Exact: compared with every vector.")
    return notes


def _table(answer: Answer) -> str:
    """Ranks, scores, kinds and ids; ids are cut to the terminal's width, but not when a program reads the output."""
    width = max(len("rank"), len(str(len(answer.hits))))
    head = f"{'rank':>{width}}  {'score':>7}  kind   "
    room = None
    if sys.stdout.isatty():
        room = max(_LEAST_ID_WIDTH, shutil.get_terminal_size().columns - len(head))
    rows = [f"{hit.rank:>{width}}  {hit.score:>7.4f}  {hit.kind:<5}  {_one_line(hit.id, room)}" for hit in answer.hits]
    return "\n".join([head + "id", *rows])


def _one_line(id_: str, room: int | None) -> str:
    """An id on one line, without characters that would steer the terminal."""
    line = "".join(character if character.isprintable() else " " for character in id_)
    return line if room is None or len(line) <= room else line[: room - 1] + "…"
