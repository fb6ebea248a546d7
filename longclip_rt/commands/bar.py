"""The progress bar of the embedding job."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import click

# A progress bar that appears in a log file only after this many seconds, and then has this many between its updates.
_LOG_DELAY = 2.0
_LOG_INTERVAL = 10.0


class Bar:
    """A progress bar on stderr: at once on a terminal, after a while in a log, never when quiet.

    Args:
        quiet: Whether nothing is shown.
        columns: Whether it is said which columns of tables are read.
        unit: What is counted.
    """

    def __init__(self, quiet: bool, columns: bool = True, unit: str = "inputs") -> None:
        self._quiet = quiet
        self._unit = unit
        self._columns = columns
        self._bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, total: int, done: int, columns: Mapping[str, str]) -> None:
        """Shows what was found and starts the bar."""
        if self._quiet:
            return
        from tqdm import tqdm

        for name, column in columns.items() if self._columns else ():
            click.echo(f"Reading column {column!r} of {name}.", err=True)
        if done:
            click.echo(f"Going on: {done:,} of {total:,} {self._unit} were done before.", err=True)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=f" {self._unit}",
            file=sys.stderr,
            dynamic_ncols=terminal,
            delay=0 if terminal else _LOG_DELAY,
            mininterval=0.1 if terminal else _LOG_INTERVAL,
        )

    def advance(self, entries: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(entries)
