"""The graph of a tower whose PCA head is left to a kernel: the engine's, cut before the final LayerNorm.

`export --pca` writes the head into the graphs with plain operators, so that every runtime has it. An engine with the
kernel beside it hands out the pooled states instead; one with the plug-in inside has one node in the head's place.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from longclip_rt.errors import ExportError
from longclip_rt.tensorrt.head import HeadFiles, pca_name, states_name

WEIGHT = "pca_head.weight"
"""The tensor that marks the head in an exported graph: [P | P V], behind the final LayerNorm."""

PLUGIN_NAMESPACE, PLUGIN_NAME = "longclip", "pca_head"
_FLOAT, _HALF = 1, 10  # onnx.TensorProto.FLOAT, FLOAT16


def with_head_states(model: Any, tower: str) -> None:
    """Makes a graph hand out the pooled states [B, W] float16 instead of their PCA; in place.

    Args:
        model: An fp16 graph (`onnx.ModelProto`) that was exported with a PCA.
        tower: `text` or `image`.

    Raises:
        ExportError: The graph has no such head, or is not in fp16.
    """
    import onnx

    states, width = _states(model, tower)
    _drop_output(model, pca_name(tower), states)
    model.graph.node.append(onnx.helper.make_node("Identity", [states], [states_name(tower)], "head_states"))
    model.graph.output.append(onnx.helper.make_tensor_value_info(states_name(tower), _HALF, ["batch", width]))


def with_head_plugin(model: Any, tower: str, head: HeadFiles) -> None:
    """Puts the plug-in's node in the place of the head's operators; in place.

    Args:
        model: As for `with_head_states`.
        tower: `text` or `image`.
        head: Its weights, which become initializers.

    Raises:
        ExportError: As for `with_head_states`; or the weights are of another width.
    """
    import onnx
    from onnx import numpy_helper

    states, width = _states(model, tower)
    if head.width != width:
        raise ExportError(f"The head's weights are {list(head.weight.shape)}, and the {tower} states [B, {width}].")
    _drop_output(model, pca_name(tower), states)
    arrays: dict[str, NDArray[Any]] = {"weight": head.weight, "bias": head.bias, "shift": head.shift}
    names = [f"head_plugin.{name}" for name in arrays]
    for name, array in zip(names, arrays.values(), strict=True):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    node = onnx.helper.make_node(
        PLUGIN_NAME,
        [states, *names],
        [pca_name(tower)],
        "pca_head_plugin",
        domain=PLUGIN_NAMESPACE,
        plugin_namespace=PLUGIN_NAMESPACE,
        plugin_version="1",
        aot=True,
        dim=head.dim,
        k=head.k,
        eps=head.eps,
        floor=head.floor,
    )
    model.graph.node.append(node)
    model.graph.output.append(onnx.helper.make_tensor_value_info(pca_name(tower), _FLOAT, ["batch", head.k]))
    model.opset_import.append(onnx.helper.make_opsetid(PLUGIN_NAMESPACE, 1))


def _states(model: Any, tower: str) -> tuple[str, int]:
    """Name and width of the tensor that the final LayerNorm reads."""
    product = next((node for node in model.graph.node if WEIGHT in node.input), None)
    normed = product.input[0] if product is not None else ""
    norm = next((node for node in model.graph.node if normed in node.output), None)
    if norm is None or norm.op_type != "LayerNormalization":
        raise ExportError(f"The {tower} graph has no PCA head to take out. Export the bundle again with --pca.")
    gain = next(tensor for tensor in model.graph.initializer if tensor.name == norm.input[1])
    if gain.data_type != _HALF:
        raise ExportError(f"The {tower} graph is not in fp16. Export the bundle again with --fp16.")
    return norm.input[0], int(gain.dims[0])


def _drop_output(model: Any, name: str, states: str) -> None:
    """Takes an output away, and every node that neither the other outputs nor `states` need any more."""
    graph = model.graph
    kept = [output for output in graph.output if output.name != name]
    del graph.output[:]
    graph.output.extend(kept)
    needed = {states, *(output.name for output in kept)}
    nodes = []
    for node in reversed(graph.node):  # a graph lists a node after those that it needs
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(reversed(nodes))
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(weights)
