"""Runs a benchmark: opens a process a backend, lets them take turns, and gathers what they say."""

from __future__ import annotations

import datetime
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from longclip_rt.bench.cases import Case
from longclip_rt.bench.contenders import same_vectors
from longclip_rt.bench.cost import graph_cost
from longclip_rt.bench.machine import description
from longclip_rt.bench.summary import bound, ratios, summary
from longclip_rt.bench.worker import Round, serve
from longclip_rt.bundle.bundle import Bundle
from longclip_rt.choices import REFERENCES
from longclip_rt.errors import BackendError, MissingExtraError

logger = logging.getLogger("longclip_rt")

Say = Callable[[str], None]
FORMAT = 1


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        ways: Backend or reference -> its precisions.
        cases: The batches.
        on_gpu: Whether the references, and the machine's own rates, are those of the GPU.
        seconds: Of every way in every case, all rounds together.
        rounds: Turns.
    """

    ways: Mapping[str, Sequence[str]]
    cases: Sequence[Case]
    on_gpu: bool
    seconds: float = 2.0
    rounds: int = 4


class Child:
    """A process with one contender."""

    def __init__(self, bundle: Bundle, name: str, on_gpu: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, other = context.Pipe()
        arguments = (other, str(bundle.path), name, on_gpu)
        self._process = context.Process(target=serve, args=arguments, daemon=False)
        self._process.start()
        other.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Sends a request and waits for the answer.

        Raises:
            BackendError: The contender failed, or its process ended.
        """
        self.send(method, *arguments)
        return self.answer()

    def send(self, method: str, *arguments: Any) -> None:
        """Sends a request."""
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise BackendError(f"The process of {self.name} ended ({self._process.exitcode}).") from error

    def answer(self) -> Any:
        """Waits for an answer.

        Raises:
            BackendError: The contender failed, or its process ended.
        """
        try:
            good, result = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise BackendError(f"The process of {self.name} ended ({self._process.exitcode}).") from error
        if not good:
            raise BackendError(result)
        return result

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextmanager
def children(bundle: Bundle, names: Sequence[str], on_gpu: bool) -> Iterator[dict[str, Child]]:
    """A process a name; all end with the block."""
    with ExitStack() as stack:
        found = {}
        for name in names:
            found[name] = Child(bundle, name, on_gpu)
            stack.callback(found[name].close)
        yield found


def run_bench(bundle: Bundle, options: BenchOptions, say: Say = lambda words: None) -> dict[str, Any]:
    """Measures every way in every case.

    Args:
        bundle: The model.
        options: What to measure.
        say: Told what is done next.

    Returns:
        Plain values, as the JSON file holds them.

    Raises:
        BackendError: None of the ways can be opened.
    """
    skipped: dict[str, str] = {}
    details: dict[str, Any] = {}
    started, where = time.perf_counter(), description()
    with children(bundle, list(options.ways), options.on_gpu) as processes:
        rates = _rates(bundle, options, say, skipped)
        ways = _open(processes, options, say, details, skipped)
        if not any(name not in REFERENCES for name, _ in ways):
            reasons = ". ".join(f"{way}: {reason}" for way, reason in skipped.items())
            raise BackendError(f"No backend can be measured. {reasons}")
        results = []
        for case in options.cases:
            say(case.label)
            results.append(_case(bundle, case, processes, ways, options, rates, skipped))
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
        "options": {"seconds": options.seconds, "rounds": options.rounds, "on_gpu": options.on_gpu},
        "bundle": {"name": bundle.name, "sha256": bundle.sha256, "trained": bundle.trained},
        **where,
        "rates": rates,
        "ways": details,
        "skipped": skipped,
        "cases": results,
    }


def _rates(bundle: Bundle, options: BenchOptions, say: Say, skipped: dict[str, str]) -> dict[str, float]:
    """In a process that is gone before the contenders take turns."""
    say("the machine's own rates")
    precisions = sorted({precision for each in options.ways.values() for precision in each})
    with children(bundle, ["rates"], options.on_gpu) as alone:
        try:
            found: dict[str, float] = alone["rates"].ask("rates", precisions)
        except BackendError as error:
            skipped["bounds"] = str(error)
            return {}
    return found


def _open(
    processes: Mapping[str, Child], options: BenchOptions, say: Say, details: dict[str, Any], skipped: dict[str, str]
) -> list[tuple[str, str]]:
    ways = []
    for name, precisions in options.ways.items():
        for precision in precisions:
            say(f"opening {name} in {precision}")
            try:
                details[f"{name} {precision}"] = processes[name].ask("open", precision)
                ways.append((name, precision))
            except BackendError as error:
                skipped[f"{name} {precision}"] = str(error)
    return ways


def _case(
    bundle: Bundle,
    case: Case,
    processes: Mapping[str, Child],
    ways: Sequence[tuple[str, str]],
    options: BenchOptions,
    rates: Mapping[str, float],
    skipped: dict[str, str],
) -> dict[str, Any]:
    ready: dict[tuple[str, str], dict[str, Any]] = {}
    for name, precision in ways:
        try:
            ready[name, precision] = processes[name].ask("prepare", case, precision)
        except BackendError as error:
            skipped[f"{name} {precision}, {case.label}"] = str(error)
    found = interleaved(processes, list(ready), options.rounds, options.seconds / options.rounds)
    for name, precision in set(ready) - set(found):
        skipped[f"{name} {precision}, {case.label}"] = "it failed while it was measured"
    rows = {way: summary(rounds, case.batch) for way, rounds in found.items()}
    for (name, precision), row in rows.items():
        row |= {"way": name, "precision": precision, "reference": name in REFERENCES}
        row["tokens"] = ready[name, precision]["tokens"]
        row |= _bounds(bundle, case, row, rates, skipped)
    for (name, _), row in rows.items():
        if name not in REFERENCES:
            row["ratios"] = {
                f"{way} {precision}": ratios(row, other)
                for (way, precision), other in rows.items()
                if way in REFERENCES
            }
    return {**case.to_dict(), "label": case.label, "agreement": _agreement(ready), "rows": list(rows.values())}


def interleaved(
    processes: Mapping[str, Child], ways: Sequence[tuple[str, str]], rounds: int, seconds: float
) -> dict[tuple[str, str], list[Round]]:
    """Lets each way have its turn, round after round: A B A B, while all others wait. One that fails is left out."""
    found: dict[tuple[str, str], list[Round]] = {way: [] for way in ways}
    for _ in range(rounds):
        for name, precision in list(found):
            try:
                found[name, precision].append(processes[name].ask("round", precision, seconds))
            except BackendError as error:
                logger.warning("%s in %s failed: %s", name, precision, error)
                del found[name, precision]
    return found


def _bounds(
    bundle: Bundle, case: Case, row: Mapping[str, Any], rates: Mapping[str, float], skipped: dict[str, str]
) -> dict[str, Any]:
    """What the tower costs for the tokens that the texts have, whatever a way makes of them."""
    if not rates:
        return {}
    try:
        cost = graph_cost(bundle.onnx(case.tower, "fp32"), case.batch, case.tokens)
    except (BackendError, MissingExtraError) as error:
        skipped["bounds"] = str(error)
        return {}
    precision = row["precision"]
    moved = cost.bytes(precision)
    least = bound(cost.flops, moved, rates[f"gemm {precision}"], rates["copy"])
    taken = row["stages_ms"]["encoder"]
    return {"flops": cost.flops, "bytes": moved, "bound": least, "reached": float(least["ms"]) / taken}


def _agreement(ready: Mapping[tuple[str, str], Mapping[str, Any]]) -> float | None:
    """The least cosine between the first way's vectors and another's: that all did the same work."""
    vectors = [each["vectors"] for each in ready.values()]
    return min((same_vectors(vectors[0], other) for other in vectors[1:]), default=None)
