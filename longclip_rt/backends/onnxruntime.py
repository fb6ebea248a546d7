"""ONNX Runtime on the CPU: the portable backend, and the one that really rounds the fp16 graph to fp16."""

from __future__ import annotations

import platform
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import INPUT_NAMES, Backend, Float32
from longclip_rt.bundle import Bundle
from longclip_rt.errors import BackendError
from longclip_rt.extras import require

PRECISIONS = ("fp32", "fp16")


class OnnxRuntimeBackend(Backend):
    """Runs `text.onnx` and `image.onnx`, or their fp16 graphs, with ONNX Runtime's CPU provider."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, precision: str) -> None:
        super().__init__(bundle, precision)
        if precision not in PRECISIONS:
            raise BackendError(
                f"ONNX Runtime runs the graphs of the bundle, in {' or '.join(PRECISIONS)}; {precision} was asked for. "
                "Choose one of these with --precision, or --backend openvino."
            )
        self._ort: Any = require("onnxruntime", "cpu")
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
                options = self._ort.SessionOptions()
                options.log_severity_level = 3  # errors; warnings there are about its own optimiser
                try:
                    self._sessions[tower] = self._ort.InferenceSession(
                        str(self._graphs[tower]), options, providers=["CPUExecutionProvider"]
                    )
                except Exception as error:  # its errors share no base class narrower than Exception
                    raise BackendError(f"ONNX Runtime could not load {self._graphs[tower]}: {error}") from error
            return self._sessions[tower]

    def _run(self, tower: str, inputs: NDArray[np.generic], outputs: Sequence[str]) -> list[Float32]:
        results: list[Float32] = self._session(tower).run(
            list(outputs), {INPUT_NAMES[tower]: np.ascontiguousarray(inputs)}
        )
        return results

    def close(self) -> None:
        """Releases the sessions."""
        with self._lock:
            self._sessions.clear()
