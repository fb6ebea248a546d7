"""Captured CUDA graphs, kept for the shapes that come often."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Graph = TypeVar("Graph")

WARM_UPS = 1
"""Runs of a shape without a graph before it is captured: the first run may still load kernels, which no graph can."""

LIMIT = 32
"""Graphs kept at most. Each holds some MiB of device memory, and the sizes of full batches are a handful."""

PATIENCE = 8
"""A graph gives way to another shape when it was not launched in so many times the limit of runs. Otherwise traffic of
more shapes than the limit would capture all the time, which costs many times what a graph saves."""


class GraphCache(Generic[Graph]):
    """Graphs by shape: captured when a shape comes again after its warm-up, let go when others are used more lately.

    Not thread-safe: used under the lock that orders the launches.

    Args:
        capture: Makes the graph of a key.
        close: Lets go of one.
        limit: How many are kept; 0 captures none.
    """

    def __init__(
        self, capture: Callable[[Hashable], Graph], close: Callable[[Graph], None], limit: int = LIMIT
    ) -> None:
        self._capture = capture
        self._close = close
        self._limit = limit
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._launched: dict[Hashable, int] = {}  # in which run a graph was launched last
        self._now = 0
        self._runs: OrderedDict[Hashable, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def get(self, key: Hashable) -> Graph | None:
        """The graph to launch, captured now where it is time; None where the shape is to be run without one."""
        self._now += 1
        if key in self._graphs:
            self._graphs.move_to_end(key)
            self._launched[key] = self._now
            return self._graphs[key]
        if self._limit == 0:
            return None
        runs = self._runs.pop(key, 0)
        if runs < WARM_UPS:
            self._runs[key] = runs + 1
            # A shape that is long gone is warmed up again; so the memory of what was seen is bounded too.
            while len(self._runs) > 8 * self._limit:
                self._runs.popitem(last=False)
            return None
        if len(self._graphs) >= self._limit:
            oldest = next(iter(self._graphs))
            if self._now - self._launched[oldest] <= PATIENCE * self._limit:
                self._runs[key] = runs
                return None
            # Let go before capturing, so that there are never more than the limit.
            del self._launched[oldest]
            self._close(self._graphs.pop(oldest))
        graph = self._graphs[key] = self._capture(key)
        self._launched[key] = self._now
        return graph

    def stop(self) -> None:
        """Captures no more; what there is is kept and launched."""
        self._limit = 0

    def clear(self) -> None:
        """Lets go of all, whatever becomes of each."""
        graphs = list(self._graphs.values())
        self._graphs.clear()
        self._launched.clear()
        self._runs.clear()
        with contextlib.ExitStack() as stack:
            for graph in graphs:
                stack.callback(self._close, graph)
