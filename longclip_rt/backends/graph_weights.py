"""The weights of a bundle, read back out of its fp32 graphs: so that torch can run it wherever its source is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.bundle.bundle import TOWERS, Bundle
from longclip_rt.errors import BackendError
from longclip_rt.system.extras import require

_BIAS = re.compile(r"(.*[._])bias")


def weights_of(bundle: Bundle, towers: Sequence[str] = TOWERS, extra: str = "export") -> dict[str, NDArray[np.float32]]:
    """Every tensor of `bundle.architecture.shapes()`, but for the temperature, which no embedding depends on.

    Args:
        bundle: The model.
        towers: Those whose weights are wanted: `text`, `image`.
        extra: What an error names for onnx to be installed with.

    The exporter keeps the names of all tensors but the matrices that it transposes. Such a one is the factor of the
    product that the bias of its name is added to.

    Raises:
        BackendError: A graph lacks one, as graphs of another exporter do.
        MissingExtraError: onnx is not installed.
    """
    onnx: Any = require("onnx", extra)
    wanted = {
        name: shape
        for name, shape in bundle.architecture.shapes().items()
        if name != "logit_scale" and ("image" if name.startswith("visual.") else "text") in towers
    }
    found: dict[str, NDArray[np.float32]] = {}
    for tower in towers:
        graph = onnx.load(str(bundle.onnx(tower, "fp32"))).graph
        arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
        for node in graph.node:
            if node.op_type != "Add":
                continue
            for first, second in (node.input, reversed(node.input)):
                product, bias = products.get(first), _BIAS.fullmatch(second)
                if product is not None and bias and second in arrays and product.input[1] in arrays:
                    arrays.setdefault(f"{bias[1]}weight", arrays[product.input[1]].T)
        if "pca_head.weight" in arrays:  # a bundle with a PCA: the projection, and beside it its product with the PCA
            projection = arrays["pca_head.weight"][:, : bundle.architecture.embed_dim]
            arrays.setdefault("text_projection" if tower == "text" else "proj", projection)
        found |= {_canonical(tower, name): array for name, array in arrays.items()}
    if lacking := [name for name, shape in wanted.items() if name not in found or found[name].shape != tuple(shape)]:
        raise BackendError(
            f"The graphs of {bundle.path} lack {len(lacking)} of {len(wanted)} weights under the names that this "
            f"version exports, such as {lacking[0]}. Export the bundle again, or take another --backend."
        )
    return {name: np.ascontiguousarray(found[name], np.float32) for name in wanted}


def _canonical(tower: str, name: str) -> str:
    name = re.sub(r"^blocks\.(\d+)\.block\.", r"transformer.resblocks.\1.", name)
    return f"visual.{name}" if tower == "image" else name
