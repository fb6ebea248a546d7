"""Three pictures of a benchmark: latency against batch, throughput against length, and where the time goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longclip_rt.errors import OutputError
from longclip_rt.system.extras import require
from longclip_rt.system.files import output_errors, whole_file

SUFFIXES = (".png", ".svg", ".pdf")
STAGES = ("decode", "tokenize", "copy in", "encoder", "head", "copy out")


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draws a benchmark as PNG, SVG or PDF, by the file's suffix. The file is whole or as it was.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: The suffix is none of `SUFFIXES`, or the file cannot be written.
    """
    check_plot(path)
    figure = require("matplotlib.figure", "plot").Figure(figsize=(16, 5.5), layout="constrained")
    latency, throughput, stages = figure.subplots(1, 3)
    for label, points in lines(results, "batch").items():
        x, y = zip(*((batch, row["ms"]["p50"]) for batch, row in points), strict=True)
        latency.plot(x, y, "o-", markersize=3, label=label)
    latency.set(xlabel="batch", ylabel="ms a call, median", xscale="log", yscale="log")
    for label, points in lines(results, "tokens").items():
        x, y = zip(*((tokens, row["per_second"]) for tokens, row in points), strict=True)
        throughput.plot(x, y, "o-", markersize=3, label=label)
    throughput.set(xlabel="tokens of a text", ylabel="texts a second", yscale="log")
    _bars(results, stages)
    for axes in (latency, throughput):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=6)
    machine = results["machine"]
    figure.suptitle(f"{results['bundle']['name']} on {', '.join(machine['gpus']) or machine['cpu']}")
    with output_errors(path), whole_file(path) as stream:
        figure.savefig(stream, format=path.suffix[1:], dpi=150)


def check_plot(path: Path) -> None:
    """Refuses a file that `plot` could not draw.

    Raises:
        OutputError: The suffix is none of `SUFFIXES`.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise OutputError(f"{str(path)!r} should end with {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    require("matplotlib.figure", "plot")


def lines(results: Mapping[str, Any], over: str) -> dict[str, list[tuple[int, Mapping[str, Any]]]]:
    """Label -> points of a line: a way's rows over `batch` or `tokens`, which images have none of."""
    found: dict[str, list[tuple[int, Mapping[str, Any]]]] = defaultdict(list)
    for case in results["cases"]:
        if case[over] is None:
            continue
        rest = f"batch {case['batch']}" if over == "tokens" else f"{case['tower']} {case['tokens'] or ''}".strip()
        for row in case["rows"]:
            found[f"{row['way']} {row['precision']}, {rest}"].append((case[over], row))
    return {label: sorted(points, key=lambda point: point[0]) for label, points in found.items()}


def _bars(results: Mapping[str, Any], axes: Any) -> None:
    """The share of each stage in what one of ours takes from files or texts to vectors."""
    rows = [(case, row) for case in results["cases"] for row in case["rows"] if not row["reference"]]
    names = [f"{case['label']}, {row['way']} {row['precision']}" for case, row in rows]
    left = np.zeros(len(rows))
    for stage in STAGES:
        taken = np.array([row["stages_ms"].get(stage, 0.0) for _, row in rows])
        whole = np.array([sum(row["stages_ms"].get(each, 0.0) for each in STAGES) for _, row in rows])
        if taken.any():
            axes.barh(names, 100 * taken / whole, left=left, label=stage)
            left += 100 * taken / whole
    axes.set(xlabel="% of the stages' time", xlim=(0, 100))
    axes.tick_params(axis="y", labelsize=6)
    axes.legend(fontsize=6, loc="lower right")
