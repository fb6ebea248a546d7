"""One process a backend: it holds the backend in every precision, and works only when it is its turn."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from longclip_rt.bench.cases import Case, Inputs, inputs_for
from longclip_rt.bench.contenders import Contender, opened
from longclip_rt.bench.rates import machine_rates
from longclip_rt.bundle.bundle import Bundle, load_bundle
from longclip_rt.errors import BackendError, LongClipError
from longclip_rt.model.tokenizer import pad_tokens

_WARM_UP = 2
_AT_LEAST = 2


@dataclass
class Round:
    """What one turn measured.

    Attributes:
        calls: Seconds of single calls, from an array in memory to vectors in memory.
        stages: Stage -> seconds in each of the runs that were split.
        per_second: Rows a second with as many calls at a time as the backend likes best.
    """

    calls: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    per_second: float = 0.0


def serve(connection: Connection, bundle_path: str, name: str, on_gpu: bool) -> None:
    """Answers requests until the other end closes; the main function of a process.

    Each request is `(method, arguments)` and each answer `(True, result)`, or `(False, message)` after an error.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        worker = Worker(bundle_path, name, on_gpu)
        while True:
            method, arguments = connection.recv()
            answer: tuple[bool, Any]
            try:
                answer = True, getattr(worker, method)(*arguments)
            except LongClipError as error:
                answer = False, str(error)
            except Exception as error:  # a library that fails takes none of the others with it
                answer = False, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            connection.send(answer)


class Worker:
    """Holds a contender in some precisions and the inputs of one case."""

    def __init__(self, bundle_path: str, name: str, on_gpu: bool) -> None:
        self._bundle: Bundle = load_bundle(bundle_path)
        self._name, self._on_gpu = name, on_gpu
        self._contenders: dict[str, Contender] = {}
        self._case: Case | None = None
        self._inputs: Inputs | None = None
        self._turn = 0

    def open(self, precision: str) -> dict[str, str]:
        """Opens the contender in one more precision; what it says of itself."""
        contender = opened(self._bundle, self._name, precision, self._on_gpu)
        self._contenders[precision] = contender
        return {"details": contender.details, "not apart": contender.whole}

    def rates(self, precisions: list[str]) -> dict[str, float]:
        """What the machine can do."""
        return machine_rates(precisions, self._on_gpu)

    def prepare(self, case: Case, precision: str) -> dict[str, Any]:
        """Makes the inputs of a case and runs it until it is warm; its length, and the first batch's vectors."""
        if self._case != case or self._inputs is None:
            self._case, self._inputs = case, inputs_for(case, self._bundle)
        contender = self._contenders[precision]
        given = self._given(contender, self._inputs.arrays[0])
        vectors = contender.run(case.tower, given)
        if not np.isfinite(vectors).all():
            raise BackendError(f"{self._name} in {precision} gives vectors that are not finite.")
        for _ in range(_WARM_UP):
            contender.run(case.tower, given)
        contender.parts(case.tower, given)
        return {"tokens": given.shape[1] if case.tower == "text" else None, "vectors": vectors}

    def round(self, precision: str, seconds: float) -> Round:
        """One turn on the prepared case, of about so many seconds."""
        assert self._case is not None and self._inputs is not None
        case, raw, contender = self._case, self._inputs.raw, self._contenders[precision]
        arrays = [self._given(contender, array) for array in self._inputs.arrays]
        found = Round()
        for index in self._turns(0.5 * seconds):
            array = arrays[index % len(arrays)]
            started = time.perf_counter()
            contender.run(case.tower, array)
            found.calls.append(time.perf_counter() - started)
        for index in self._turns(0.15 * seconds, at_least=1):
            for stage, taken in contender.parts(case.tower, arrays[index % len(arrays)]).items():
                found.stages[stage].append(taken)
        first = "decode" if case.tower == "image" else "tokenize"
        for index in self._turns(0.15 * seconds, at_least=1):
            started = time.perf_counter()
            array = self._from_raw(contender, raw[index % len(raw)])
            found.stages[first].append(time.perf_counter() - started)
            contender.run(case.tower, array)
            found.stages["end to end"].append(time.perf_counter() - started)
        found.per_second = case.batch * self._many(contender, case.tower, arrays, 0.2 * seconds, found.calls)
        return found

    def _many(self, contender: Contender, tower: str, arrays: list[Any], seconds: float, calls: list[float]) -> float:
        """Calls a second, several at a time; where one at a time is best, those that were timed."""
        if contender.concurrency == 1:
            return len(calls) / sum(calls)
        count = max(2 * contender.concurrency, round(contender.concurrency * seconds / float(np.median(calls))))
        given = [arrays[index % len(arrays)] for index in range(count)]
        with ThreadPoolExecutor(contender.concurrency) as pool:
            started = time.perf_counter()
            list(pool.map(lambda array: contender.run(tower, array), given))
            return count / (time.perf_counter() - started)

    def _turns(self, seconds: float, at_least: int = _AT_LEAST) -> Iterator[int]:
        """Numbers that go on from turn to turn, so that inputs rotate, until the time is up."""
        end = time.perf_counter() + seconds
        done = 0
        while done < at_least or time.perf_counter() < end:
            yield self._turn
            self._turn += 1
            done += 1

    def _given(self, contender: Contender, array: Any) -> Any:
        """Texts padded and images normalised as the contender wants them."""
        if array.ndim != 2:
            return contender.images(array)
        return pad_tokens(list(array), contender.length(array.shape[1]))

    def _from_raw(self, contender: Contender, raw: Any) -> Any:
        if self._case is not None and self._case.tower == "image":
            return contender.images(np.stack([self._bundle.transform.crop(photo) for photo in raw]))
        rows = [tokens.ids for tokens in self._bundle.tokenizer.encode(raw)]
        return pad_tokens(rows, contender.length(max(map(len, rows))))
