"""Standard output and error that are closed or full: what was done stays done, and no traceback says so."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from longclip_rt.errors import OutputError


def open_standard_streams() -> None:
    """Gives a program that was started without them standard streams that hold nothing.

    The next file opened would otherwise become number 1 or 2, and get what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
    closed = set()
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            closed.add(name)
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115, PTH123
    with contextlib.suppress(AttributeError):
        # Ids are file names, which may hold what the terminal's encoding does not; a question mark beats a traceback.
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        sys.stderr.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.stdout = _Strict(sys.stdout, closed="stdout" in closed)  # type: ignore[assignment]
    sys.stderr = _Lossy(sys.stderr)  # type: ignore[assignment]


class _Lossy:
    """A stream that loses what cannot be written: that a message is not read must not end the work it tells of."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Strict:
    """A stream that says by an `OutputError` that it cannot be written; that nobody reads on stays an `OSError`."""

    def __init__(self, stream: Any, *, closed: bool) -> None:
        self._stream = stream
        self._closed = closed

    def write(self, text: str) -> int:
        if self._closed:
            raise OutputError("Standard output cannot be used: it is closed.")
        with _strictly():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _strictly():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _strictly() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"Standard output cannot be used: {error.strerror or error}.") from error


@contextlib.contextmanager
def told_at_best() -> Iterator[None]:
    """For the last words of work that is done: a finished output is one, whether or not its name could be printed."""
    with contextlib.suppress(OSError, OutputError):
        yield


def close_standard_streams() -> None:
    """Drops what is left to write and cannot be; Python would change the exit status for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, OutputError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
