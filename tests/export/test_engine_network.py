from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from rtx_network import parsed
from tiny_models import tiny_checkpoint

from longclip_rt.bundle.bundle import BUILT_IN, Bundle, load_bundle
from longclip_rt.errors import EngineError
from longclip_rt.export.tensorrt.build import EngineOptions
from longclip_rt.export.tensorrt.network import NetworkFacts, gate, network_facts, tensorrt_graph
from longclip_rt.export.tensorrt.plan import PlanRequest, build_plan

onnx = pytest.importorskip("onnx")
trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not to be had for this system")
MODEL = BUILT_IN
HALF, FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


def facts_of(graph: bytes) -> NetworkFacts:
    network, *_alive = parsed(graph)
    return network_facts(trt, network)


def small_graph(nodes: list[Any], kind: int) -> bytes:
    """x [b, 8] -> y [b, 8] through the nodes, with a weight w [8, 8]."""
    import numpy as np
    from onnx import helper, numpy_helper

    weight = numpy_helper.from_array(np.ones([8, 8], np.float16 if kind == HALF else np.float32), "w")
    values = [helper.make_tensor_value_info(name, kind, ["b", 8]) for name in ("x", "y")]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("longclip", 1)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def test_the_graph_is_changed_in_memory_only() -> None:
    path = MODEL / "text.fp16.onnx"
    before = path.read_bytes()
    made = tensorrt_graph(path)
    assert (made.changed, made.decomposable) == (4, 0)
    assert b"softmax_precision" in before and b"softmax_precision" not in made.content
    assert path.read_bytes() == before
    kept, again = onnx.load_from_string(before).graph, onnx.load_from_string(made.content).graph
    assert [node.op_type for node in kept.node] == [node.op_type for node in again.node]
    others = {attribute.name for node in again.node if node.op_type == "Attention" for attribute in node.attribute}
    assert "is_causal" in others and "TRT_decomposable" not in others


def test_the_parser_would_refuse_the_attribute() -> None:
    """The reason for the change, and the form of an error of several nodes. Should it go one day, so may the change."""
    wanted = r"node node_scaled_dot_product_attention \(Attention\): .*oftmax precision.*; and 1 more like it\.$"
    with pytest.raises(EngineError, match=wanted):
        parsed((MODEL / "text.fp16.onnx").read_bytes())


def test_an_unknown_plugin_is_named() -> None:
    node = onnx.helper.make_node("pca_head", ["x"], ["y"], "head_1", domain="longclip", plugin_namespace="longclip")
    with pytest.raises(EngineError, match=r"node head_1 \(pca_head\): .*a plug-in that is not registered\. Register"):
        parsed(small_graph([node], HALF))


def test_what_is_no_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"refuses text\.onnx: .*Failed to parse.*: the file is damaged"):
        parsed(b"not a graph", Path("text.onnx"))
    (tmp_path / "text.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"text\.onnx cannot be read as an ONNX graph.*copy it again"):
        tensorrt_graph(tmp_path / "text.onnx")


def test_softmax_outside_and_fp32_products_are_counted() -> None:
    make = onnx.helper.make_node
    nodes = [make("MatMul", ["x", "w"], ["a"]), make("Softmax", ["a"], ["b"]), make("MatMul", ["b", "w"], ["y"])]
    facts = facts_of(small_graph(nodes, FLOAT))
    assert facts.fp32_products == 2 and facts.attention == 0 and facts.layers["SOFTMAX FLOAT"] == 1
    assert gate(facts, 0, 0, "fp16") == [
        "1 softmax layers stand outside of fused attention",
        "2 matrix products compute in fp32, and 0 may, for 0 blocks kept so",
    ]
    half = facts_of(small_graph([nodes[0], make("Relu", ["a"], ["y"])], HALF))
    assert half.fp32_products == 0 and gate(half, 0, 0, "fp16") == []
    assert gate(half, 2, 0, "fp16") == ["0 of 2 attention blocks became a fused attention layer"]
    assert gate(NetworkFacts({}, 2, 9), 2, 0, "fp32") == []


def test_a_block_kept_in_fp32_may_and_no_other(tmp_path: Path) -> None:
    """A really exported text tower, the second of whose blocks is in fp32."""
    from longclip_rt.export.onnx import export_tower
    from longclip_rt.export.precision import half_tower
    from longclip_rt.weights.checkpoint import towers_from_checkpoint

    tower, _ = towers_from_checkpoint(tiny_checkpoint())
    bundle = load_bundle(shutil.copytree(MODEL, tmp_path / "bundle"))
    export_tower(half_tower(tower, [1]), bundle.path / "text.fp16.onnx")
    architecture = {**bundle.manifest["architecture"], "text_layers": 3}
    profiles = EngineOptions("fp16", (8,), (2,)).profiles("text", 8)

    def built(kept: int) -> Any:
        noted = [{"tower": "text", "block": block, "kept_fp32": block == kept} for block in range(3)]
        manifest = {**bundle.manifest, "architecture": architecture, "parity": {"activations": noted}}
        request = PlanRequest(trt, Bundle(bundle.path, manifest), "text", "fp16", profiles, 89, here=False)
        return build_plan(request, tmp_path / "text.plan", b"", lambda stage, done: None)[0]

    facts = built(1)
    assert facts.network.fp32_products == 4 and facts.network.attention == 3
    assert facts.kept_fp32 == facts.decomposable == 1
    assert facts.plan_bytes == (tmp_path / "text.plan").stat().st_size
    with pytest.raises(EngineError, match="4 matrix products compute in fp32, and 0 may"):
        built(-1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_real_configuration_is_of_full_fp32_and_without_timings(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    class Builder(trt.Builder):  # type: ignore[misc]
        def build_serialized_network(self, network: Any, config: Any) -> Any:
            asked.append(config.get_flag(trt.BuilderFlag.TF32))
            return super().build_serialized_network(network, config)

    monkeypatch.setattr(trt, "Builder", Builder)
    profiles = EngineOptions(precision, (8,), (2,)).profiles("image", 8)
    request = PlanRequest(trt, load_bundle(MODEL), "image", precision, profiles, 89, here=False)
    _, timings = build_plan(request, tmp_path / "image.plan", b"", lambda stage, done: None)
    assert timings == b"" and asked == [precision != "fp32"]


@pytest.mark.parametrize(("tower", "given"), [("text", "INT32"), ("image", "FLOAT")])
def test_inputs_and_outputs_are_of_the_types_that_the_runtime_takes(tiny_bundle: Path, tower: str, given: str) -> None:
    """A model with further outputs, which stay in fp16 inside."""
    path = tiny_bundle / f"{tower}.fp16.onnx"
    network, *_alive = parsed(tensorrt_graph(path).content, path)
    assert [network.get_input(index).dtype.name for index in range(network.num_inputs)] == [given]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    assert tuple(output.name for output in outputs) == load_bundle(tiny_bundle).outputs(tower)
    assert {output.dtype.name for output in outputs} == {"FLOAT"} and len(outputs) >= 3
    assert all(output.shape[0] == -1 for output in outputs)
