"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from longclip_rt.choices import BACKENDS, EVERY, PCA_MODES, PRECISIONS

KEY_VARIABLE = "LONGCLIP_RT_API_KEY"
"""Holds the API key of a server, for `serve` and for its clients."""

Function = TypeVar("Function", bound=Callable[..., Any])


class SectionedCommand(click.Command):
    """A command whose help lists its options in sections.

    Args:
        sections: Title -> names of parameters; what none names comes last.
    """

    def __init__(self, *arguments: Any, sections: Mapping[str, Sequence[str]], **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.sections = sections

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options."""
        records = {option.name: option.get_help_record(context) for option in self.get_params(context)}
        rows = {name: record for name, record in records.items() if record is not None}
        for title, names in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([rows.pop(name) for name in names])
        with formatter.section("Other options"):
            formatter.write_dl(list(rows.values()))


def gpu_numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Numbers of GPUs with commas between them; a callback of click's."""
    if value is None:
        return None
    parts = value.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise click.BadParameter(f"{value!r} should be numbers of GPUs, each once, with commas between, such as 0,1")
    return tuple(int(part) for part in parts)


def architectures(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[int, ...] | str:
    """`sm89`, `sm_89`, `89` or `8.9`, several of them with commas or as several options; or `all`."""
    parts = [part.strip() for value in values for part in value.split(",")]
    if EVERY in parts:
        return EVERY
    found = []
    for part in parts:
        matched = re.fullmatch(r"(?:sm_?)?(\d{2,3})|(\d{1,2})\.(\d)", part)
        if not matched:
            raise click.BadParameter(f"{part!r} should be a compute capability such as sm89, or {EVERY}")
        found.append(int(matched[1] or matched[2] + matched[3]))
    return tuple(dict.fromkeys(found))


def runs_the_model(command: Function) -> Function:
    """Adds `--backend` and `--precision`."""
    backend = click.option(
        "--backend",
        type=click.Choice(["auto", *BACKENDS]),
        default="auto",
        show_default=True,
        help="What runs the model.",
    )
    precision = click.option(
        "--precision",
        type=click.Choice(["auto", *PRECISIONS]),
        default="auto",
        show_default=True,
        help="Number format of the model.",
    )
    return backend(precision(command))


def takes_a_pca(command: Function) -> Function:
    """Adds `--pca` and `--pca-mode`."""
    pca = click.option(
        "--pca",
        metavar="FILE",
        help="Reduce the vectors with a PCA that `longclip-rt pca fit` wrote; `bundle` takes the one in the bundle.",
    )
    mode = click.option(
        "--pca-mode",
        type=click.Choice(PCA_MODES),
        default="project",
        show_default=True,
        help="K numbers, or back in the embedding's own space without what the components do not hold.",
    )
    return pca(mode(command))
