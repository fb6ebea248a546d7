"""`longclip-rt evaluate`: retrieval and zero-shot classification, of one model or several side by side."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from longclip_rt.commands.bar import Bar
from longclip_rt.commands.options import SectionedCommand, runs_the_model

if TYPE_CHECKING:
    from longclip_rt.evaluation.collection import Skipped
    from longclip_rt.evaluation.models import ModelSpec

_STOPPED = "Stopped. Give the same command again to go on."
_TOLD = 3  # reasons that are printed; all of them are in the JSON

Function = TypeVar("Function", bound=Callable[..., Any])


class _Report(Protocol):
    """What both evaluations give."""

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What takes no part."""

    @property
    def computed(self) -> int:
        """Images and texts that were embedded."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""

    def as_csv(self) -> str:
        """For tables."""

    def as_markdown(self) -> str:
        """For people."""


def _with_suffix(*suffixes: str) -> Callable[[click.Context, click.Parameter, Path | None], Path | None]:
    def check(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
        """Refuses a name of another kind: a slip of the hand must not replace data."""
        if value is not None and value.suffix.lower() not in suffixes:
            raise click.BadParameter(f"{str(value)!r} should end with {' or '.join(suffixes)}")
        return value

    return check


def _file(name: str, text: str, *suffixes: str) -> Callable[[Function], Function]:
    kind: Any = click.Path(path_type=Path, dir_okay=False)
    return click.option(
        f"--{name}", f"{name}_file", type=kind, metavar="FILE", callback=_with_suffix(*suffixes), help=text
    )


def _compares(command: Function) -> Function:
    """Adds which models run, where the report goes, and what is kept."""
    options = (
        click.option(
            "--bundle",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="The model. Default: the newest exported one, else the built-in one.",
        ),
        runs_the_model,
        click.option(
            "--compare",
            multiple=True,
            metavar="WORDS",
            help="Another model beside it: a bundle's folder, a backend, a precision, with commas between. Repeatable.",
        ),
        click.option(
            "--baseline",
            metavar="WORDS",
            help="Likewise, and all others are compared with this one; `torch` is the torch towers in fp32.",
        ),
        click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Most inputs in a batch."),
        _file("json", "Also write all figures, what was skipped and what made them.", ".json"),
        _file("csv", "Also write the tables as CSV.", ".csv"),
        _file("markdown", "Also write the tables as Markdown.", ".md"),
        click.option(
            "--cache",
            type=click.Path(path_type=Path, file_okay=False),
            metavar="DIR",
            help="Where embeddings are kept, 10 GiB at most. Default: in the user's cache folder.",
        ),
        click.option("--fresh", is_flag=True, help="Remove what was kept of this data set first."),
        click.option("-q", "--quiet", is_flag=True, help="Print no progress and no notes."),
    )
    for option in reversed(options):
        command = option(command)
    return command


_SECTIONS = {
    "Models": ("bundle", "backend", "precision", "compare", "baseline", "batch_size"),
    "Begun work": ("cache", "fresh"),
}
_REPORT = ("json_file", "csv_file", "markdown_file")


@click.group()
def evaluate() -> None:
    """Measure how well a model retrieves and classifies.

    \b
    Examples:
      longclip-rt evaluate retrieval --data scenes:1000
      longclip-rt evaluate retrieval --data coco:annotations/captions_val2017.json --images val2017 --json coco.json
      longclip-rt evaluate zero-shot --data photos-by-class/
    """


@evaluate.command(
    cls=SectionedCommand,
    sections={
        "Data": ("data", "images", "split", "image_column", "long_column"),
        **_SECTIONS,
        "Report": (*_REPORT, "html_file", "misses"),
    },
)
@click.option(
    "--data",
    required=True,
    metavar="KIND:PATH",
    help="The data set, in its own layout: coco, karpathy, flickr, sharegpt4v, urban1k, docci, iiw, dci, table, "
    "webdataset or scenes.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder of the pictures. Default: where the layout has it.",
)
@click.option("--split", default="test", show_default=True, metavar="NAME", help="Of karpathy and docci.")
@click.option("--image-column", metavar="NAME", help="Of tables. Default: found by the usual names.")
@click.option("--long-column", metavar="NAME", help="The caption's, of tables and JSON in shards. Likewise.")
@_compares
@_file("html", "Also write a page with the worst misses; it is one file and loads nothing.", ".html", ".htm")
@click.option(
    "--misses", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="Of them on that page."
)
def retrieval(
    data: str,
    images: Path | None,
    split: str,
    image_column: str | None,
    long_column: str | None,
    html_file: Path | None,
    misses: int,
    **options: Any,
) -> None:
    """Retrieve images by captions and captions by images: recall at 1, 5 and 10, and the median rank.

    With several captions an image, image to text counts a hit for any of them. The figures are told apart by the length
    of the caption too, up to CLIP's 77 tokens and beyond. Embeddings are kept, and taken again where bundle and data
    are the same; a run that was stopped goes on when the same command is given again.

    \b
    Examples:
      longclip-rt evaluate retrieval --data scenes:1000
      longclip-rt evaluate retrieval --data karpathy:dataset_coco.json --images coco/ --json karpathy.json
      longclip-rt evaluate retrieval --data urban1k:Urban1k/ --baseline torch --compare onnxruntime,fp16
      longclip-rt evaluate retrieval --data table:pairs.parquet --long-column description --html misses.html
    """
    from longclip_rt.evaluation.data import data_from_name
    from longclip_rt.evaluation.retrieval_run import evaluate_retrieval
    from longclip_rt.train.data.table_files import Columns

    name = data_from_name(data, images, split, Columns(image_column, long_column))
    with _told(options) as run:
        report = evaluate_retrieval(name, **run)
    _write(report, options)
    if html_file is not None:
        from longclip_rt.evaluation.misses import save_misses

        save_misses(report, html_file, misses)
        click.echo(f"Wrote {html_file}.", err=True)


@evaluate.command(
    "zero-shot",
    cls=SectionedCommand,
    sections={"Data": ("data", "templates", "classes"), **_SECTIONS, "Report": _REPORT},
)
@click.option(
    "--data",
    required=True,
    metavar="[KIND:]PATH",
    help="A folder with a folder of pictures for each class, ImageNet's validation images, CIFAR-10 or CIFAR-100 as "
    "downloaded, or scenes:N. Kinds, where the layout does not tell: folder, imagenet, cifar10, cifar100.",
)
@click.option(
    "--templates",
    metavar="NAME|FILE",
    help="Prompts: photo (one), openai-80 or simple-7 (open_clip's), or a file with one a line and {} for the class. "
    "Default: photo for folders, openai-80 for ImageNet and CIFAR.",
)
@click.option(
    "--classes",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Names of the classes, one a line in their order, or folder, tab and name. Default: the data set's own.",
)
@_compares
def zero_shot(data: str, templates: str | None, classes: Path | None, **options: Any) -> None:
    """Classify images by the nearest class name: top-1, top-5, and the mean over classes.

    A class is the mean of its prompts' embeddings. Scenes are asked for two things: the kind of their main thing, and
    its colour.

    \b
    Examples:
      longclip-rt evaluate zero-shot --data scenes:1000
      longclip-rt evaluate zero-shot --data photos-by-class/ --templates templates.txt --json classes.json
      longclip-rt evaluate zero-shot --data imagenet/val --baseline torch
      longclip-rt evaluate zero-shot --data cifar-100-python/ --compare onnxruntime,fp16
    """
    from longclip_rt.evaluation.classes import classes_from_name
    from longclip_rt.evaluation.zero_shot_run import evaluate_zero_shot

    name = classes_from_name(data, templates, classes)
    with _told(options) as run:
        report = evaluate_zero_shot(name, **run)
    _write(report, options)


def _specs(options: dict[str, Any]) -> list[ModelSpec]:
    """The baseline first, where there is one."""
    from longclip_rt.evaluation.models import ModelSpec, spec_from_text

    bundle = options["bundle"]
    specs = [ModelSpec(bundle, options["backend"], options["precision"])]
    if options["baseline"] is not None:
        specs.insert(0, spec_from_text(options["baseline"], bundle))
    return specs + [spec_from_text(text, bundle) for text in options["compare"]]


@contextlib.contextmanager
def _told(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What both evaluations take; Ctrl-C within is told in a sentence."""
    from longclip_rt.system.interrupt import STATUS, ended_by_ctrl_c

    run = {
        "specs": _specs(options),
        "cache": options["cache"],
        "fresh": options["fresh"],
        "batch_size": options["batch_size"],
        "bars": lambda: Bar(options["quiet"], columns=False),
    }
    try:
        with ended_by_ctrl_c(_STOPPED):
            yield run
    except KeyboardInterrupt:
        click.echo(_STOPPED, err=True)
        click.get_current_context().exit(STATUS)


def _write(report: _Report, options: dict[str, Any]) -> None:
    """Writes the files that were asked for, and prints tables on stdout and notes on stderr."""
    from longclip_rt.system.files import write_text_atomically

    found = report.as_json()
    contents = {
        # What UTF-8 cannot hold, such as file names in other encodings, is escaped.
        "json_file": lambda: (
            json.dumps(found, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"
        ),
        "csv_file": report.as_csv,
        "markdown_file": report.as_markdown,
    }
    for name, content in contents.items():
        if options[name] is not None:
            write_text_atomically(options[name], content())
    click.echo(report.as_markdown(), nl=False)
    if options["quiet"]:
        return
    if not report.computed:
        click.echo("All embeddings were kept from an earlier run.", err=True)
    if report.skipped:
        click.echo(f"Skipped: {len(report.skipped):,}; the figures are of what is left.", err=True)
        for one in report.skipped[:_TOLD]:
            click.echo(f"  {one.id}: {one.reason}", err=True)
        if len(report.skipped) > _TOLD:
            click.echo("  ... --json lists all of them.", err=True)
