"""`longclip-rt pca`: fits a PCA to embeddings, and shows what each number of components keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from longclip_rt.system.streams import told_at_best

if TYPE_CHECKING:
    from longclip_rt.pca.fit import FitReport
    from longclip_rt.pca.retention import Retention

_PLOTS = (".png", ".svg", ".pdf")


def _plot_name(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuses a format that is not known before anything is read."""
    if value is not None and value.suffix not in _PLOTS:
        raise click.BadParameter(f"{str(value)!r} should end with {', '.join(_PLOTS[:-1])} or {_PLOTS[-1]}")
    return value


def _pca_name(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    """Refuses a name that is no PCA's: a slip of the hand must not replace the embeddings."""
    if value.suffix != ".safetensors":
        raise click.BadParameter(f"{str(value)!r} should end with .safetensors")
    return value


@click.group()
def pca() -> None:
    """Fit a PCA to embeddings: shorter vectors for cheap storage and search.

    \b
    Examples:
      longclip-rt pca fit files.parquet                           # the table alone, to choose K
      longclip-rt pca fit files.parquet -k 64 -o pca.safetensors
      longclip-rt embed files.txt --pca pca.safetensors
    """


@pca.command()
@click.argument("embeddings", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="EMBEDDINGS...")
@click.option("-k", "k", type=click.IntRange(min=1), metavar="K", help="Components to keep. Default: only the table.")
@click.option(
    "-o",
    "--out",
    "output",
    type=click.Path(path_type=Path, dir_okay=False),
    default="pca.safetensors",
    show_default=True,
    callback=_pca_name,
    metavar="FILE",
    help="Where to write the PCA.",
)
@click.option(
    "--fit",
    type=click.Choice(["joint", "apart"]),
    default="joint",
    show_default=True,
    help="One basis for texts and images, or one for each: then a text and an image can be compared only after "
    "--pca-mode reconstruct.",
)
@click.option(
    "--pairs",
    type=click.Choice(["names", "rows", "none"]),
    default="names",
    show_default=True,
    help="Which text belongs to which image: equal file names up to the first dot, or the n-th text to the n-th image.",
)
@click.option(
    "--held-out",
    type=click.IntRange(min=0),
    default=2000,
    show_default=True,
    metavar="N",
    help="Rows that the table is measured on, about; at most a quarter of all.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_plot_name,
    metavar="FILE",
    help="Also draw the variance and the table: .png, .svg or .pdf. Needs matplotlib.",
)
@click.option("--overwrite", is_flag=True, help="Replace a PCA that exists.")
def fit(
    embeddings: tuple[Path, ...],
    k: int | None,
    output: Path,
    fit: str,
    pairs: str,
    held_out: int,
    plot: Path | None,
    overwrite: bool,
) -> None:
    """Fit a PCA to EMBEDDINGS, files that `longclip-rt embed` wrote.

    The files are read once, in pieces. A table tells for K = 16, 32, ... D how much of the variance K components
    explain, and what they keep of retrieval on rows that were held out: R@1 between texts and images where there are
    pairs, and how often the nearest neighbour stays the same. The PCA that is written is fitted to all rows. Its path
    is printed on stdout; without -k nothing is written and the table goes there.

    \b
    Examples:
      longclip-rt pca fit files.parquet
      longclip-rt pca fit files.parquet -k 64 -o pca.safetensors --plot pca.png
      longclip-rt pca fit images.parquet captions.parquet --pairs rows -k 128
    """
    from longclip_rt.errors import OutputError
    from longclip_rt.system.extras import require

    if k is not None and output.exists() and not overwrite:
        raise OutputError(f"{str(output)!r} exists already. Add --overwrite to replace it, or name another with -o.")
    if plot is not None:
        require("matplotlib.figure", "plot")
    from longclip_rt.pca.basis import save_pca
    from longclip_rt.pca.fit import FitOptions, fit_pca

    report = fit_pca(embeddings, FitOptions(k, fit, pairs, held_out))
    click.echo(_table(report), err=k is not None)
    if plot is not None:
        from longclip_rt.pca.plot import plot_fit

        plot_fit(report, plot)
        click.echo(f"Wrote {plot}.", err=True)
    if report.pca is None:
        click.echo("Choose K and give it with -k to write a PCA.", err=True)
        return
    save_pca(report.pca, output)
    with told_at_best():
        click.echo(str(output))


def _table(report: FitReport) -> str:
    """The fit, and a line for each K."""
    lines = []
    for name, basis in report.bases.items():
        of = "" if name == "joint" else f"{name} "
        kept = f": {report.pca.k} components explain {100 * basis.explained(report.pca.k):.1f}%" if report.pca else ""
        lines.append(f"Fitted to {basis.rows:,} {of}rows of {basis.dim} numbers{kept}.")
    retention = report.retention
    if retention is None:
        sizes = sorted({1 << power for power in range(4, basis.dim.bit_length())} | {basis.dim})
        shares = ", ".join(
            f"{size}: {'/'.join(f'{100 * basis.explained(size):.1f}' for basis in report.bases.values())}%"
            for size in sizes
        )
        return "\n".join(
            [*lines, f"Variance explained by K components: {shares}.", "Too few rows were held out to compare."]
        )
    return "\n".join([*lines, "", _heading(retention), "", *_rows(retention)])


def _heading(retention: Retention) -> str:
    measured = f"Kept on {retention.texts:,} texts and {retention.images:,} images that were held out of another fit"
    if not retention.pairs:
        return f"{measured}; there are no pairs of text and image among them, so R@1 is not measured:"
    how = ", R@1 after reconstruction" if retention.reconstructed else ""
    return f"{measured}, with {retention.pairs:,} pairs{how}:"


def _rows(retention: Retention) -> list[str]:
    heads = ("variance", "R@1 text-image", "R@1 image-text", "same neighbour")
    fields = ("explained", "images_found", "texts_found", "neighbours")
    lines = ["       K" + "".join(f"  {head:>14}" for head in heads)]
    for row in retention.rows:
        values = (getattr(row, field) for field in fields)
        figures = (f"{'-' if value is None else f'{100 * value:.1f}%':>14}" for value in values)
        lines.append(f"  {'no PCA' if row.k is None else row.k:>6}  " + "  ".join(figures))
    return lines
