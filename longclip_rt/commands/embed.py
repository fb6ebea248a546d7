"""`longclip-rt embed`: images and texts to vectors in one file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longclip_rt.commands.bar import Bar
from longclip_rt.commands.options import KEY_VARIABLE, SectionedCommand, gpu_numbers, runs_the_model, takes_a_pca
from longclip_rt.system.streams import told_at_best

if TYPE_CHECKING:
    from longclip_rt.embedding.pipeline import EmbedOptions, EmbedReport

_SUFFIXES = (".parquet", ".npy", ".jsonl", ".lance", ".faiss")
_STOPPED = "Stopped. Give the same command again to go on, or add --restart to begin anew."


def _output_name(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuses a format that is not known before anything is loaded; with --ray it is a folder or a URI."""
    if value is not None and context.params.get("ray") is None and Path(value).suffix not in _SUFFIXES:
        raise click.BadParameter(f"{value!r} should end with {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")
    return value


def _address(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuses what is no address: an option whose value may be left out takes the FILE behind it for one."""
    known = value is None or value in ("auto", "local") or re.fullmatch(r"(ray://)?[^/\s]+:\d+", value)
    if not known:
        raise click.BadParameter(f"{value!r} is no auto, local, HOST:PORT or ray://HOST:PORT; write --ray after FILE")
    return value


_SECTIONS = {
    "Input": ("texts", "column", "truncate", "max_stream"),
    "Output": ("output", "dtype", "index", "pca", "pca_mode", "overwrite", "allow_rejects"),
    "Model and machine": ("bundle", "server", "backend", "precision", "devices", "batch_size", "workers"),
    "Begun work": ("restart", "shard_size"),
    "Many machines": ("ray", "ray_actors"),
}


@click.command(cls=SectionedCommand, sections=_SECTIONS)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "-o",
    "--out",
    "output",
    metavar="FILE",
    callback=_output_name,
    help="Where to write: .parquet, .npy (with .ids.jsonl and .meta.json beside it), .jsonl (with .meta.json), .lance "
    "(a table of Lance and LanceDB) or .faiss (an index, with .ids.jsonl and .meta.json). Default: the list's stem "
    "with .parquet, in the working directory.",
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The model. Default: the newest exported one, else the built-in one.",
)
@click.option(
    "--server",
    metavar="URL",
    help="Let a `longclip-rt serve` encode, with its model; texts and images are prepared here. Its API key, "
    f"if any, is in the variable {KEY_VARIABLE}.",
)
@runs_the_model
@takes_a_pca
@click.option(
    "--devices",
    callback=gpu_numbers,
    metavar="LIST",
    help="Numbers of the GPUs to run on, all at once, such as 0,1. Default: the first one, or the CPU.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Most inputs in a batch. Default: the model's own.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads that decode images and tokenize texts. Default: one for each core.",
)
@click.option(
    "--truncate/--no-truncate",
    default=True,
    show_default=True,
    help="Cut texts that are longer than the context, and count them; or set them aside as rejects.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Number format of the vectors written.",
)
@click.option(
    "--index",
    type=click.Choice(["flat", "hnsw", "ivf-pq"]),
    default="flat",
    show_default=True,
    help="What .faiss is searched with; .lance takes flat and ivf-pq. flat is exact, the others approximate.",
)
@click.option("--texts", is_flag=True, help="Each line is itself a text, and not the name of a file.")
@click.option(
    "--column",
    metavar="NAME",
    help="Column of .jsonl and .parquet files. Default: with --texts `text` or `caption`, else `image` or `path`. "
    "With - it says that standard input is JSON Lines.",
)
@click.option("--allow-rejects", is_flag=True, help="Exit with status 0 though inputs were rejected.")
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@click.option("--restart", is_flag=True, help="Discard work that was begun earlier, instead of going on with it.")
@click.option(
    "--shard-size",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    metavar="N",
    help="Inputs that are committed together: a stopped run loses at most the shards in the making.",
)
@click.option(
    "--max-stream",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    metavar="GIB",
    callback=lambda context, parameter, value: value << 30,
    help="Most that standard input or a pipe may hold: it is copied beside the output first.",
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="auto",
    is_eager=True,  # what --out may be depends on it
    metavar="[ADDRESS]",
    callback=_address,
    help="Embed on a Ray cluster: auto (that of this machine, else a new one here), local, HOST:PORT or "
    "ray://HOST:PORT. --out is then a folder or a URI for parts; FILE may also be .tar and .parquet files, here or in "
    "object storage.",
)
@click.option(
    "--ray-actors",
    type=click.IntRange(min=1),
    metavar="N",
    help="Models that run at once. Default: one for each GPU, or for each machine without GPUs.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print no progress and no summary.")
def embed(
    files: tuple[str, ...],
    output: str | None,
    bundle: Path | None,
    server: str | None,
    backend: str,
    precision: str,
    pca: str | None,
    pca_mode: str,
    devices: tuple[int, ...] | None,
    allow_rejects: bool,
    ray: str | None,
    ray_actors: int | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Embed images and texts, and write one file of vectors.

    FILE is a list (any text file, a .txt file too), a folder, a glob in quotes, an image, a .jsonl or .parquet file, or
    - for standard input. Each line of a list names an image, or a .txt file that holds one text; with --texts each line
    is itself a text. Paths are looked up in the working directory, then in the list's folder. Empty lines are skipped,
    and so are lines that start with # in lists of files.

    Inputs that cannot be embedded are listed in OUTPUT.rejects.jsonl, and the exit status is then 1. A run that was
    stopped, even killed, goes on when the same command is given again; until it ends its work lies in OUTPUT.parts,
    which takes as much room as the output. The name of the output is printed on stdout.

    \b
    Examples:
      longclip-rt embed files.txt
      longclip-rt embed photos/ -o photos.parquet
      longclip-rt embed captions.txt --texts -o captions.npy --dtype float16
      longclip-rt embed files.txt -o files.lance --index ivf-pq
      longclip-rt embed files.txt --backend tensorrt --devices 0,1
      longclip-rt embed files.txt -o short.parquet --pca pca.safetensors
      longclip-rt embed pairs.jsonl --texts --column long_caption --no-truncate
      longclip-rt embed photos/ --server http://gpu-machine:8000
      longclip-rt embed s3://bucket/shards/ -o s3://bucket/vectors --ray --ray-actors 8
      find . -name '*.jpg' | longclip-rt embed - -o all.parquet --allow-rejects
    """
    from longclip_rt.system.interrupt import STATUS, ended_by_ctrl_c

    if server is not None and (bundle, backend, precision, devices) != (None, "auto", "auto", None):
        raise click.UsageError(
            "--server runs the server's own model: leave --bundle, --backend, --precision, --devices."
        )
    try:
        with ended_by_ctrl_c(_STOPPED):
            from longclip_rt.embedding.pipeline import EmbedOptions, embed_files, plan_embedding

            settings = EmbedOptions(**options)
            if ray is not None:
                opening = {"backend": backend, "precision": precision, "pca": pca, "pca_mode": pca_mode}
                rejects = _embed_on_ray(files, output, bundle, settings, ray, ray_actors, quiet, opening)
                if rejects and not allow_rejects:
                    click.get_current_context().exit(1)
                return
            # A slip in a name should show before a model is loaded.
            plan_embedding(files, output, settings)
            from longclip_rt.runtime import Embedder
            from longclip_rt.system.closing import closed_after

            if server is None:
                opened = Embedder.from_bundle(bundle, backend, precision, pca, pca_mode, devices)
            else:
                opened = Embedder.connect(server, os.environ.get(KEY_VARIABLE, ""), pca, pca_mode)
            with closed_after(opened) as embedder, Bar(quiet) as bar:
                report = embed_files(files, output, embedder, settings, bar)
    except KeyboardInterrupt:
        click.echo(_STOPPED, err=True)
        click.get_current_context().exit(STATUS)
    if not quiet:
        click.echo(_summary(report), err=True)
    with told_at_best():
        click.echo(report.output)
    if report.rejects is not None and not allow_rejects:
        click.get_current_context().exit(1)


def _embed_on_ray(
    files: tuple[str, ...],
    output: str | None,
    bundle: Path | None,
    settings: EmbedOptions,
    address: str,
    actors: int | None,
    quiet: bool,
    opening: dict[str, Any],
) -> int:
    """Embeds on a cluster, and returns how many inputs were rejected."""
    if output is None or Path(output).suffix in _SUFFIXES:
        raise click.UsageError("With --ray, name a folder or a URI for the parts with -o.")
    from longclip_rt.integrations.ray import embed_job

    where = None if address == "auto" else address
    with Bar(quiet, unit="parts") as bar:
        report = embed_job(files, output, bundle, settings, address=where, actors=actors, progress=bar, **opening)
    totals = report.totals
    if not quiet:
        click.echo(
            f"{output}: {_count(report.parts, 'part')}, {report.skipped:,} of them made before; "
            f"{_count(totals.rows, 'row')}, {totals.truncated:,} truncated, {_count(totals.rejects, 'reject')}.",
            err=True,
        )
    with told_at_best():
        click.echo(output)
    return totals.rejects


def _summary(report: EmbedReport) -> str:
    """What was done, in a few lines."""
    totals, skipped = report.totals, report.skipped
    lines = [
        f"{report.output}: {_count(totals.rows, 'row')}, {_count(totals.images, 'image')} and "
        f"{_count(totals.texts, 'text')}, {totals.truncated:,} of them truncated."
    ]
    if report.rejects is not None:
        lines.append(f"{_count(totals.rejects, 'reject')}, listed in {report.rejects}.")
    counts = ((skipped.empty, "empty line"), (skipped.comments, "comment"), (skipped.others, "other file"))
    left_out = [_count(count, name) for count, name in counts if count]
    if left_out:
        lines.append(f"Skipped: {', '.join(left_out)}.")
    if report.embedded:
        rate = report.embedded / max(report.seconds, 1e-9)
        lines.append(f"{_count(report.embedded, 'input')} in {report.seconds:.1f} s: {rate:.1f} a second.")
    else:
        lines.append("Nothing was left to embed.")
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
