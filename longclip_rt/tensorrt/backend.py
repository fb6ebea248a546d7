"""TensorRT and TensorRT-RTX on NVIDIA GPUs: engines that were built beforehand, run with neither torch nor Triton."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import INPUT_NAMES, Backend, Float32
from longclip_rt.bundle.bundle import Bundle, bundles_home
from longclip_rt.errors import BackendError
from longclip_rt.system.machine import cuda_devices
from longclip_rt.tensorrt.device import Gpu
from longclip_rt.tensorrt.engines import Target, find_engine, import_library, plan_name
from longclip_rt.tensorrt.head import HEAD_PLUGIN, load_head
from longclip_rt.tensorrt.jit_kernels import JitKernels
from longclip_rt.tensorrt.messages import meaning
from longclip_rt.tensorrt.profiles import SLOTS, bucket_lengths
from longclip_rt.tensorrt.runner import EngineRunner

logger = logging.getLogger("longclip_rt")

PRECISIONS = ("fp16", "fp32")


class TensorrtBackend(Backend):
    """Runs the engines of a bundle on one GPU.

    Args:
        bundle: The model.
        precision: `fp16` or `fp32`: of the graphs that the engine was built from.
        device: The GPU's number.

    Raises:
        BackendError: TensorRT, the GPU, or an engine for both cannot be had; the message says which and why.
    """

    name = "tensorrt"
    batch_size = 64
    concurrency = SLOTS + 1  # two on the GPU, and one that copies results out or inputs in

    def __init__(self, bundle: Bundle, precision: str, device: int = 0) -> None:
        super().__init__(bundle, precision)
        self._library = import_library(self.name)
        self._gpu = Gpu(device)
        memory = next((each.memory for each in cuda_devices()[device : device + 1]), None)
        target = Target(self.name, self.version, self._gpu.name, self._gpu.arch, memory)
        self.engine = find_engine(bundle, target, precision)
        self._logger = _logger(self._library)
        self._runtime: Any = None
        self._runners: dict[str, EngineRunner] = {}
        self._lock = threading.Lock()

    @property
    def version(self) -> str:
        """TensorRT's version."""
        return str(self._library.__version__)

    @property
    def device(self) -> str:
        """The GPU's name; not its number, so that equal cards give equal descriptions."""
        return self._gpu.name

    @property
    def buckets(self) -> tuple[int, ...]:
        """Lengths that text batches are padded to."""
        return bucket_lengths(self._runner("text").profiles)

    @property
    def fused_pca(self) -> str:
        """SHA-256 of the PCA that the engine's plug-in or the kernel behind it computes; empty where there is none."""
        if self.engine.key.options.get("pca_head") == HEAD_PLUGIN:
            return str(self.bundle.manifest["pca"]["sha256"])
        self.engine.check_head()
        head = load_head(self.engine.path, "text", self._gpu.arch)
        return "" if head is None else head.pca

    def corners(self, tower: str) -> list[tuple[str, int | None, int]]:
        """Every profile at its ends; and a batch that takes two pieces, and so both slots."""
        profiles = self._runner(tower).profiles
        shapes = {
            (f"profile {each.index}, {each}", each.length, rows)
            for each in profiles
            for rows in (each.least, each.most)
        }
        largest = max(profiles, key=lambda each: (each.length or 0, each.most))
        return [
            *sorted(shapes, key=lambda shape: (shape[1] or 0, shape[2])),
            (f"two batches of profile {largest.index}, {largest}", largest.length, largest.most + 1),
        ]

    def prepare(self) -> None:
        """Opens both engines."""
        for tower in INPUT_NAMES:
            self._runner(tower)

    def _runner(self, tower: str) -> EngineRunner:
        with self._lock:
            if tower not in self._runners:
                plan = self.engine.plan(tower)
                self.engine.check_head()
                head = load_head(self.engine.path, tower, self._gpu.arch)
                self._gpu.activate()
                self._logger.errors.clear()
                if self._runtime is None:
                    self._runtime = self._started()
                engine = self._runtime.deserialize_cuda_engine(plan)
                if engine is None:
                    raise BackendError(
                        f"{self.name} {self.version} cannot load {self.engine.path / plan_name(tower)}: "
                        f"{meaning(self._logger.errors)}."
                    )
                kernels = self._jit_kernels(engine, tower)
                runner = EngineRunner(self._library, engine, self._gpu, tower, head, len(plan), kernels=kernels)
                memory = runner.memory
                logger.info(
                    "%s engine: %.0f MiB on GPU %d (weights %.0f, workspace %.0f, buffers %.0f), %.0f MiB page-locked",
                    tower, memory.on_device / 2**20, self._gpu.number, memory.weights / 2**20,
                    memory.workspace / 2**20, memory.device / 2**20, memory.pinned / 2**20,
                )  # fmt: skip
                self._runners[tower] = runner
            return self._runners[tower]

    def _jit_kernels(self, engine: Any, tower: str) -> JitKernels | None:
        return None

    def _started(self) -> Any:
        try:
            return self._library.Runtime(self._logger)
        except (TypeError, RuntimeError) as error:  # the bindings' way of passing on a null pointer
            raise BackendError(f"{self.name} {self.version} does not start: {meaning(self._logger.errors)}.") from error

    def _run(self, tower: str, inputs: NDArray[np.generic], outputs: Sequence[str]) -> list[Float32]:
        runner = self._runner(tower)
        if missing := [name for name in outputs if name not in runner.outputs]:
            raise BackendError(
                f"The {tower} engine has no output {', '.join(missing)}; it has {', '.join(runner.outputs)}. Build it "
                "again with: longclip-rt engine build"
            )
        return runner.run(inputs, outputs)

    def _close(self) -> None:
        """Waits for what is in flight, and lets go of the GPU's memory. The next call opens the engines again."""
        with self._lock, contextlib.ExitStack() as stack:  # each, whatever becomes of the others
            stack.callback(self._gpu.release)
            for tower in list(self._runners):
                stack.callback(self._close_runner, tower)
            self._runtime = None

    def _close_runner(self, tower: str) -> None:
        try:
            self._runners[tower].close()
        finally:
            if self._runners[tower].released:  # after Ctrl-C it is not, and closed by the next call
                del self._runners[tower]


class TensorrtRtxBackend(TensorrtBackend):
    """The same with TensorRT-RTX, whose engines run on every card of their architectures."""

    name = "tensorrt-rtx"

    def _jit_kernels(self, engine: Any, tower: str) -> JitKernels:
        # Never in the bundle, which may be read-only, and be on many machines.
        folder = bundles_home().parent / self.name / self.engine.path.name
        return JitKernels(self._library, engine, folder / f"{tower}.{self._gpu.name.replace(' ', '-')}.kernels")


def _logger(library: Any) -> Any:
    """TensorRT's log as this package's, and its last errors for messages."""

    class Log(library.ILogger):  # type: ignore[misc]
        """Passes on what TensorRT says."""

        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=20)

        def log(self, severity: Any, msg: str) -> None:
            """Called by TensorRT, from any thread."""
            kinds = library.ILogger.Severity
            if severity in (kinds.INTERNAL_ERROR, kinds.ERROR):
                self.errors.append(msg)
                logger.error("TensorRT: %s", msg)
            elif severity == kinds.WARNING:
                logger.debug("TensorRT: %s", msg)

    return Log()
