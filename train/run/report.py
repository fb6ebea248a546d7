"""What a run shows: `metrics.csv`, TensorBoard events, curves as a PNG, and its progress on stderr.

`metrics.csv` is in long format, one value a row: `step,name,value`. A value that is recorded only now and then, or late
in a run for the first time, needs no empty cells and no new header, and a row that a crash cut short costs that value
alone. Names may be paths (`train/loss`), as TensorBoard groups them.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat, TextIO

import numpy as np

from longclip_rt.errors import LongClipError, OutputError
from longclip_rt.system.extras import require
from longclip_rt.system.files import output_errors, whole_file
from longclip_rt.train.run.events import open_events

METRICS_FILE = "metrics.csv"
CURVES_FILE = "curves.png"
EVENTS_FOLDER = "tensorboard"
HEADER = "step,name,value"

_log = logging.getLogger("longclip_rt")
_NAME = re.compile(r'[^\s,"]+')
_LOSS = re.compile(r"(?:(?P<set>train|val)/)?loss(?:_(?P<part>.+))?")
_RECALL = re.compile(r"(?:.*/)?(?:(?P<captions>.+)_)?(?P<direction>i2t|t2i)_r1")
_RATE = re.compile(r"(?:.*/)?lr")
_MARKS = 600  # one a second: the time left is that at the speed of the last ten minutes
_SMOOTH_FROM = 100  # with so many points the noise of single batches hides the trend

Series = tuple[list[int], list[float]]
"""Steps, ascending, and the value at each."""


class RunLog:
    """Writes a run's figures to its folder as they come. One process writes: in a distributed run, the first.

    Args:
        folder: The run's folder; made when it does not exist.
        resume_step: The step the run goes on after. Rows of later steps, which a killed run may have left behind its
            last checkpoint, are dropped; -1 drops all. Without it the folder must hold no figures yet.

    Raises:
        OutputError: The folder cannot be written, or holds the figures of another run.
    """

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        self._path = folder / METRICS_FILE
        self._step = -1
        self._names: set[str] = set()
        with output_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            if resume_step is None and self._path.exists():
                raise OutputError(
                    f"{str(self._path)!r} holds the figures of an earlier run. Resume that run, choose another folder, "
                    "or remove the file."
                )
            kept = [] if resume_step is None else [row for row in _rows(self._path) if row[0] <= resume_step]
            with whole_file(self._path) as stream:
                stream.write("".join(f"{line}\n" for line in (HEADER, *map(_line, kept))).encode())
            if kept:
                self._step = max(step for step, _, _ in kept)
                self._names = {name for step, name, _ in kept if step == self._step}
            self._file = self._path.open("a", encoding="utf-8", newline="")
        self._events = open_events(folder / EVENTS_FOLDER, resume_step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def record(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Appends the figures of a step and hands them to the system.

        Steps do not go back. A value that the step has already is not written again: a run resumed at a step may
        repeat what it measured there.

        Args:
            step: Optimiser steps done.
            values: Numbers or one-element tensors by name; not-a-number and infinity are kept.

        Raises:
            LongClipError: The step is before the last one, or a name has white space, a comma or a quotation mark.
            OutputError: The disk refuses.
        """
        if step < self._step:
            raise LongClipError(f"Figures of step {step} came after those of step {self._step}. Record steps in order.")
        for name in values:
            if not _NAME.fullmatch(name):
                raise LongClipError(f"{name!r} cannot name a figure. Leave out white space, commas and quotes.")
        if step > self._step:
            self._step, self._names = step, set()
        new = {name: float(value) for name, value in values.items() if name not in self._names}
        self._names |= new.keys()
        with output_errors(self._path):
            self._file.write("".join(f"{_line((step, name, value))}\n" for name, value in new.items()))
            self._file.flush()
            if self._events is not None:
                for name, value in new.items():
                    self._events.add_scalar(name, value, step)
                self._events.flush()

    def close(self) -> None:
        """Closes the files. Closing again does nothing.

        Raises:
            OutputError: The disk refuses the last of it.
        """
        with output_errors(self._path):
            self._file.close()
            if self._events is not None:
                self._events.close()
                self._events = None


def read_metrics(folder: Path) -> dict[str, Series]:
    """Reads what a `RunLog` wrote, a run in progress included.

    Args:
        folder: The run's folder.

    Returns:
        Steps and values by name, names in the order of their first appearance.

    Raises:
        LongClipError: There are no figures, or the file is not one that `RunLog` wrote.
    """
    found: dict[str, Series] = {}
    for step, name, value in _rows(folder / METRICS_FILE):
        steps, values = found.setdefault(name, ([], []))
        steps.append(step)
        values.append(value)
    if not found:
        raise LongClipError(f"{str(folder)!r} has no figures in {METRICS_FILE}. Give the folder of a begun run.")
    return found


def plot_curves(folder: Path) -> Path:
    """Draws losses, retrieval and learning rate over the steps; what was not recorded is left out.

    A loss is named `loss` or `loss_<part>`, before it `train/`, `val/` or nothing; a recall ends in `i2t_r1` or
    `t2i_r1`, as in `long_i2t_r1` or `val/long_i2t_r1`; the learning rate is `lr`, or ends in `/lr`.

    Args:
        folder: The run's folder, with `metrics.csv`.

    Returns:
        The path of `curves.png` in the folder, written anew.

    Raises:
        LongClipError: There is nothing to draw.
        MissingExtraError: matplotlib is not installed.
        OutputError: The folder cannot be written.
    """
    metrics = read_metrics(folder)
    panels = [
        (draw, found)
        for draw, pattern in ((_draw_loss, _LOSS), (_draw_recall, _RECALL), (_draw_rate, _RATE))
        if (found := [(match, metrics[name]) for name in metrics if (match := pattern.fullmatch(name))])
    ]
    if not panels:
        raise LongClipError(
            f"{str(folder / METRICS_FILE)!r} has neither a loss, nor a recall at 1, nor a learning rate to draw. "
            f"It has {', '.join(metrics)}."
        )
    # Not pyplot, whose backend and current figure belong to the caller.
    figure = require("matplotlib.figure", "train").Figure(figsize=(10, 1 + 3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (draw, found) in zip(axes, panels, strict=True):
        draw(axis, found)
        axis.grid(alpha=0.3)
        # Beside the lines: the curves of a run fill every corner sooner or later.
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes[-1].set_xlabel("optimiser steps")
    path = folder / CURVES_FILE
    with output_errors(path), whole_file(path) as stream:
        figure.savefig(stream, format="png", dpi=120)
    return path


def _draw_loss(axis: Any, found: Sequence[tuple[re.Match[str], Series]]) -> None:
    for index, (match, (steps, values)) in enumerate(found):
        color, part = f"C{index}", (match["part"] or "total").replace("_", " ")
        if match["set"] == "val":
            axis.plot(steps, values, "o--", color=color, markersize=4, label=f"validation: {part}")
        elif len(steps) < _SMOOTH_FROM:
            axis.plot(steps, values, ".-", color=color, label=part)
        else:
            window = len(steps) // 50
            axis.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
            axis.plot(steps, _smooth(values, window), color=color, label=f"{part} (mean of {window} points)")
    axis.set_ylabel("loss (nats)")


def _draw_recall(axis: Any, found: Sequence[tuple[re.Match[str], Series]]) -> None:
    captions = list(dict.fromkeys(match["captions"] for match, _ in found))
    for match, (steps, values) in found:
        style, direction = ("o-", "image to text") if match["direction"] == "i2t" else ("s--", "text to image")
        label = f"{match['captions'].replace('_', ' ')}, {direction}" if match["captions"] else direction
        color = f"C{captions.index(match['captions'])}"
        axis.plot(steps, [100 * value for value in values], style, color=color, markersize=4, label=label)
    axis.set_ylabel("validation R@1 (%)")


def _draw_rate(axis: Any, found: Sequence[tuple[re.Match[str], Series]]) -> None:
    for _, (steps, values) in found:
        axis.plot(steps, values, ".-" if len(steps) < _SMOOTH_FROM else "-", label="learning rate")
    axis.set_ylabel("learning rate")
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axis.set_ylim(bottom=0)


def _smooth(values: Sequence[float], window: int) -> Any:
    """A moving mean over `window` points, fewer at the ends; a value that is not a number spoils only its window."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


class TrainProgress:
    """Step, loss, samples a second and time left, on stderr: a bar on a terminal, else a line now and then.

    tqdm draws the bar; its rate would count the pauses of validation and of checkpoints as time of steps.

    Args:
        total: Steps of the whole run.
        batch_size: Samples of a step, over all processes.
        start: Steps done before, which do not count for the speed.
        quiet: Show nothing; for processes other than the first, too.
        interval: Seconds between the lines of a log.
        stream: Where to write; stderr by default.
        clock: Seconds from any beginning.
    """

    def __init__(
        self,
        total: int,
        batch_size: int,
        *,
        start: int = 0,
        quiet: bool = False,
        interval: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._batch_size, self._step = total, batch_size, start
        self._quiet, self._clock, self._stream = quiet, clock, stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = 0.5 if self._terminal else interval
        self._loss: SupportsFloat | None = None
        self._shown_at, self._shown_step, self._paused = clock(), start, 0.0
        # Times and steps of the last minutes. The first step ended is the first mark: compiling and the filling of the
        # data's queue come before it, and would spoil the rate for long.
        self._marks: collections.deque[tuple[float, float, int]] = collections.deque(maxlen=_MARKS)
        self._bar: Any = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> TrainProgress:
        if self._terminal and not self._quiet:
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            self._bar = self._open.enter_context(
                tqdm(
                    total=self._total,
                    initial=self._step,
                    file=self._stream,
                    dynamic_ncols=True,
                    bar_format="{percentage:3.0f}%|{bar:20}| {n}/{total} [{elapsed}{postfix}]",
                )
            )
            self._open.enter_context(logging_redirect_tqdm())  # warnings go above the bar, not into it
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._step > self._shown_step:
            self._show()
        self._open.close()
        self._bar = None

    def loss(self, value: SupportsFloat) -> None:
        """Takes the newest loss: a number, or a one-element tensor, which is read only when it is shown."""
        self._loss = value

    def advance(self, steps: int = 1) -> None:
        """Counts steps that have ended."""
        self._step += steps
        now = self._clock()
        if not self._marks or now - self._marks[-1][0] >= 1:
            self._marks.append((now, self._paused, self._step))
        if self._bar is not None:
            self._bar.update(steps)
        if now - self._shown_at >= self._interval:
            self._show()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the block's time, such as that of a validation, out of the samples a second (not of the time left)."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    def _show(self) -> None:
        self._shown_at, self._shown_step = self._clock(), self._step
        if self._quiet:
            return
        text = ", ".join(self._figures())
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif not self._terminal:
            step = f"step {self._step:,} of {self._total:,}"
            print(f"{step}, {text}" if text else step, file=self._stream, flush=True)

    def _figures(self) -> Iterator[str]:
        if self._loss is not None:
            yield f"loss {float(self._loss):.4g}"
        if not self._marks or self._marks[0][2] == self._step:
            return  # one step, and nothing yet to measure from
        now = self._clock()
        began, _, first = self._marks[0]
        # The speed of the last half minute of training; slower steps are measured from the mark before that.
        trained = [now - self._paused - (at - paused) for at, paused, _ in self._marks]
        index = max((i for i, seconds in enumerate(trained) if seconds >= 30), default=0)
        if trained[index] > 0:
            rate = (self._step - self._marks[index][2]) * self._batch_size / trained[index]
            yield f"{rate:,.0f} samples/s" if rate >= 100 else f"{rate:.3g} samples/s"
        if self._step < self._total and now > began:
            left = round((self._total - self._step) * (now - began) / (self._step - first))
            yield f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"


def _rows(path: Path) -> Iterable[tuple[int, str, float]]:
    """The whole rows of a `metrics.csv`; none when there is no file. Damaged rows are passed over."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise LongClipError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
    *lines, _ = text.split("\n")  # what follows the last line end was cut short, so 0.25 may stand there as 0.2
    if text and (not lines or lines[0] != HEADER):
        raise LongClipError(f"{str(path)!r} does not begin with {HEADER!r}, so it is not a run's. Move it away.")
    for line in lines[1:]:
        parts = line.split(",")
        try:
            step, name, value = parts
            row = int(step), name, float(value)
        except ValueError:
            continue
        yield row


def _line(row: tuple[int, str, float]) -> str:
    step, name, value = row
    return f"{step},{name},{value!r}"
