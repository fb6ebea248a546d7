"""Runs an fp16 graph with every result rounded to fp16, as a GPU does and ONNX Runtime's CPU provider does not.

The CPU provider has no fp16 kernels for most operators: it computes chains of them in fp32 and rounds at their ends, so
a value of 100,000 in the middle of the graph, which is infinite on a GPU, passes there unseen (tried with ONNX Runtime
1.32, at every optimisation level). Here each operator computes in fp32 and its result makes a trip through fp16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import INPUT_NAMES, Backend, Float32
from longclip_rt.bundle.bundle import Bundle
from longclip_rt.errors import ExportError
from longclip_rt.system.extras import require

_FLOAT, _FLOAT16 = 1, 10  # onnx.TensorProto's

# Operators that only move values: what is rounded stays rounded.
_MOVES = frozenset({
    "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Split",
    "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip


class RoundedHalfBackend(Backend):
    """The fp16 graphs of a bundle, with ONNX Runtime doing the arithmetic in fp32 and each result rounded to fp16."""

    name = "rounded"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, "fp16")
        self._ort: Any = require("onnxruntime", "cpu")
        self._sessions: dict[str, Any] = {}

    @property
    def version(self) -> str:
        """ONNX Runtime's version."""
        return str(self._ort.__version__)

    @property
    def device(self) -> str:
        """The CPU."""
        return "CPU"

    def _run(self, tower: str, inputs: NDArray[np.generic], outputs: Sequence[str]) -> list[Float32]:
        if tower not in self._sessions:
            options = self._ort.SessionOptions()
            # At any other level the trips through fp16 are optimised away.
            options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.log_severity_level = 3
            path = self.bundle.onnx(tower, "fp16")
            # Weights in files of their own are found from the graph's folder.
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
            model = rounded_model(require("onnx", "export").load(str(path), load_external_data=False))
            self._sessions[tower] = self._ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        results: list[Float32] = self._sessions[tower].run(list(outputs), {INPUT_NAMES[tower]: inputs})
        return results

    def _close(self) -> None:
        """Releases the sessions."""
        self._sessions.clear()


def rounded_model(model: Any) -> Any:
    """Rewrites an fp16 ONNX model so that each operator computes in fp32 and its fp16 results are rounded.

    What the graph computes in fp32 stays as it is, and so do its inputs and outputs.

    Args:
        model: The `ModelProto`; it is changed.

    Returns:
        The same object.

    Raises:
        ExportError: A tensor's type is not stated in the graph.
    """
    import onnx

    graph = model.graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    widened: dict[str, str] = {}  # name of an fp16 value -> name of its fp32 copy
    nodes: list[Any] = []

    def cast(source: str, target: str, kind: int) -> None:
        nodes.append(onnx.helper.make_node("Cast", [source], [target], to=kind))

    for tensor in graph.initializer:
        if tensor.data_type == _FLOAT16:
            widened[tensor.name] = f"{tensor.name}:fp32"
            cast(tensor.name, widened[tensor.name], _FLOAT)
    for node in graph.node:
        if missing := [name for name in node.output if name and name not in types]:
            raise ExportError(f"The exported graph does not state the type of {missing[0]}, so it cannot be checked.")
        halves = [name for name in node.output if types.get(name) == _FLOAT16]
        rounds_itself = node.op_type in ("Cast", "Constant", "ConstantOfShape") and bool(halves)
        for index, name in enumerate(node.input):
            node.input[index] = widened.get(name, name)
        nodes.append(node)
        for name in halves:
            widened[name] = f"{name}:fp32"
            if rounds_itself:
                cast(name, widened[name], _FLOAT)
                continue
            raw = widened[name] if node.op_type in _MOVES else f"{name}:raw"
            node.output[list(node.output).index(name)] = raw
            if raw != widened[name]:
                cast(raw, name, _FLOAT16)
                cast(name, widened[name], _FLOAT)
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return model
