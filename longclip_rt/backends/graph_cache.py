"""Captured CUDA graphs, kept for the shapes that come often."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Graph = TypeVar("Graph")

WARM_UPS = 1
"""Runs of a shape without a graph before it is captured: the first run may still load kernels, which no graph can."""

LIMIT = 32
"""Graphs kept at most. Each holds some MiB of device memory, and the sizes of full batches are a handful."""


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
        self._runs: OrderedDict[Hashable, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def get(self, key: Hashable) -> Graph | None:
        """The graph to launch, captured now where it is time; None where the shape is to be run without one."""
        if key in self._graphs:
            self._graphs.move_to_end(key)
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
        # Let go before capturing, so that there are never more than the limit.
        while len(self._graphs) >= self._limit:
            self._close(self._graphs.popitem(last=False)[1])
        graph = self._graphs[key] = self._capture(key)
        return graph

    def clear(self) -> None:
        """Lets go of all."""
        while self._graphs:
            self._close(self._graphs.popitem()[1])
        self._runs.clear()
