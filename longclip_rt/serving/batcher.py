"""Batches of what many requests ask for at once, planned as `embed` plans them: by tokens and by length.

LitServe, BentoML and Ray Serve batch by count and wait. None knows lengths, so that one long text pads a batch of short
ones to its own length; hence this file.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np

from longclip_rt.backends.base import Float32
from longclip_rt.backends.batching import Batch, plan_batches
from longclip_rt.errors import BackendError

# Inputs that a batch is chosen among. Of a few hundred, a batch of one length is nearly always full; planning them
# takes less than a millisecond of the event loop.
_WINDOW = 512


@dataclass(frozen=True)
class Policy:
    """What a batch may be; see `plan_batches`.

    Attributes:
        token_budget: Most rows times length.
        max_batch: Most rows.
        pad_multiple: Lengths are rounded up to a multiple of this.
        max_length: The longest length; None: no limit.
        buckets: The only lengths, where the engine wants that.
    """

    token_budget: int
    max_batch: int
    pad_multiple: int = 1
    max_length: int | None = None
    buckets: tuple[int, ...] = ()

    def plan(self, lengths: Sequence[int]) -> list[Batch]:
        """Batches of inputs of these lengths."""
        return plan_batches(
            lengths,
            pad_multiple=self.pad_multiple,
            token_budget=self.token_budget,
            max_batch=self.max_batch,
            max_length=self.max_length,
            buckets=self.buckets,
        )

    def full(self, batch: Batch) -> bool:
        """Whether no further row fits."""
        return len(batch.indices) >= min(self.max_batch, max(1, self.token_budget // batch.length))


@dataclass(frozen=True)
class Ran:
    """A batch that was run.

    Attributes:
        rows: Its inputs.
        length: What each was padded to.
        seconds: Time in the encoder.
        waits: Seconds that each input had waited for it.
    """

    rows: int
    length: int
    seconds: float
    waits: tuple[float, ...]


@dataclass(eq=False)
class _Request:
    """One caller's inputs: those that wait, by position, and the vectors [n, D] of the others."""

    waiting: dict[int, tuple[Any, int]]
    arrived: float
    done: asyncio.Future[Float32]
    missing: int
    vectors: Float32


class Batcher:
    """A queue before one encoder. All of it runs on one event loop, the encoder in a pool's threads.

    Requests take turns: the one whose turn it is gives the first input of the next batch, and inputs of like length
    fill it up, one of each request in turn. So a request of one input waits for one batch of each request before it,
    however large those are.

    Args:
        run: Encodes inputs, padded to a length: `run(inputs, length)` gives vectors [B, D].
        policy: What a batch may be.
        dim: Length D of a vector.
        pool: Where `run` runs.
        slots: Batches that run at a time.
        max_wait: Seconds that a batch which is not full waits for more.
        told: Called on the event loop after each batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any], int], Float32],
        policy: Policy,
        dim: int,
        pool: Executor,
        slots: int,
        max_wait: float,
        told: Callable[[Ran], None],
    ) -> None:
        self._run, self._policy, self._dim, self._pool = run, policy, dim, pool
        self._free = slots
        self._max_wait = max_wait
        self._told = told
        self._turns: dict[_Request, None] = {}
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Inputs that no batch has taken yet."""
        return sum(len(request.waiting) for request in self._turns)

    async def submit(self, inputs: Sequence[Any], lengths: Sequence[int]) -> Float32:
        """Vectors [n, D] of n inputs of these lengths, once all are there. Cancelled, it leaves the queue.

        Raises:
            BackendError: A vector is not finite, or whatever the encoder raises.
        """
        if not inputs:
            return np.empty((0, self._dim), np.float32)
        loop = asyncio.get_running_loop()
        vectors = np.empty((len(inputs), self._dim), np.float32)
        waiting = dict(enumerate(zip(inputs, lengths, strict=True)))
        request = _Request(waiting, loop.time(), loop.create_future(), len(inputs), vectors)
        self._turns[request] = None
        self._schedule()
        try:
            return await request.done
        finally:
            self._turns.pop(request, None)

    def _schedule(self) -> None:
        """Starts the batches that may be started now, and sets an alarm for the next."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        loop = asyncio.get_running_loop()
        while self._turns and self._free:
            window = [chosen for chosen, _ in zip(self._in_turn(), range(_WINDOW), strict=False)]
            lengths = [request.waiting[position][1] for request, position in window]
            batch = next(batch for batch in self._policy.plan(lengths) if 0 in batch.indices)
            due = min(request.arrived for request in self._turns) + self._max_wait
            if not self._policy.full(batch) and loop.time() < due:
                self._alarm = loop.call_at(due, self._schedule)
                return
            self._start([window[index] for index in batch.indices], batch.length)

    def _in_turn(self) -> Iterator[tuple[_Request, int]]:
        """The inputs that wait, one of each request and then the next of each."""
        sources = deque((request, iter(request.waiting)) for request in self._turns)
        while sources:
            request, positions = sources.popleft()
            if (position := next(positions, None)) is not None:
                yield request, position
                sources.append((request, positions))

    def _start(self, rows: list[tuple[_Request, int]], length: int) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        first = next(iter(self._turns))
        inputs = [request.waiting.pop(position)[0] for request, position in rows]
        del self._turns[first]
        self._turns[first] = None  # at the end: the others come first
        for request in {request for request, _ in rows}:
            if not request.waiting:
                del self._turns[request]
        self._free -= 1
        waits = tuple(now - request.arrived for request, _ in rows)
        running = loop.run_in_executor(self._pool, self._run, inputs, length)
        running.add_done_callback(
            lambda done: self._finish(rows, done, Ran(len(rows), length, loop.time() - now, waits))
        )

    def _finish(self, rows: list[tuple[_Request, int]], done: asyncio.Future[Float32], ran: Ran) -> None:
        self._free += 1
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if error is None:
            self._told(ran)
            for (request, position), vector in zip(rows, done.result(), strict=True):
                if not np.isfinite(vector).all():
                    self._fail(request, BackendError("The encoder gave NaN or infinity. Try --precision fp32."))
                    continue
                request.vectors[position] = vector
                request.missing -= 1
                if not request.missing and not request.done.done():
                    request.done.set_result(request.vectors)
        else:
            for request in {request for request, _ in rows}:
                self._fail(request, error)
        self._schedule()

    def _fail(self, request: _Request, error: BaseException) -> None:
        self._turns.pop(request, None)
        if not request.done.done():
            request.done.set_exception(error)
