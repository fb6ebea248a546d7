"""What a tower costs at one shape, counted from its ONNX graph: operations and bytes that no way can do without."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip_rt.errors import BackendError
from longclip_rt.system.extras import require

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention")


@dataclass(frozen=True)
class Cost:
    """One run of a tower.

    Attributes:
        flops: Of matrix products, convolutions and attention; a multiplication and an addition count two. Causal
            attention counts whole, and what acts on single elements not at all.
        weights: Numbers in the weights that every run reads; of a table of embeddings the rows that it takes.
        activations: Numbers that go in and out of the tower. What lies between may stay in caches, and is not counted.
    """

    flops: int
    weights: int
    activations: int

    def bytes(self, precision: str) -> int:
        """Bytes that have to be moved: weights in the precision, what goes in and out as 4 bytes a number."""
        return self.weights * BYTES[precision] + 4 * self.activations


def graph_cost(path: Path, rows: int, tokens: int | None = None) -> Cost:
    """Counts one run of a graph.

    Args:
        path: The ONNX file of a tower.
        rows: The batch's size B.
        tokens: Length S of the texts [B, S]; None for images.

    Raises:
        BackendError: A product's shape cannot be told from the graph.
        MissingExtraError: onnx is not installed.
    """
    onnx: Any = require("onnx", "bench")
    model = onnx.load(str(path), load_external_data=False)
    sizes = (rows,) if tokens is None else (rows, tokens)
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, sizes, strict=False):
        dim.Clear()
        dim.dim_value = size
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for tensor in model.graph.initializer:  # shapes need small constants only, and copies of large ones take seconds
        if math.prod(tensor.dims) > 64:
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
    } | weights
    flops, read = 0, 0
    tables = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "Gather"}
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    for tensor in model.graph.initializer:
        name, shape = tensor.name, weights[tensor.name]
        if tensor.data_type not in floats or not shape:
            continue  # what shapes are made of
        taken = shapes.get(tables[name], shape) if name in tables else shape
        read += min(math.prod(shape), math.prod(taken))
    for node in model.graph.node:
        if node.op_type in _PRODUCTS:
            flops += _flops(node, shapes, path)
    ends = (*inferred.input, *inferred.output)
    return Cost(flops, read, sum(math.prod(shapes[value.name]) for value in ends if value.name not in weights))


def _flops(node: Any, shapes: dict[str, tuple[int, ...]], path: Path) -> int:
    given = [shapes.get(name, ()) for name in node.input if name]
    out = shapes.get(node.output[0], ())
    needed = given[:3] if node.op_type == "Attention" else given[:2]
    if not out or not all(needed) or 0 in (*out, *(size for shape in needed for size in shape)):
        raise BackendError(f"The operations of {path} cannot be counted: the shape of {node.output[0]} is not known.")
    if node.op_type == "Attention":  # [B, heads, S, d]: scores, and the sum they weigh
        batch, heads, queries, width = needed[0]
        keys, values = needed[1][2], needed[2][3]
        return 2 * batch * heads * queries * keys * (width + values)
    if node.op_type == "Conv":  # weights [out, in, h, w]
        return 2 * math.prod(out) * math.prod(needed[1][1:])
    if node.op_type == "Gemm":
        transposed = any(each.name == "transA" and each.i for each in node.attribute)
        return 2 * math.prod(out) * needed[0][0 if transposed else 1]
    return 2 * math.prod(out) * needed[0][-1]
