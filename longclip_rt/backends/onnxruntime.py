"""ONNX Runtime: on the CPU the portable backend, and the one that runs the fp16 graph as it is; and on NVIDIA GPUs."""

from __future__ import annotations

import contextlib
import itertools
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import EMBEDDINGS, INPUT_NAMES, Backend, Float32
from longclip_rt.backends.providers import (
    RECORD_ASSIGNMENT,
    Assignment,
    check_assignment,
    check_provider,
    provider_settings,
)
from longclip_rt.bundle.bundle import Bundle
from longclip_rt.errors import BackendError, LongClipError
from longclip_rt.system.extras import require

PRECISIONS = ("fp32", "fp16")


class OnnxRuntimeBackend(Backend):
    """Runs `text.onnx` and `image.onnx`, or their fp16 graphs, with ONNX Runtime's CPU provider."""

    name = "onnxruntime"
    extra: ClassVar[str] = "cpu"
    on_gpu: ClassVar[bool] = False
    opens_in_forks = True

    def __init__(self, bundle: Bundle, precision: str, device: int = 0) -> None:
        super().__init__(bundle, precision)
        if precision not in PRECISIONS:
            raise BackendError(
                f"ONNX Runtime runs the graphs of the bundle, in {' or '.join(PRECISIONS)}; {precision} was asked for. "
                "Choose one of these with --precision, or --backend openvino."
            )
        self._ort: Any = require("onnxruntime", self.extra)
        self._number = device
        self._graphs = {tower: bundle.onnx(tower, precision) for tower in INPUT_NAMES}
        self._sessions: dict[str, Any] = {}
        self._lock = threading.Lock()

    @property
    def version(self) -> str:
        """ONNX Runtime's version."""
        return str(self._ort.__version__)

    @property
    def device(self) -> str:
        """The CPU's architecture."""
        return f"CPU ({platform.machine()})"

    def _session(self, tower: str) -> Any:
        with self._lock:
            if tower not in self._sessions:
                self._sessions[tower] = self._opened(tower)
            return self._sessions[tower]

    def prepare(self) -> None:
        """On a GPU, opens both sessions and uses one. On the CPU makes a conversion alone: each session is opened at
        its first inference, which `run` lets no other overlap, so that a tower that is never used costs nothing.
        """
        if not self.on_gpu:
            self._ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32))
            return
        for tower in self._graphs:
            self._session(tower)
        super().prepare()

    def _opened(self, tower: str) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors; warnings there are about its own optimiser
        if self.on_gpu:
            options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
            with contextlib.redirect_stdout(sys.stderr):  # it prints what it misses
                self._ort.preload_dlls()  # CUDA's and cuDNN's libraries, where they were installed with pip
        settings = provider_settings(self.name, self._number)
        # Without its fallback, which takes other providers after an error and prints that to stdout.
        with self._errors(f"could not load {self._graphs[tower]}"):
            graph = str(self._graphs[tower])
            session = self._ort.InferenceSession(graph, options, providers=settings, enable_fallback=0)
        check_provider(self.name, session.get_providers())
        self._check_graph(
            tower,
            {each.name: each.shape for each in session.get_inputs()},
            {each.name: each.shape for each in session.get_outputs()},
        )
        if self.on_gpu:
            check_assignment(self.name, assignments(session))
        return session

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except LongClipError:
            raise
        except Exception as error:  # its errors share no base class narrower than Exception
            raise BackendError(f"ONNX Runtime {what}: {error}") from error

    def _run(self, tower: str, inputs: NDArray[np.generic], outputs: Sequence[str]) -> list[Float32]:
        session = self._session(tower)
        with self._errors(f"failed on {len(inputs)} {tower}s"):
            results: list[Float32] = session.run(list(outputs), {INPUT_NAMES[tower]: inputs})
        return results

    def _close(self) -> None:
        """Releases the sessions."""
        with self._lock:
            self._sessions.clear()


class OnnxRuntimeCudaBackend(OnnxRuntimeBackend):
    """The same graphs with the CUDA provider; inputs and outputs are bound, so that each crosses the bus once."""

    name = "onnxruntime-cuda"
    extra = "gpu"
    on_gpu = True
    opens_in_forks = False  # CUDA
    not_apart = "the head is a part of the encoder"
    batch_size = 32
    memory: ClassVar[str] = "cuda"
    """Where inputs and outputs lie during a run, in ONNX Runtime's word."""

    @property
    def device(self) -> str:
        """The GPU's number."""
        return f"GPU {self._number}"

    def timed(self, tower: str, inputs: NDArray[np.generic]) -> dict[str, float]:
        """By the wall clock: each step waits for the GPU."""
        marks: list[float] = []
        self._run(tower, inputs, [EMBEDDINGS[tower]], lambda: marks.append(time.perf_counter()))
        steps = [second - first for first, second in itertools.pairwise(marks)]
        return dict(zip(("copy in", "encoder", "copy out"), steps, strict=True))

    def _run(
        self,
        tower: str,
        inputs: NDArray[np.generic],
        outputs: Sequence[str],
        mark: Callable[[], object] = lambda: None,
    ) -> list[Float32]:
        session = self._session(tower)
        with self._errors(f"failed on {len(inputs)} {tower}s on {self.device}"):
            mark()
            binding = session.io_binding()
            value = self._ort.OrtValue.ortvalue_from_numpy(inputs, self.memory, self._number)
            binding.bind_ortvalue_input(INPUT_NAMES[tower], value)
            for name in outputs:
                binding.bind_output(name, self.memory, self._number)
            mark()
            session.run_with_iobinding(binding)
            mark()
            results: list[Float32] = binding.copy_outputs_to_cpu()
            mark()
        return results


def assignments(session: Any) -> list[Assignment]:
    """Which provider got which node of a session that was opened with `RECORD_ASSIGNMENT`.

    Raises:
        BackendError: This version of ONNX Runtime cannot tell.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise BackendError(
            "This onnxruntime cannot tell whether it left nodes on the CPU. Take a newer one: "
            "pip install -U onnxruntime-gpu"
        )
    return [
        Assignment(part.ep_name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
