"""One tower's TensorRT engine on one GPU: batches in flight, copies that overlap with compute, CUDA graphs.

Each of two slots has its own buffers and its own stream for copies; one stream computes. While one batch is computed,
the next one is copied in and the last one out. Since one stream computes everything, there is one workspace.
Nothing is allocated after opening but what TensorRT and the driver keep for captured graphs, whose number is bounded.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import INPUT_NAMES, Float32
from longclip_rt.errors import BackendError
from longclip_rt.tensorrt.device import Gpu, Pinned, gpu_errors
from longclip_rt.tensorrt.graph_cache import LIMIT, GraphCache
from longclip_rt.tensorrt.head import HeadFiles, HeadKernel, pca_name, states_name
from longclip_rt.tensorrt.jit_kernels import JitKernels
from longclip_rt.tensorrt.profiles import SLOTS, Memory, Piece, Profile, Tensor, memory_for, pieces
from longclip_rt.tensorrt.tensors import check_states, profiles_of, tensors_of

logger = logging.getLogger("longclip_rt")


@dataclass(frozen=True)
class _Key:
    """What a CUDA graph is of: the slot fixes the addresses, the rest the shapes."""

    slot: int
    profile: Profile
    rows: int


@dataclass(frozen=True, eq=False)
class _Captured:
    """A graph, and the context that it was captured from: TensorRT wants one for each."""

    graph: Any
    context: Any


@dataclass(eq=False)
class _Slot:
    """What one batch in flight uses: by profile and tensor, page-locked and device memory; and a stream for copies."""

    number: int
    stream: Any
    pinned: dict[tuple[Profile, str], Pinned] = field(default_factory=dict)
    device: dict[tuple[Profile, str], Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Flight:
    """A piece that is under way: `done` is the event after its last copy."""

    slot: _Slot
    piece: Piece
    done: Any


class EngineRunner:
    """Runs an engine; safe to call from several threads.

    Args:
        library: `tensorrt` or `tensorrt_rtx`, imported.
        engine: A deserialised `ICudaEngine`.
        gpu: Where it is.
        tower: `text` or `image`.
        head: The PCA head to launch after it, or None.
        plan_bytes: Size of its plan, for the account of memory.
        graphs: CUDA graphs kept at most; 0: none.
        kernels: TensorRT-RTX's, which compiles where it runs; None with TensorRT.

    Raises:
        BackendError: The engine is not one of this tower's, or its buffers cannot be allocated.
    """

    def __init__(
        self,
        library: Any,
        engine: Any,
        gpu: Gpu,
        tower: str,
        head: HeadFiles | None = None,
        plan_bytes: int = 0,
        graphs: int = LIMIT,
        kernels: JitKernels | None = None,
    ) -> None:
        self._library, self._engine, self._gpu, self._tower = library, engine, gpu, tower
        self._input, self._kernels = INPUT_NAMES[tower], kernels
        tensors = tensors_of(library, engine, tower)
        self.profiles = profiles_of(engine, self._input, tower)
        if head is not None:
            check_states(tensors, tower, head)
            tensors = [*tensors, Tensor(pca_name(tower), (-1, head.k), 4, False)]
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._in_engine = [name for name in self._tensors if head is None or name != pca_name(tower)]
        workspaces = [engine.get_device_memory_size_for_profile_v2(profile.index) for profile in self.profiles]
        self.memory = memory_for(self.profiles, tensors, workspaces, plan_bytes)
        self._launch = threading.Lock()
        self._free: queue.LifoQueue[_Slot] = queue.LifoQueue()
        self._slots: list[_Slot] = []
        self._closed = False
        self._closing = threading.Lock()
        self.released = False
        self._graphs = GraphCache(self._capture, self._let_go, graphs)
        self._contexts: dict[Profile, Any] = {}
        self._head: HeadKernel | None = None
        self._held = contextlib.ExitStack()  # what is to be let go of, the last first, whatever becomes of each
        with gpu_errors(f"The {tower} engine, which needs {_mib(self.memory)} on GPU {gpu.number}, cannot be opened"):
            try:
                self._allocate(head)
            except BaseException:
                with contextlib.suppress(Exception):  # the error at hand says more
                    self._held.close()
                raise

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names that `run` takes."""
        return tuple(tensor.name for tensor in self._tensors.values() if tensor.on_host and not tensor.is_input)

    def _allocate(self, head: HeadFiles | None) -> None:
        gpu = self._gpu
        gpu.activate()
        self._compute = self._stream()
        self._slots = [_Slot(number, self._stream()) for number in range(SLOTS)]
        self._held.callback(self._compute.sync)  # frees are enqueued too
        self._workspace = self._kept(gpu.allocate(max(self.memory.workspace, 1), self._compute))
        if head is not None:
            self._head = HeadKernel(head, gpu, self._compute)
            self._held.callback(self._head.close, self._compute)
        for slot in self._slots:
            for profile in self.profiles:
                for tensor in self._tensors.values():
                    size = tensor.bytes_for(profile)
                    slot.device[profile, tensor.name] = self._kept(gpu.allocate(size, self._compute))
                    if tensor.on_host:
                        pinned = slot.pinned[profile, tensor.name] = gpu.allocate_pinned(size, self._compute)
                        self._kept(pinned.buffer)
        self._compute.sync()  # what was allocated on this stream is used on others
        self._held.callback(self._contexts.clear)
        for profile in self.profiles:
            self._contexts[profile] = self._context(profile)
        if self._kernels is not None:
            self._held.callback(self._kernels.save)
        self._held.callback(self._graphs.clear)
        for slot in reversed(self._slots):
            self._held.callback(slot.stream.sync)
            self._free.put(slot)
        self._held.callback(self._compute.sync)

    def _stream(self) -> Any:
        stream = self._gpu.stream()
        self._held.callback(stream.close)
        return stream

    def _kept(self, buffer: Any) -> Any:
        self._held.callback(buffer.close, self._compute)
        return buffer

    def run(self, inputs: NDArray[Any], names: Sequence[str]) -> list[Float32]:
        """Runs a batch of any size.

        Args:
            inputs: Token ids [B, S] int32, or pixels [B, 3, H, W] float32.
            names: Out of `outputs`.

        Returns:
            One float32 array an output. States of every token are cut to the S of the input.

        Raises:
            BackendError: No profile holds the shape, the runner is closed, or the GPU failed.
        """
        length = inputs.shape[1] if self._tower == "text" else None
        results = [self._result(name, len(inputs), length) for name in names]
        flying: deque[_Flight] = deque()
        with gpu_errors(f"GPU {self._gpu.number} failed on a {self._tower} batch {list(inputs.shape)}"):
            self._gpu.activate()
            try:
                for piece in pieces(self.profiles, len(inputs), length):
                    slot = self._take(flying, results, names)
                    try:
                        flying.append(self._start(slot, piece, inputs, names))
                    except BaseException:
                        self._free.put(slot)
                        raise
                while flying:
                    self._finish(flying.popleft(), results, names)
            finally:
                for flight in flying:  # after an error: their slots must not be lost, nor used before they are done
                    with contextlib.suppress(Exception):
                        flight.done.sync()
                    self._free.put(flight.slot)
        return results

    def _result(self, name: str, rows: int, length: int | None) -> Float32:
        tensor = self._tensors[name]
        return np.empty(tensor.shape_for(Profile(0, length, rows, rows), rows), np.float32)

    def _take(self, flying: deque[_Flight], results: list[Float32], names: Sequence[str]) -> _Slot:
        """A free slot. Own batches are finished before others are waited for, so that no two calls wait in a ring."""
        while True:
            try:
                slot = self._free.get(block=not flying)
            except queue.Empty:
                self._finish(flying.popleft(), results, names)
                continue
            if self._closed:
                self._free.put(slot)  # for whoever waits too
                raise BackendError("The backend was closed while it was in use. Open it again.")
            return slot

    def _start(self, slot: _Slot, piece: Piece, inputs: NDArray[Any], names: Sequence[str]) -> _Flight:
        """Fills the slot and enqueues all: copies in, the engine and the head, copies out."""
        profile, rows, given = piece.profile, piece.rows, self._tensors[self._input]
        shape = given.shape_for(profile, rows)
        source = slot.pinned[profile, self._input]
        filled = source.view(shape, inputs.dtype)
        part = inputs[piece.start : piece.stop]
        if part.shape != shape:  # what is left of an older batch must not reach the encoder
            filled[...] = 0
        filled[tuple(slice(0, size) for size in part.shape)] = part
        with self._launch:
            self._gpu.copy(slot.device[profile, self._input], source.buffer, filled.nbytes, slot.stream)
            self._compute.wait(self._gpu.record(slot.stream))
            key = _Key(slot.number, profile, rows)
            captured = self._graph_of(key)
            if captured is None:
                self._prepare(self._contexts[profile], key)
                self._execute(self._contexts[profile], key)
            else:
                captured.graph.launch(self._compute)
            slot.stream.wait(self._gpu.record(self._compute))
            for name in names:
                tensor = self._tensors[name]
                size = int(np.prod(tensor.shape_for(profile, rows))) * tensor.itemsize
                self._gpu.copy(slot.pinned[profile, name].buffer, slot.device[profile, name], size, slot.stream)
            return _Flight(slot, piece, self._gpu.record(slot.stream))

    def _finish(self, flight: _Flight, results: list[Float32], names: Sequence[str]) -> None:
        """Waits for a piece, copies its rows out of page-locked memory, and frees its slot."""
        piece = flight.piece
        try:
            flight.done.sync()
            for name, result in zip(names, results, strict=True):
                shape = self._tensors[name].shape_for(piece.profile, piece.rows)
                rows = flight.slot.pinned[piece.profile, name].view(shape, np.float32)[: piece.stop - piece.start]
                result[piece.start : piece.stop] = rows[:, : result.shape[1]]
        finally:
            self._free.put(flight.slot)

    def _context(self, profile: Profile) -> Any:
        """A context for one profile that computes in the shared workspace."""
        how: Any = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._kernels is not None:
            how = self._kernels.config()
        context = self._engine.create_execution_context(how)
        if context is None:
            raise BackendError(f"TensorRT gave no execution context for the {self._tower} engine. Free GPU memory.")
        context.set_device_memory(int(self._workspace.handle), self._workspace.size)
        self._check(
            context.set_optimization_profile_async(profile.index, int(self._compute.handle)), f"profile {profile.index}"
        )
        self._compute.sync()
        return context

    def _prepare(self, context: Any, key: _Key) -> None:
        """Tells a context the shape and the addresses of a slot."""
        slot = self._slots[key.slot]
        shape = self._tensors[self._input].shape_for(key.profile, key.rows)
        self._check(context.set_input_shape(self._input, shape), f"the shape {list(shape)}")
        for name in self._in_engine:
            address = int(slot.device[key.profile, name].handle)
            self._check(context.set_tensor_address(name, address), f"the address of {name}")

    def _execute(self, context: Any, key: _Key) -> None:
        """Enqueues the engine and the head."""
        self._check(context.execute_async_v3(int(self._compute.handle)), "a batch (its log above says why)")
        if self._head is not None:
            device = self._slots[key.slot].device
            states, reduced = (device[key.profile, name(self._tower)] for name in (states_name, pca_name))
            self._head.launch(self._compute, states, reduced, key.rows)

    def _graph_of(self, key: _Key) -> _Captured | None:
        """The graph of a shape where there is one; without one, batches cost a few launches more and are the same."""
        try:
            return self._graphs.get(key)
        except (AttributeError, TypeError):
            raise
        except Exception as error:  # the driver's class is not public; what is really broken shows in the next launch
            self._graphs.stop()
            logger.warning(
                "the %s engine on GPU %d cannot be captured as a CUDA graph, and runs without: %s",
                self._tower, self._gpu.number, error,
            )  # fmt: skip
            return None

    def _capture(self, key: Hashable) -> _Captured:
        assert isinstance(key, _Key)
        context = self._context(key.profile)
        self._prepare(context, key)
        # TensorRT finishes what a new shape changes in the next run, which therefore must not be the captured one.
        self._execute(context, key)
        self._compute.sync()
        capturable = getattr(context, "is_stream_capturable", None)  # TensorRT-RTX's alone
        if capturable is not None and not capturable(int(self._compute.handle)):
            raise BackendError("TensorRT-RTX would allocate memory or compile kernels meanwhile")
        graph = self._gpu.capture(self._compute, lambda: self._execute(context, key))
        return _Captured(graph, context)

    def _let_go(self, captured: _Captured) -> None:
        try:
            self._compute.sync()  # it may be running
        finally:
            captured.graph.close()

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise BackendError(f"TensorRT refused {what} for the {self._tower} engine on GPU {self._gpu.number}.")

    def close(self) -> None:
        """Waits for the batches in flight and lets go of everything, in the order that CUDA wants. Twice is fine."""
        with self._launch:
            self._closed = True
        with self._closing:
            if not self.released:
                self._take_all()
                self._release()

    def _take_all(self) -> None:
        """Waits for every slot. Where Ctrl-C ends that, they are given back, and `close` may be called again."""
        taken: list[_Slot] = []
        try:
            while len(taken) < len(self._slots):
                taken.append(self._free.get())
        except BaseException:
            for slot in taken:
                self._free.put(slot)
            raise

    def _release(self) -> None:
        self.released = True
        try:
            with gpu_errors(f"GPU {self._gpu.number} failed while the {self._tower} engine was closed"):
                self._gpu.activate()
                self._held.close()
        finally:
            self._engine = self._kernels = None
            self._free.put(_Slot(-1, None))  # whoever still waits for a slot sees that it is closed


def _mib(memory: Memory) -> str:
    return f"{memory.on_device / 2**20:,.0f} MiB"
