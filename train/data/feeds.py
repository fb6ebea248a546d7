"""Which rows make up which batch: one process's share of an epoch, and rows that stand in for bad ones.

Two kinds of data, two feeds. Rows that can be had in any order are drawn by a permutation of the epoch; the order does
not depend on the number of processes, and a run that goes on in mid-epoch begins at its place at once. Shards are read
as streams: each process reads its own, and a run that goes on reads up to its place without decoding anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from longclip_rt.errors import TrainingError
from longclip_rt.train.data.rows import Row

# Rows that a stream puts aside to stand in for bad ones; a twentieth of the stream where that is less.
_RESERVE = 32


@dataclass(frozen=True, slots=True)
class Share:
    """One process's part of each batch.

    Attributes:
        batch_size: Rows of a batch over all processes, a multiple of `world`.
        rank: The process's number.
        world: Processes.
    """

    batch_size: int
    rank: int = 0
    world: int = 1

    @property
    def rows(self) -> int:
        """Rows of a batch that the process takes."""
        return self.batch_size // self.world


class Feed(Protocol):
    """One process's share of an epoch."""

    def rows(self, start: int) -> Iterator[Row]:
        """The process's rows from step `start` of the epoch on, `Share.rows` of them a step."""
        ...

    def spares(self, step: int, place: int) -> Iterator[Row]:
        """Rows to put, in this order, in the place of a bad one. The step's rows were drawn from `rows` before."""
        ...


class Order(Protocol):
    """An epoch's rows in the order in which they are trained on."""

    def __len__(self) -> int: ...

    def row(self, position: int) -> Row:
        """The row at a position, from 0."""
        ...


@dataclass(frozen=True)
class OrderedFeed:
    """Batch k is positions [k * batch_size, (k + 1) * batch_size) of the order; each process takes a slice of it."""

    order: Order
    share: Share

    def rows(self, start: int) -> Iterator[Row]:
        """A slice of each batch, from batch `start` on."""
        for step in range(start, len(self.order) // self.share.batch_size):
            first = step * self.share.batch_size + self.share.rank * self.share.rows
            for position in range(first, first + self.share.rows):
                yield self.order.row(position)

    def spares(self, step: int, place: int) -> Iterator[Row]:
        """See `Feed.spares`. The first is about half an epoch away; rows of the same batch come last of all.

        The rows outside a batch are a ring. Each place of a batch, on whichever process, begins at another row of the
        ring and goes on by whole batches, so that two of them take the same spare only where the ring is shorter than
        a batch or most of it is bad.
        """
        size, total = self.share.batch_size, len(self.order)
        after, outside = (step + 1) * size, total - size
        place += self.share.rank * self.share.rows
        begin = place + outside // 2
        by_batches = range(begin, begin + outside, size)
        for turn in itertools.chain(by_batches, range(begin, begin + outside)):
            yield self.order.row((after + turn % outside) % total)
        for turn in range(place + 1, place + size):
            yield self.order.row(step * size + turn % size)


@dataclass
class StreamFeed:
    """Batches of rows in the order in which a stream gives them, after some that are put aside as spares.

    Attributes:
        open_stream: Begins the n-th pass, from 0, over the process's rows.
        share: The process's part.
        steps: Batches of the epoch. A stream that gives fewer rows is read again, in another order.
        expected: Rows that one pass is thought to give; bounds the number of spares.
    """

    open_stream: Callable[[int], Iterator[Row]]
    share: Share
    steps: int
    expected: int

    def __post_init__(self) -> None:
        self._reserve: list[Row] = []

    def rows(self, start: int) -> Iterator[Row]:
        """The stream's rows behind those of the steps before; these are read and dropped."""
        stream = self._endless()
        self._reserve = list(itertools.islice(stream, max(1, min(_RESERVE, self.expected // 20))))
        yield from itertools.islice(stream, start * self.share.rows, self.steps * self.share.rows)

    def spares(self, step: int, place: int) -> Iterator[Row]:
        """The rows put aside, each place of a batch beginning at another."""
        begin = (step + place) % len(self._reserve)
        yield from self._reserve[begin:]
        yield from self._reserve[:begin]

    def _endless(self) -> Iterator[Row]:
        for number in itertools.count():
            empty = True
            for row in self.open_stream(number):
                empty = False
                yield row
            if empty:
                raise TrainingError(
                    f"The shards of process {self.share.rank} hold no rows to train on. Start fewer processes, or give "
                    "more shards."
                )


def shuffled(count: int, *key: int) -> npt.NDArray[np.int64]:
    """A permutation that depends on nothing but its arguments.

    Numpy keeps the stream of PCG64's raw bits from version to version, which it does not promise of `permutation`.

    Args:
        count: Its length.
        key: Numbers that choose it, each at least 0.

    Returns:
        int64 [count], each of 0 ... count - 1 once.
    """
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(bits, kind="stable")
