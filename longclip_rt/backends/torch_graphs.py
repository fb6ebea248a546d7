"""PyTorch's towers on an NVIDIA GPU: a few static shapes, each captured once as a CUDA graph and launched as a whole.

Texts are padded to a few lengths and batches to a few sizes. Inputs go through page-locked memory, of which each shape
has two sets: while one batch is computed, another thread fills the next one in and takes the last one out.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import Float32

SIZES = (1, 8, 32, 64, 256)
"""Rows of the batches that graphs are captured for; others are padded up to the next, larger ones are cut up."""

BUCKETS = (32, 77, 128, 248)
"""Tokens that texts are padded to, as far as the model's context goes."""

SLOTS = 2
"""Batches of one shape that are under way at a time."""

Encode = Callable[[Any], Sequence[Any]]


def padded_size(rows: int) -> int:
    """The least of `SIZES` that holds so many rows."""
    return next(size for size in SIZES if size >= rows)


def pieces(rows: int) -> list[slice]:
    """Where a batch is cut, so that no part is larger than the largest of `SIZES`."""
    return [slice(start, min(start + SIZES[-1], rows)) for start in range(0, rows, SIZES[-1])]


@dataclass(eq=False)
class _Slot:
    """Page-locked memory for one batch on its way."""

    given: Any
    outputs: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Static:
    """A tower for one shape: where its input and outputs lie on the GPU, and what runs it."""

    given: Any
    run: Callable[[], object]
    outputs: Mapping[str, Any]
    slots: queue.SimpleQueue[_Slot] = field(default_factory=queue.SimpleQueue)


class StaticTowers:
    """Runs towers in static shapes; safe to call from several threads.

    Args:
        torch: PyTorch, imported.
        device: A `torch.device` of CUDA.
        towers: By name, from a tensor of token ids [B, S] or of images to the outputs, float32.
        names: By tower, the outputs' names in order.
        buckets: Lengths that texts are padded to, shortest first; the last is the context length.
    """

    def __init__(
        self,
        torch: Any,
        device: Any,
        towers: Mapping[str, Encode],
        names: Mapping[str, Sequence[str]],
        buckets: Sequence[int],
    ) -> None:
        self._torch, self._device, self._towers, self._names = torch, device, towers, names
        self._buckets = buckets
        self._lock = threading.Lock()
        self._static: dict[tuple[str, tuple[int, ...], Any], _Static] = {}
        self._start()

    def _start(self) -> None:
        with self._torch.cuda.device(self._device):
            self._stream = self._torch.cuda.Stream()
            self._memory = self._torch.cuda.graph_pool_handle()  # one for all graphs: they run one after another

    def run(self, tower: str, inputs: NDArray[Any], outputs: Sequence[str]) -> list[Float32]:
        """Runs a batch of any size from host memory to host memory.

        Args:
            tower: `text` or `image`.
            inputs: Its batch, numpy.
            outputs: Names of its outputs.
        """
        results = [self._from_host(tower, inputs[piece], outputs) for piece in pieces(len(inputs))]
        return [np.concatenate(parts) for parts in zip(*results, strict=True)]

    def run_on_device(self, tower: str, inputs: Any, outputs: Sequence[str]) -> list[Any]:
        """The same from a tensor on this GPU to tensors there; in order with the caller's current stream."""
        torch = self._torch
        caller = torch.cuda.current_stream(self._device)
        results = []
        for piece in pieces(len(inputs)):
            part = inputs[piece]
            static = self._static_for(tower, part)
            with self._in_order():
                self._stream.wait_stream(caller)
                self._fill(tower, static.given, part)
                static.run()
                results.append([self._cut(tower, static.outputs[name], part).clone() for name in outputs])
            caller.wait_stream(self._stream)
        inputs.record_stream(self._stream)
        for each in (tensor for parts in results for tensor in parts):
            each.record_stream(caller)
        return [torch.cat(parts) for parts in zip(*results, strict=True)]

    def timed(self, tower: str, inputs: NDArray[Any], outputs: Sequence[str]) -> dict[str, float]:
        """Runs a batch as `run` does, by itself, and takes the time of its parts by CUDA events.

        Returns:
            Seconds of `copy in` (filling page-locked memory included), `encoder` and `copy out`.
        """
        seconds = np.zeros(3)
        for piece in pieces(len(inputs)):
            events: list[Any] = []
            self._from_host(tower, inputs[piece], outputs, lambda: events.append(self._event()))  # noqa: B023
            seconds += [first.elapsed_time(second) / 1e3 for first, second in itertools.pairwise(events)]
        return dict(zip(("copy in", "encoder", "copy out"), map(float, seconds), strict=True))

    def _from_host(
        self, tower: str, inputs: NDArray[Any], outputs: Sequence[str], mark: Callable[[], object] = lambda: None
    ) -> list[Float32]:
        given = self._torch.from_numpy(inputs if inputs.flags.writeable else inputs.copy())
        static = self._static_for(tower, given)
        slot = static.slots.get()
        try:
            mark()
            self._fill(tower, slot.given, given)
            for name in outputs:
                if name not in slot.outputs:
                    slot.outputs[name] = self._pinned(static.outputs[name])
            with self._in_order():
                static.given.copy_(slot.given, non_blocking=True)
                mark()
                static.run()
                mark()
                for name in outputs:
                    slot.outputs[name].copy_(static.outputs[name], non_blocking=True)
                mark()
                done = self._recorded()
            done()
            return [self._cut(tower, slot.outputs[name], given).numpy().copy() for name in outputs]
        finally:
            static.slots.put(slot)

    def _fill(self, tower: str, target: Any, part: Any) -> None:
        """Copies a batch into static memory; what is left of an older batch becomes padding."""
        rows = len(part)
        target[rows:] = 0
        if tower == "text":
            target[:rows, part.shape[1] :] = 0
            target = target[:, : part.shape[1]]
        target[:rows].copy_(part)

    def _cut(self, tower: str, output: Any, part: Any) -> Any:
        """Without the rows, and of texts' states the tokens, that were added."""
        output = output[: len(part)]
        return output[:, : part.shape[1]] if tower == "text" and output.ndim == 3 else output

    def _static_for(self, tower: str, part: Any) -> _Static:
        shape = (padded_size(len(part)), *part.shape[1:])
        if tower == "text":
            shape = (shape[0], next(bucket for bucket in self._buckets if bucket >= part.shape[1]))
        key = (tower, shape, part.dtype)
        with self._lock:
            if key not in self._static:
                self._static[key] = self._made(tower, shape, part.dtype)
            return self._static[key]

    def _made(self, tower: str, shape: tuple[int, ...], dtype: Any) -> _Static:
        given = self._torch.zeros(shape, dtype=dtype, device=self._device)
        run, outputs = self._captured(tower, given)
        static = _Static(given, run, dict(zip(self._names[tower], outputs, strict=True)))
        for _ in range(SLOTS):
            static.slots.put(_Slot(self._pinned(given)))
        return static

    def _captured(self, tower: str, given: Any) -> tuple[Callable[[], object], Sequence[Any]]:
        """Captures a tower, after two runs: libraries set up things at first use."""
        torch, encode = self._torch, self._towers[tower]
        with self._exact(), torch.cuda.stream(self._stream):
            for _ in range(2):
                encode(given)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate and wait meanwhile; this one may not.
            with torch.cuda.graph(graph, self._memory, self._stream, capture_error_mode="thread_local"):
                outputs = encode(given)
        return graph.replay, outputs

    def _pinned(self, like: Any) -> Any:
        return self._torch.zeros(like.shape, dtype=like.dtype, pin_memory=True)

    def _event(self) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def _recorded(self) -> Callable[[], object]:
        """What waits for all that was enqueued so far."""
        event = self._torch.cuda.Event(blocking=True)
        event.record(self._stream)
        wait: Callable[[], object] = event.synchronize
        return wait

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        """One thread enqueues at a time, all on one stream: what is static is then used by one batch after another."""
        with self._lock, self._exact(), self._torch.cuda.stream(self._stream):
            yield

    @contextlib.contextmanager
    def _exact(self) -> Iterator[None]:
        """fp32 is fp32: without the 10-bit products that cuDNN takes for convolutions unless it is told."""
        cudnn, products = self._torch.backends.cudnn, self._torch.backends.cuda.matmul
        before = products.allow_tf32
        flags: AbstractContextManager[Any] = cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        )
        with flags:
            products.allow_tf32 = False
            try:
                with self._torch.inference_mode(), self._torch.cuda.device(self._device):
                    yield
            finally:
                products.allow_tf32 = before

    def close(self) -> None:
        """Lets go of graphs and of their memory."""
        with self._lock:
            self._static.clear()
