"""What an exported graph must look like for runtimes to run it fast and in the precision it promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longclip_rt.parity.limits import Check

_FLOAT = 1  # onnx.TensorProto.FLOAT
# An ArgMax over ids that a runtime lowers to half precision confuses SOT with EOT; Softmax and Trilu are what a fused
# attention leaves behind when it was taken apart.
_UNWANTED = frozenset({"ArgMax", "Softmax", "Trilu", "TopK"})


def structure_checks(path: Path, tower: str, precision: str, blocks: int, kept_fp32: int) -> list[Check]:
    """Counts what is wrong with one exported graph.

    Args:
        path: The ONNX file.
        tower: `text` or `image`.
        precision: `fp32` or `fp16`.
        blocks: Transformer blocks of the tower.
        kept_fp32: Blocks of an fp16 graph that were kept in fp32.

    Returns:
        Checks whose values count defects; each must be 0.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    nodes = list(model.graph.node)
    attentions = [node for node in nodes if node.op_type == "Attention"]
    in_fp32 = [node for node in attentions if _attribute(node, "softmax_precision") == _FLOAT]
    norms = [node for node in nodes if node.op_type == "LayerNormalization"]
    counts = {
        "blocks without Attention": abs(blocks - len(attentions)),
        "softmax not in fp32": len(attentions) - len(in_fp32),
        "LayerNorm statistics not in fp32": sum(_attribute(node, "stash_type", 1) != _FLOAT for node in norms),
        "ArgMax, Softmax, Trilu, TopK": sum(node.op_type in _UNWANTED for node in nodes),
        "frozen dimensions": _frozen_dimensions(model, tower),
    }
    if precision == "fp16":
        # A block has four weighted products: queries, keys and values in one; output; two of the MLP.
        counts["fp32 weights of MatMul"] = abs(_fp32_products(model) - 4 * kept_fp32)
    return [Check("graph", precision, tower, name, float(count), 0.0) for name, count in counts.items()]


def _attribute(node: Any, name: str, default: int | None = None) -> int | None:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


def _frozen_dimensions(model: Any, tower: str) -> int:
    """Dimensions of the input that should be free and are a number: the batch, and a text's length."""
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    return sum(not dimension.dim_param for dimension in dimensions[: 2 if tower == "text" else 1])


def _fp32_products(model: Any) -> int:
    fp32 = {tensor.name for tensor in model.graph.initializer if tensor.data_type == _FLOAT}
    return sum(node.op_type in ("MatMul", "Gemm") and not fp32.isdisjoint(node.input) for node in model.graph.node)
