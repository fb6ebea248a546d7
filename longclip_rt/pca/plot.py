"""One picture of a fit: the variance along each direction, summed up, and what each K keeps of retrieval."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from longclip_rt.errors import PcaError
from longclip_rt.pca.fit import FitReport
from longclip_rt.system.extras import require
from longclip_rt.system.files import output_errors, whole_file

SUFFIXES = (".png", ".svg", ".pdf")


def plot_fit(report: FitReport, path: str | Path) -> None:
    """Draws a fit as PNG, SVG or PDF, by the file's suffix. The file is whole or as it was.

    Raises:
        MissingExtraError: matplotlib is not installed.
        PcaError: The suffix is none of `SUFFIXES`.
        OutputError: The file cannot be written.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise PcaError(f"{str(path)!r} should end with {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    figure = require("matplotlib.figure", "plot").Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    dim = next(iter(report.bases.values())).dim
    for name, basis in report.bases.items():
        label = "variance explained" if name == "joint" else f"variance explained, {name} rows"
        cumulated = np.cumsum(basis.variances) / max(float(basis.variances.sum()), 1e-300)
        axes.plot(np.arange(1, dim + 1), 100 * cumulated, label=label)
    if report.retention is not None:
        rows = [row for row in report.retention.rows if row.k is not None]
        for field, label in (
            ("images_found", "R@1, text to image"),
            ("texts_found", "R@1, image to text"),
            ("neighbours", "same nearest neighbour"),
        ):
            points = [(row.k, 100 * value) for row in rows if (value := getattr(row, field)) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o--", linewidth=1, markersize=4, label=label)
    if report.pca is not None:
        axes.axvline(report.pca.k, color="grey", linewidth=1, label=f"K = {report.pca.k}")
    axes.set(xlabel="components K", ylabel="%", xlim=(1, dim), ylim=(0, 102))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with output_errors(target), whole_file(target) as stream:
        figure.savefig(stream, format=target.suffix[1:], dpi=150)
