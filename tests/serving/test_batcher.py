from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from longclip_rt.errors import BackendError
from longclip_rt.serving.batcher import Batcher, Policy, Ran

POLICY = Policy(token_budget=64, max_batch=8, pad_multiple=8, max_length=32)


class Encoder:
    """Gives each number as its own vector, and notes the batches; waits where it is told to."""

    def __init__(self, policy: Policy = POLICY, slots: int = 1, max_wait: float = 0.005) -> None:
        self.batches: list[tuple[list[Any], int]] = []
        self.ran: list[Ran] = []
        self.gate = threading.Event()
        self.gate.set()
        self.pool = ThreadPoolExecutor(4)
        self.batcher = Batcher(self.run, policy, 1, self.pool, slots, max_wait, self.ran.append)

    def run(self, inputs: Sequence[Any], length: int) -> np.ndarray:
        self.batches.append((list(inputs), length))
        assert self.gate.wait(10)
        return np.array(inputs, np.float32)[:, None]


async def until(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not come about")


def test_every_input_gets_its_own_vector() -> None:
    async def run() -> None:
        encoder = Encoder(slots=2)
        rng = np.random.default_rng(0)
        asked = [list(range(start, start + count)) for start, count in ((0, 1), (100, 50), (200, 7), (300, 200))]
        answers = await asyncio.gather(
            *(encoder.batcher.submit(numbers, rng.integers(1, 33, len(numbers)).tolist()) for numbers in asked)
        )
        for numbers, answer in zip(asked, answers, strict=True):
            np.testing.assert_array_equal(answer[:, 0], numbers)
        assert max(len(inputs) for inputs, _ in encoder.batches) == 8
        assert all(len(inputs) * length <= 64 for inputs, length in encoder.batches)
        assert (await encoder.batcher.submit([], [])).shape == (0, 1)

    asyncio.run(run())


def test_requests_share_batches_of_like_length() -> None:
    async def run() -> None:
        encoder = Encoder(max_wait=0.05)
        await asyncio.gather(*(encoder.batcher.submit([number], [30 if number % 2 else 5]) for number in range(8)))
        assert sorted(sorted(inputs) for inputs, _ in encoder.batches) == [[0, 2, 4, 6], [1, 3], [5, 7]]
        assert {length for _, length in encoder.batches} == {8, 32}

    asyncio.run(run())


def test_a_full_batch_does_not_wait_and_a_lone_input_waits_for_the_bound() -> None:
    async def run() -> None:
        encoder = Encoder(max_wait=60)
        await asyncio.wait_for(encoder.batcher.submit(range(8), [8] * 8), 5)
        lone = Encoder(max_wait=0.01)
        await asyncio.wait_for(lone.batcher.submit([1], [8]), 5)
        assert lone.ran[0].waits[0] >= 0.0099

    asyncio.run(run())


def test_a_small_request_waits_for_one_batch_of_a_large_one() -> None:
    async def run() -> None:
        encoder = Encoder()
        encoder.gate.clear()
        large = asyncio.create_task(encoder.batcher.submit(range(1000, 1400), [32] * 400))
        await until(lambda: encoder.batches)
        small = asyncio.create_task(encoder.batcher.submit([1], [8]))
        await asyncio.sleep(0)
        encoder.gate.set()
        await small
        assert 1 in [one for inputs, _ in encoder.batches[:3] for one in inputs]
        assert not large.done()
        assert (await large).shape == (400, 1)

    asyncio.run(run())


def test_what_is_cancelled_or_timed_out_leaves_the_queue() -> None:
    async def run() -> None:
        encoder = Encoder()
        encoder.gate.clear()
        first = asyncio.create_task(encoder.batcher.submit([0], [8]))
        await until(lambda: encoder.batches)
        gone = asyncio.create_task(encoder.batcher.submit(range(1, 20), [8] * 19))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(encoder.batcher.submit([50], [8]), 0.01)
        assert encoder.batcher.waiting == 19
        gone.cancel()
        await until(gone.done)
        assert encoder.batcher.waiting == 0
        first.cancel()  # while its batch runs
        encoder.gate.set()
        np.testing.assert_array_equal(await encoder.batcher.submit([7], [8]), [[7]])
        assert [inputs for inputs, _ in encoder.batches] == [[0], [7]]

    asyncio.run(run())


def test_a_failed_batch_fails_its_requests_and_no_others() -> None:
    async def run() -> None:
        encoder = Encoder()

        def fail(inputs: Sequence[int], length: int) -> np.ndarray:
            if 13 in inputs:
                raise BackendError("no luck")
            return np.array([[np.nan if one == 14 else one] for one in inputs], np.float32)

        encoder.batcher = Batcher(fail, Policy(8, 1), 1, encoder.pool, 1, 0, encoder.ran.append)
        answers = await asyncio.gather(
            *(encoder.batcher.submit(inputs, [1] * len(inputs)) for inputs in ([1, 2], [12, 13, 15], [14], [3])),
            return_exceptions=True,
        )
        np.testing.assert_array_equal(answers[0], [[1], [2]])
        assert str(answers[1]) == "no luck" and "NaN" in str(answers[2])
        np.testing.assert_array_equal(answers[3], [[3]])
        assert encoder.batcher.waiting == 0

    asyncio.run(run())
