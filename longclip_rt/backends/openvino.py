"""OpenVINO on x86 and ARM CPUs: the default there, in bfloat16 where the CPU computes in it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import INPUT_NAMES, Backend, Float32
from longclip_rt.bundle.bundle import Bundle, int8_name
from longclip_rt.errors import BackendError
from longclip_rt.system.forks import ends_in_forks

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}


@functools.cache
def shared_core(openvino: ModuleType) -> Any:
    """The process's only core. OpenVINO's CPU plug-in gives the thread that loads it a stack for signal handlers.

    Of several cores that are not dropped in the reverse order, the last one puts back the stack of one that is gone;
    the next signal, be it Ctrl-C or the end of a child process, then ends the process by a segmentation fault.
    """
    core = openvino.Core()
    ends_in_forks(core)
    return core


def openvino_precisions() -> list[str]:
    """The precisions that OpenVINO computes in on this CPU, the preferred one first.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    import openvino

    found = shared_core(openvino).get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return [precision for precision in ("bf16", "fp32", "fp16") if _CAPABILITIES[precision] in found]


def hint_for(precision: str) -> str:
    """What OpenVINO calls a precision. What is not quantised of an int8 model computes in bf16 where the CPU does."""
    return _HINTS["bf16" if "bf16" in openvino_precisions() else "fp32"] if precision == "int8" else _HINTS[precision]


def streams_for(threads: int) -> int:
    """How many inferences run side by side: one a thread up to four, then a quarter of the threads.

    Said here rather than asked of the plug-in, which tells its own choice of a compiled model only.
    """
    return min(threads, max(4, threads // 4))


def _shapes(ports: Sequence[Any]) -> dict[str, list[object]]:
    """Sizes by each name of a compiled model's ports; a free one is None."""
    return {
        name: [each.get_length() if each.is_static else None for each in port.get_partial_shape()]
        for port in ports
        for name in port.get_names()
    }


class OpenVinoBackend(Backend):
    """Runs the fp32 graphs; OpenVINO lowers the matrix products to the wanted precision itself. For int8 it has others.

    Requests run side by side, one a stream, which keeps every core busy through the operators that do not scale.
    """

    name = "openvino"

    def __init__(self, bundle: Bundle, precision: str) -> None:
        super().__init__(bundle, precision)
        import openvino

        self._core = shared_core(openvino)
        openvino.Tensor(np.zeros(1, np.float32))  # its interface to numpy, before other threads; see `prepare`
        self._version = str(openvino.__version__).split("-")[0]
        self._compiled: dict[str, Any] = {}
        self._idle: dict[str, list[Any]] = {"text": [], "image": []}
        self._lock = threading.Lock()
        supported = openvino_precisions()
        if precision not in (*supported, "int8"):
            raise BackendError(
                f"OpenVINO cannot compute in {precision} on this CPU; it can in {' and '.join(supported)}. "
                "Choose one of these with --precision, or leave --precision auto."
            )
        self._hint = hint_for(precision)
        self.concurrency = streams_for(int(self._core.get_property("CPU", "RANGE_FOR_STREAMS")[1]))

    @property
    def version(self) -> str:
        """OpenVINO's version."""
        return self._version

    @property
    def device(self) -> str:
        """The CPU's name as OpenVINO reports it."""
        return str(self._core.get_property("CPU", "FULL_DEVICE_NAME")).strip()

    def prepare(self) -> None:
        """Compiles nothing: each tower is compiled at its first inference, which `run` lets no other overlap.

        The first conversion of a numpy array is done already.
        """

    def _compiled_tower(self, tower: str) -> Any:
        with self._lock:
            if tower not in self._compiled:
                config = {
                    "PERFORMANCE_HINT": "THROUGHPUT",
                    "INFERENCE_PRECISION_HINT": self._hint,
                    "NUM_STREAMS": self.concurrency,
                }
                int8 = self.precision == "int8"
                graph = self.bundle.file(int8_name(tower)) if int8 else self.bundle.onnx(tower, "fp32")
                try:
                    compiled = self._core.compile_model(str(graph), "CPU", config)
                except RuntimeError as error:
                    raise BackendError(f"OpenVINO could not compile {graph}: {error}") from error
                used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
                if used not in (self._hint, {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}.get(used)):
                    raise BackendError(
                        f"OpenVINO was asked for {self.precision} and chose {used}. Ask for fp32 instead."
                    )
                self._check_graph(tower, _shapes(compiled.inputs), _shapes(compiled.outputs))
                self._compiled[tower] = compiled
            return self._compiled[tower]

    def _run(self, tower: str, inputs: NDArray[np.generic], outputs: Sequence[str]) -> list[Float32]:
        compiled = self._compiled_tower(tower)
        with self._lock:
            request = self._idle[tower].pop() if self._idle[tower] else None
        request = request or compiled.create_infer_request()
        try:
            request.infer({INPUT_NAMES[tower]: inputs}, share_inputs=True)
            # A request's output memory is used again by its next call, so the results are copied out.
            return [np.array(request.get_tensor(name).data, dtype=np.float32) for name in outputs]
        finally:
            with self._lock:
                self._idle[tower].append(request)

    def _close(self) -> None:
        """Releases the compiled encoders."""
        with self._lock:
            self._idle = {"text": [], "image": []}
            self._compiled.clear()
