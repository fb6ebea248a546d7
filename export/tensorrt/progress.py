"""What TensorRT says while it builds: its log, kept for errors and for the account of memory, and its progress."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from longclip_rt.tensorrt.messages import is_no_gpu, meaning

logger = logging.getLogger("longclip_rt")

Report = Callable[[str, float], None]
"""Called with what is being done and the part of it that is done, 0 to 1."""

_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")


class BuildLog:
    """What a build's log said that matters later.

    Args:
        here: Whether a GPU of this machine can load what is built. Else that there is none is no error: TensorRT-RTX
            says so of every build, and goes on.

    Attributes:
        errors: The errors, first to last.
        activations: Bytes that each profile computes in, in the order of the profiles.
        weights: Bytes of the weights on the device; None before the library says it.
    """

    def __init__(self, here: bool = True) -> None:
        self._here = here
        self.errors: list[str] = []
        self.activations: list[int] = []
        self.weights: int | None = None

    def note(self, message: str, is_error: bool) -> None:
        """Takes one message."""
        if is_error:
            if self._here or not is_no_gpu(message):
                logger.debug("TensorRT: %s", message)
                self.errors.append(message)
        elif found := _ACTIVATIONS.search(message):
            self.activations.append(int(found[1]))
        elif found := _WEIGHTS.search(message):
            self.weights = int(found[1])

    def reason(self) -> str:
        """Why what failed last failed, as a clause."""
        return meaning(self.errors)


def logger_for(library: Any, log: BuildLog) -> Any:
    """An `ILogger` of the library that fills `log`; `-v` shows its warnings and errors."""
    severity = library.ILogger.Severity

    class Logger(library.ILogger):  # type: ignore[misc]
        """Called from any of the library's threads."""

        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity_of: Any, message: str) -> None:
            """Takes one message."""
            if severity_of == severity.WARNING:
                logger.debug("TensorRT: %s", message)
            log.note(message, severity_of in (severity.INTERNAL_ERROR, severity.ERROR))

    return Logger()


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Fraction:
    """How much of a tree of phases is done: each step of a phase counts alike, and a phase within it is part of one."""

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._largest = 0.0

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins; its parent is under way."""
        self._phases[phase] = _Phase(parent, max(steps, 1))

    def step(self, phase: str, step: int) -> None:
        """A step, counted from 0, is done."""
        if phase in self._phases:
            self._phases[phase].done = step + 1

    def finish(self, phase: str) -> None:
        """A phase is over."""
        self._phases.pop(phase, None)

    @property
    def value(self) -> float:
        """0 to 1; it never falls."""
        roots = [name for name, phase in self._phases.items() if phase.parent not in self._phases]
        now = max((self._of(name) for name in roots), default=0.0)
        self._largest = max(self._largest, min(now, 1.0))
        return self._largest

    def _of(self, name: str) -> float:
        phase = self._phases[name]
        within = [self._of(child) for child, other in self._phases.items() if other.parent == name and child != name]
        return min(phase.done + max(within, default=0.0), phase.steps) / phase.steps


class Interruption:
    """What was raised within a callback, where the library's own code would not survive it; it is raised afterwards."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    @contextlib.contextmanager
    def keeping_ctrl_c(self) -> Iterator[None]:
        """Keeps a Ctrl-C of the block, and raises it at the end.

        One that comes while the library works is noticed where it next calls Python, such as for its log. An exception
        that is raised there is swallowed by the bindings (seen with TensorRT-RTX 1.7): the build would go on.
        """
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(handler):
            yield  # it goes elsewhere, or is ignored
            return
        signal.signal(signal.SIGINT, lambda number, frame: self._keep(KeyboardInterrupt()))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)
            self.raise_it()  # in the place of an error too: who interrupts wants no further architecture

    def _keep(self, error: BaseException) -> None:
        self.error = self.error or error

    def raise_it(self) -> None:
        """Raises what was kept, if anything was."""
        if self.error is not None:
            raise self.error


def monitor_for(library: Any, report: Report, interruption: Interruption) -> Any:
    """An `IProgressMonitor` that reports, and that cancels the build after Ctrl-C or where reporting raised."""
    fraction = Fraction()

    def told(phase: str) -> None:
        if interruption.error is None:
            try:
                report(phase, fraction.value)
            except BaseException as error:
                interruption.error = error

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        """Called from the building thread."""

        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """A phase begins."""
            fraction.start(phase_name, parent_phase, num_steps)
            told(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """A step is done; False cancels the build."""
            fraction.step(phase_name, step)
            told(phase_name)
            return interruption.error is None

        def phase_finish(self, phase_name: str) -> None:
            """A phase is over."""
            fraction.finish(phase_name)

    return Monitor()
