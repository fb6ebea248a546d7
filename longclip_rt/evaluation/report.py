"""Reports of evaluations: tables for people, JSON and CSV for programs. Nothing here measures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from longclip_rt.evaluation.figures import Difference


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that can be read as it stands.

    Args:
        header: Names of the columns.
        rows: Cells.
        left: Columns at the left edge that hold words; all others hold numbers.
    """
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    lines = [_line(row, widths, left) for row in cells]
    rule = ["-" * width if n < left else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def _line(row: Sequence[str], widths: Sequence[int], left: int) -> str:
    words = [cell.ljust(width) for cell, width in zip(row[:left], widths[:left], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(row[left:], widths[left:], strict=True)]
    return f"| {' | '.join(words + numbers)} |"


def percent(share: float | None) -> str:
    """A share in percent with one digit; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f}"


def points(one: Difference) -> str:
    """A difference in points and its interval: `+0.3 [-0.1, +0.8]`."""
    return f"{one.points:+.1f} [{one.low:+.1f}, {one.high:+.1f}]"


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, with the columns of all of them; what a row lacks is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def difference_columns(found: Mapping[str, Difference]) -> dict[str, float]:
    """Differences as columns of a CSV."""
    return {
        f"{name}_{part}": round(getattr(one, field), 4)
        for name, one in found.items()
        for part, field in (("points", "points"), ("low", "low"), ("high", "high"))
    }
