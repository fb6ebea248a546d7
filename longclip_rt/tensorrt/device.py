"""One NVIDIA GPU through cuda.core: streams, buffers, captured graphs and kernels. Thin: it decides nothing."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.errors import BackendError, LongClipError
from longclip_rt.system.extras import require

_CUDA = 13000  # what the extra `gpu` installs, in the driver's way of counting


@dataclass(eq=False)
class Pinned:
    """Page-locked host memory, which the GPU copies from and to by itself.

    Attributes:
        buffer: cuda.core's.
        array: Its bytes, [size] uint8, writable.
    """

    buffer: Any
    array: NDArray[np.uint8]

    def view(self, shape: Sequence[int], dtype: type[np.generic] | np.dtype[Any]) -> NDArray[Any]:
        """Its first bytes as an array."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.array[:size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        grid: Programs.
        threads: Of a program.
        shared: Bytes of a program's dynamic shared memory.
    """

    grid: int
    threads: int
    shared: int


class Graph:
    """Captured work that is launched at once. To be closed when it no longer runs."""

    def __init__(self, driver: Any, executable: Any) -> None:
        self._driver, self._executable = driver, executable

    def launch(self, stream: Any) -> None:
        """Enqueues all of it."""
        _asked(self._driver.cuGraphLaunch(self._executable, stream.handle))

    def close(self) -> None:
        """Lets go of it. Twice is fine."""
        executable, self._executable = self._executable, None
        if executable is not None:
            _asked(self._driver.cuGraphExecDestroy(executable))


def _asked(answer: tuple[Any, ...]) -> Any:
    """What the driver gave, unless its status is an error."""
    status, *values = answer
    if int(status):
        raise RuntimeError(f"the driver says {getattr(status, 'name', status)}")
    return values[0] if values else None


class Gpu:
    """A GPU of this machine.

    Args:
        number: Which, from 0, in CUDA's order.

    Raises:
        BackendError: There is no such GPU, or no driver.
        MissingExtraError: cuda-core is not installed.
    """

    def __init__(self, number: int = 0) -> None:
        self._core: Any = require("cuda.core", "gpu")
        self._driver: Any = require("cuda.bindings.driver", "gpu")
        self.number = number
        with gpu_errors(f"GPU {number} cannot be used"):
            self._check_driver()
            self._device = self._core.Device(number)
            self._device.set_current()
            self.name = str(self._device.name)
            self.arch = int(str(self._device.arch))
            self._pooled = bool(self._device.properties.memory_pools_supported)
            # Not of a pool of host memory: cuda.core gives no GPU access to one, so that copies would be pageable ones.
            self._host = self._core.LegacyPinnedMemoryResource()
            self._memory: Any = None

    def _check_driver(self) -> None:
        """An older driver would fail later, in one call or another, with an error that does not say so."""
        takes = int(_asked(self._driver.cuDriverGetVersion()))
        if takes < _CUDA:
            raise BackendError(
                f"The NVIDIA driver here takes CUDA {takes // 1000}.{takes % 1000 // 10} at most, and CUDA 13 is "
                "needed: install driver 580 or newer."
            )

    def activate(self) -> None:
        """Makes it the calling thread's; every thread that calls it must do so first."""
        self._device.set_current()

    def stream(self) -> Any:
        """A new stream, which waits for no other one."""
        return self._device.create_stream(options=self._core.StreamOptions(nonblocking=True))

    def allocate(self, size: int, stream: Any) -> Any:
        """`size` bytes of device memory, there once `stream` has come to this point."""
        if not self._pooled:
            return self._device.allocate(size, stream=stream)
        if self._memory is None:
            # An own pool: the device's default one, which other libraries use too, keeps all that it ever had.
            self._memory = self._core.DeviceMemoryResource(self.number, self._core.DeviceMemoryResourceOptions())
        return self._memory.allocate(size, stream=stream)

    def release(self) -> None:
        """Gives the memory of all buffers back to the driver, once they are closed; the next one begins anew."""
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    def allocate_pinned(self, size: int, stream: Any) -> Pinned:
        """`size` bytes of page-locked host memory, likewise."""
        buffer = self._host.allocate(size, stream=stream)
        # Not through DLPack, whose arrays older numpy versions make read-only.
        memory = memoryview((ctypes.c_ubyte * size).from_address(int(buffer.handle)))
        array = np.frombuffer(memory, np.uint8)
        return Pinned(buffer, array)

    def upload(self, array: NDArray[Any], stream: Any) -> Any:
        """Device memory that holds a copy of `array`. Waits for the copy."""
        data = np.ascontiguousarray(array)
        pinned = self.allocate_pinned(data.nbytes, stream)
        buffer = self.allocate(data.nbytes, stream)
        stream.sync()
        pinned.view(data.shape, data.dtype)[...] = data
        buffer.copy_from(pinned.buffer, stream=stream)
        stream.sync()
        pinned.buffer.close(stream)
        return buffer

    def copy(self, target: Any, source: Any, address_bytes: int, stream: Any) -> None:
        """Enqueues the copy of the first bytes of a buffer; one of both is page-locked host memory."""
        part = self._core.Buffer.from_handle
        # A buffer of part of a buffer: cuda.core copies whole ones only.
        part(int(target.handle), address_bytes, owner=target).copy_from(
            part(int(source.handle), address_bytes, owner=source), stream=stream
        )

    def record(self, stream: Any) -> Any:
        """An event after all that was enqueued on `stream`; a thread that waits for it sleeps."""
        return stream.record(options=self._core.EventOptions(blocking_sync=True))

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Graph:
        """The graph of what `enqueue` puts on `stream`, which nothing else may use meanwhile.

        By the driver's own calls: cuda.core 1.2's builder destroys a graph that the driver has freed already where a
        capture was invalidated, which ends the process.
        """
        driver = self._driver
        # Other threads may allocate and wait meanwhile; this one may not.
        _asked(
            driver.cuStreamBeginCapture(stream.handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        )
        try:
            enqueue()
        except BaseException:
            status, captured = driver.cuStreamEndCapture(stream.handle)
            if not int(status):  # of an invalidated capture there is no graph left
                driver.cuGraphDestroy(captured)
            raise
        captured = _asked(driver.cuStreamEndCapture(stream.handle))
        try:
            graph = Graph(driver, _asked(driver.cuGraphInstantiate(captured, 0)))
        finally:
            driver.cuGraphDestroy(captured)
        return graph

    def kernel(self, cubin: bytes, entry: str) -> Any:
        """A kernel from machine code for this GPU."""
        return self._core.ObjectCode.from_cubin(cubin).get_kernel(entry)

    def launch(self, stream: Any, kernel: Any, launch: Launch, arguments: Sequence[Any]) -> None:
        """Enqueues a kernel.

        Args:
            stream: What it is put on.
            kernel: What `kernel` gave.
            launch: Its extent.
            arguments: Buffers, addresses as int, and numpy scalars of the kernel's own types.
        """
        config = self._core.LaunchConfig(grid=launch.grid, block=launch.threads, shmem_size=launch.shared)
        self._core.launch(stream, config, kernel, *arguments)


@contextlib.contextmanager
def gpu_errors(what: str) -> Iterator[None]:
    """Turns errors of the driver into one sentence that begins with `what`.

    Raises:
        BackendError: The block raised an error of cuda.core, or of the loader that found no driver.
    """
    try:
        yield
    except (LongClipError, AttributeError, TypeError):
        raise
    except Exception as error:  # cuda.core's own class is not public, and derives from Exception alone
        remedy = "Check with: nvidia-smi"
        if "OUT_OF_MEMORY" in str(error) or isinstance(error, MemoryError):
            remedy = "Free memory on it (nvidia-smi shows who uses it), or build the engine with smaller --batches."
        raise BackendError(f"{what}: {str(error).rstrip('.')}. {remedy}") from error
