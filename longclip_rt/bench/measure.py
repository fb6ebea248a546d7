"""Runs a benchmark: opens a process a backend, lets them take turns, and gathers what they say."""

from __future__ import annotations

import datetime
import logging
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from longclip_rt.backends.base import EMBEDDINGS
from longclip_rt.bench.cases import Case
from longclip_rt.bench.contenders import same_vectors
from longclip_rt.bench.cost import Cost, graph_cost
from longclip_rt.bench.machine import description
from longclip_rt.bench.roofline import tower_cost
from longclip_rt.bench.summary import bound, ratios, summary
from longclip_rt.bench.worker import Round, serve
from longclip_rt.bundle.bundle import Bundle
from longclip_rt.choices import REFERENCES
from longclip_rt.errors import BackendError, MissingExtraError

logger = logging.getLogger("longclip_rt")

Say = Callable[[str], None]
Keep = Callable[[dict[str, Any]], None]
FORMAT = 1
_RATES = "rates"
_RATES_SECONDS = 0.1  # of each rate, after each case


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        ways: Backend or reference -> its precisions.
        cases: The batches.
        on_gpu: Whether the references, and the machine's own rates, are those of the GPU.
        seconds: Of every way in every case, all rounds together.
        rounds: Turns.
        limit: Seconds after which no further case is begun.
    """

    ways: Mapping[str, Sequence[str]]
    cases: Sequence[Case]
    on_gpu: bool
    seconds: float = 2.0
    rounds: int = 4
    limit: float = math.inf


class Child:
    """A process with one contender."""

    def __init__(self, bundle: Bundle, name: str, on_gpu: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, other = context.Pipe()
        fresh = Bundle(bundle.path, bundle.manifest)  # without what this process has loaded of it
        arguments = (other, fresh, name, on_gpu)
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


def run_bench(
    bundle: Bundle, options: BenchOptions, say: Say = lambda words: None, keep: Keep = lambda results: None
) -> dict[str, Any]:
    """Measures every way in every case.

    Args:
        bundle: The model.
        options: What to measure.
        say: Told what is done next.
        keep: Given the results so far after every case.

    Returns:
        Plain values, as the JSON file holds them.

    Raises:
        BackendError: None of the ways can be opened.
    """
    started = time.perf_counter()
    details: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    results: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "options": {"seconds": options.seconds, "rounds": options.rounds, "on_gpu": options.on_gpu},
        "bundle": {"name": bundle.name, "sha256": bundle.sha256, "trained": bundle.trained,
                   "weights": bundle.weights_sha256},
        **description(),
        "rates": {},
        "ways": details,
        "skipped": skipped,
        "cases": [],
    }  # fmt: skip
    with children(bundle, [*options.ways, _RATES], options.on_gpu) as processes:
        say("the machine's own rates")
        results["rates"] = _rates(processes[_RATES], options, 3 * _RATES_SECONDS, {}, skipped)
        ways = _open(processes, options, say, details, skipped)
        if not any(name not in REFERENCES for name, _ in ways):
            reasons = ". ".join(f"{way}: {reason}" for way, reason in skipped.items())
            raise BackendError(f"No backend can be measured. {reasons}")
        for number, case in enumerate(options.cases, 1):
            if time.perf_counter() - started > options.limit:
                skipped[case.label] = f"{options.limit:g} seconds were over"
                continue
            say(f"{case.label}, {number} of {len(options.cases)}")
            results["cases"].append(_case(bundle, case, processes, ways, options, skipped))
            results["rates"] = _rates(processes[_RATES], options, _RATES_SECONDS, results["rates"], skipped)
            _bound(results)
            results["seconds"] = round(time.perf_counter() - started, 1)
            keep(results)
    return results


def _rates(
    child: Child, options: BenchOptions, seconds: float, known: Mapping[str, float], skipped: dict[str, str]
) -> dict[str, float]:
    """Measures the machine once more, and keeps the best of each rate: other programs may have had their share."""
    asked = {precision for each in options.ways.values() for precision in each}
    precisions = sorted({"fp32", *asked} - {"int8"})  # of which PyTorch has no fast product to measure by
    try:
        found = child.ask("rates", precisions, seconds)
    except BackendError as error:
        skipped["bounds"] = str(error)
        return {}
    return {name: max(rate, known.get(name, 0.0)) for name, rate in found.items()}


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
    for (name, _), row in rows.items():
        if name not in REFERENCES:
            row["ratios"] = {
                f"{way} {precision}": ratios(row, other)
                for (way, precision), other in rows.items()
                if way in REFERENCES
            }
    return {
        **case.to_dict(),
        "label": case.label,
        "cost": _cost(bundle, case, skipped),
        "agreement": _agreement(ready),
        "rows": list(rows.values()),
    }


def interleaved(
    processes: Mapping[str, Child], ways: Sequence[tuple[str, str]], rounds: int, seconds: float
) -> dict[tuple[str, str], list[Round]]:
    """Lets each way have its turn, round after round: A B A B, while all others wait. One that fails is left out."""
    found: dict[tuple[str, str], list[Round]] = {way: [] for way in ways}
    for number in range(rounds):
        for name, precision in list(found):
            try:
                found[name, precision].append(processes[name].ask("round", precision, seconds, number == 0))
            except BackendError as error:
                logger.warning("%s in %s failed: %s", name, precision, error)
                del found[name, precision]
    return found


def _cost(bundle: Bundle, case: Case, skipped: dict[str, str]) -> dict[str, int] | None:
    """Of the tokens that the texts have, whatever a way makes of them; by formula where there is no graph."""
    if not bundle.precisions:
        return asdict(tower_cost(bundle.architecture, case.tower, case.batch, case.tokens))
    try:
        return asdict(graph_cost(bundle.onnx(case.tower, "fp32"), EMBEDDINGS[case.tower], case.batch, case.tokens))
    except (BackendError, MissingExtraError) as error:
        skipped["bounds"] = str(error)
        return None


def _bound(results: Mapping[str, Any]) -> None:
    """Sets beside each figure what the rates allow."""
    rates = results["rates"]
    for case in results["cases"]:
        for row in case["rows"] if rates and case["cost"] else ():
            cost, precision = Cost(**case["cost"]), row["precision"]
            if precision == "int8":
                continue
            gemm = max(rates[f"gemm {precision}"], rates["gemm fp32"])  # without fast products, fp32 serves
            least = bound(cost.flops, cost.bytes(precision), gemm, rates["copy"])
            row |= {"bound": least, "reached": float(least["ms"]) / row["stages_ms"]["encoder"]}


def _agreement(ready: Mapping[tuple[str, str], Mapping[str, Any]]) -> float | None:
    """The least cosine between the first way's vectors and another's: that all did the same work."""
    vectors = [each["vectors"] for each in ready.values()]
    return min((same_vectors(vectors[0], other) for other in vectors[1:]), default=None)
