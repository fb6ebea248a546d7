"""An exported graph as TensorRT's network: parsed, counted, and held to what a fast fp16 engine must be."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip_rt.errors import EngineError
from longclip_rt.export.tensorrt.head_graph import with_head_states
from longclip_rt.export.tensorrt.progress import BuildLog
from longclip_rt.system.extras import require
from longclip_rt.tensorrt.messages import meaning

# What may not compute in fp32; the patches of the image tower are a convolution.
_PRODUCTS = frozenset({"MATRIX_MULTIPLY", "CONVOLUTION", "EINSUM"})
WEIGHTED_PRODUCTS = 4
"""Of a block: queries, keys and values in one; attention's output; two of the MLP."""


@dataclass(frozen=True)
class NetworkFacts:
    """What a network is made of.

    Attributes:
        layers: Type and precision of the first output, such as `MATRIX_MULTIPLY HALF`, -> number of such layers.
        attention: Attention layers, each a pair of an input and an output layer. Those in fp32 may be taken apart when
            the engine is built; `TensorrtGraph.decomposable` counts them.
        fp32_products: Matrix products and convolutions in fp32.
    """

    layers: dict[str, int]
    attention: int
    fp32_products: int


@dataclass(frozen=True)
class TensorrtGraph:
    """A graph as TensorRT's parser takes it.

    Attributes:
        content: It, serialised.
        changed: `Attention` nodes whose `softmax_precision` was taken out.
        decomposable: `Attention` nodes in fp32, which may be taken apart.
    """

    content: bytes
    changed: int
    decomposable: int


def tensorrt_graph(path: Path, states_of: str = "", extra: str = "rtx") -> TensorrtGraph:
    """Reads a graph and makes two changes that TensorRT needs; the file stays as it is.

    Args:
        path: The graph's file.
        states_of: A tower whose graph is to hand out pooled states in the place of their PCA, for the kernel behind the
            engine; empty for the graph as it is.
        extra: What installs onnx beside the library, for the message where it is missing: `rtx` or `tensorrt`.

    The parser refuses the attribute `softmax_precision` of `Attention`, with which the export asks ONNX Runtime and
    OpenVINO for an fp32 softmax. It is taken out. How TensorRT's fused attention rounds inside is said nowhere, so the
    vectors must be judged on the GPU, by the parity gate.

    There are fused kernels for fp16 alone, and an attention without one fails to build (seen with TensorRT-RTX 1.7).
    Those in fp32 are therefore marked as ones that may be taken apart, with an attribute that only TensorRT's parser
    knows. Those in fp16 are not: if one cannot be fused, the build fails rather than give a slow engine.

    Raises:
        EngineError: The file is no ONNX graph.
        ExportError: States were asked for, and the graph has no PCA.
        MissingExtraError: onnx is not installed.
    """
    onnx = require("onnx", extra)
    try:
        # Weights beside a graph are found by the parser, which is told where the graph was.
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's class of a damaged message is not public
        raise EngineError(f"{path} cannot be read as an ONNX graph ({error}). Export or copy it again.") from error
    if states_of:
        with_head_states(model, states_of)
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    changed, decomposable = drop_softmax_precision(model), 0
    for node in model.graph.node:
        if node.op_type == "Attention" and kinds.get(node.input[0]) == onnx.TensorProto.FLOAT:
            node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))
            decomposable += 1
    return TensorrtGraph(bytes(model.SerializeToString()), changed, decomposable)


def drop_softmax_precision(model: Any) -> int:
    """Takes the attribute out of every `Attention` node of an `onnx.ModelProto`; returns how many had it."""
    changed = 0
    for node in model.graph.node:
        if node.op_type == "Attention":
            kept = [attribute for attribute in node.attribute if attribute.name != "softmax_precision"]
            changed += len(kept) < len(node.attribute)
            del node.attribute[:]
            node.attribute.extend(kept)
    return changed


def network_from_graph(
    library: Any, builder: Any, logger: Any, log: BuildLog, graph: bytes, path: Path, plugins: bool = False
) -> tuple[Any, Any]:
    """Parses a graph into a strongly typed network.

    Args:
        library: `tensorrt` or `tensorrt_rtx`, imported.
        builder: Its builder.
        logger: What `logger_for` gave.
        log: What that fills.
        graph: The content of what `tensorrt_graph` gave.
        path: Where the graph's file is, for messages and for weights beside it.
        plugins: Whether it holds plug-ins in Python, of which the code compiled ahead of time is to be taken.

    Returns:
        The network and its parser, which must live as long as the network: it owns the weights.

    Raises:
        EngineError: The parser refuses the graph; the message names the nodes.
    """
    flags = library.NetworkDefinitionCreationFlag
    wanted = 1 << int(flags.STRONGLY_TYPED)
    if plugins:
        wanted |= 1 << int(flags.PREFER_AOT_PYTHON_PLUGINS)
    network = builder.create_network(wanted)
    if network is None:
        raise EngineError(f"{library.__name__} could not make a network: {log.reason()}.")
    try:
        parser = library.OnnxParser(network, logger)
    except (TypeError, RuntimeError) as error:  # the bindings' way of passing on a null pointer
        raise EngineError(f"{library.__name__} could not make a parser: {log.reason()}.") from error
    if not parser.parse(graph, str(path)):
        raise EngineError(f"{library.__name__}'s parser refuses {path}: {_parser_errors(parser, log)}.")
    return network, parser


def _parser_errors(parser: Any, log: BuildLog) -> str:
    """The parser's own errors, each with its node; what they mean first where that is known."""
    told = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        name, operator = error.node_name(), error.node_operator()
        node = f"node {name or error.node()} ({operator}): " if operator else ""
        told.append(f"{node}{' '.join(error.desc().split()).rstrip('.')}")
    if not told:
        return log.reason()
    more = f"; and {len(told) - 3} more like it" if len(told) > 3 else ""
    understood = meaning(told)
    hint = "" if understood.startswith("the library said") else f": {understood}"
    return "; ".join(told[:3]) + more + hint


def network_facts(library: Any, network: Any) -> NetworkFacts:
    """Counts a network's layers."""
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    fp32_products = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = layer.type.name
        output = layer.get_output(0) if layer.num_outputs else None
        precision = "-" if output is None else output.dtype.name
        counts[f"{kind} {precision}"] += 1
        kinds[kind] += 1
        fp32_products += kind in _PRODUCTS and precision == "FLOAT"
    pairs = min(kinds["ATTENTION_INPUT"], kinds["ATTENTION_OUTPUT"])
    return NetworkFacts(dict(sorted(counts.items())), pairs, fp32_products)


def gate(facts: NetworkFacts, blocks: int, kept_fp32: int, precision: str) -> list[str]:
    """What is wrong with a network, in words; empty where it is as it should be.

    Args:
        facts: Of the network.
        blocks: Transformer blocks of the tower.
        kept_fp32: Of these, the ones that the export kept in fp32.
        precision: `fp16` or `fp32`.
    """
    wrong = []
    if facts.attention != blocks:
        wrong.append(f"{facts.attention} of {blocks} attention blocks became a fused attention layer")
    if softmax := sum(count for name, count in facts.layers.items() if name.startswith("SOFTMAX ")):
        wrong.append(f"{softmax} softmax layers stand outside of fused attention")
    allowed = WEIGHTED_PRODUCTS * kept_fp32
    if precision == "fp16" and facts.fp32_products > allowed:
        wrong.append(
            f"{facts.fp32_products} matrix products compute in fp32, and {allowed} may, for {kept_fp32} blocks kept so"
        )
    return wrong
