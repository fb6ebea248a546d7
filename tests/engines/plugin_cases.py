"""Tests of the plug-in with TensorRT's real Python bindings; `test_device.py` runs them in a process of their own."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import tensorrt_bindings as real

sys.modules["tensorrt"] = real
import tensorrt.plugin as plugins  # noqa: E402
from tensorrt.plugin._lib import QDP_REGISTRY  # noqa: E402
from tensorrt.plugin._tensor import SymIntExpr  # noqa: E402

from longclip_rt.export.plugin import PLUGIN, register_pca_head  # noqa: E402
from longclip_rt.export.tensorrt.head_graph import PLUGIN_NAME, PLUGIN_NAMESPACE  # noqa: E402
from longclip_rt.kernels.pca_head_plugin import PARAMETERS, without_hidden_parameters  # noqa: E402
from longclip_rt.tensorrt.head import HeadFiles  # noqa: E402

W, COLUMNS, D, K, K_PADDED, ARCH = 64, 48, 32, 8, 16, 90
ATTRIBUTES = {"dim": D, "k": K, "eps": 1e-5, "floor": 1e-12}


class Expressions:
    """Stands for TensorRT's builder of shape expressions, which only exists inside a build."""

    def constant(self, value: int) -> Any:
        return value

    def operation(self, operation: Any, first: Any, second: Any) -> Any:
        assert operation == real.DimensionOperation.CEIL_DIV
        return -(-first // second)


class Registry:
    """Stands for TensorRT's registry, which is a null pointer here."""

    def __init__(self) -> None:
        self.creators: list[tuple[Any, str]] = []

    def register_creator(self, creator: Any, plugin_namespace: str) -> bool:
        self.creators.append((creator, plugin_namespace))
        return True

    def get_creator(self, name: str, version: str, plugin_namespace: str) -> Any:
        return next(creator for creator, _ in self.creators if (creator.name, version) == (name, "1"))


REGISTRY = Registry()


@pytest.fixture(scope="module")
def definition() -> Any:
    real.get_plugin_registry = lambda: REGISTRY
    assert PLUGIN == f"{PLUGIN_NAMESPACE}::{PLUGIN_NAME}" == "longclip::pca_head"
    register_pca_head(real, plugins, ARCH)
    return QDP_REGISTRY[PLUGIN]


def test_tensorrt_accepts_the_registration(definition: Any) -> None:
    assert definition.input_tensor_names == ["states", "weight", "bias", "shift"]
    assert definition.input_attrs == {"dim": int, "k": int, "eps": float, "floor": float}
    assert definition.num_outputs == 1
    assert definition.aot_impl_func is not None and definition.impl_func is not None
    assert definition.aot_impl_attr_names == definition.impl_attr_names == list(ATTRIBUTES)
    assert not definition.expects_tactic
    ((creator, namespace),) = REGISTRY.creators
    assert isinstance(creator, real.IPluginCreatorV3Quick) and namespace == "longclip"
    assert (creator.name, creator.plugin_namespace, creator.plugin_version) == ("pca_head", "longclip", "1")
    assert {field.name for field in creator.field_names} == set(ATTRIBUTES)
    with pytest.raises(ValueError, match="already"):
        register_pca_head(real, plugins, ARCH)
    # What a network with both implementations must be created with.
    assert real.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS is not None


def descriptions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """TensorRT's own descriptions of the inputs, with B = 130."""
    monkeypatch.setattr(SymIntExpr, "_exprBuilder", Expressions())
    shapes = [(130, W), (W, COLUMNS), (COLUMNS,), (K_PADDED,)]
    kinds = [real.float16, real.float16, real.float32, real.float32]
    made = []
    for shape, kind in zip(shapes, kinds, strict=True):
        made.append(plugins.from_shape_expr(tuple(plugins.ShapeExpr(size) for size in shape), kind))
        made[-1]._shape = plugins.Shape(shape)
    return made


def test_the_description_gives_the_outputs_shape_and_type(definition: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    output = definition.register_func(*descriptions(monkeypatch), **ATTRIBUTES)
    assert isinstance(output, plugins.TensorDesc) and output.dtype == real.float32
    assert [dimension._expr for dimension in output.shape_expr] == [130, K]


def test_the_code_takes_exactly_what_tensorrt_passes(definition: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = descriptions(monkeypatch)
    name, ptx, launch, scalars = definition.aot_impl_func(*given, **ATTRIBUTES, outputs=(None,), tactic=0)
    entries = re.findall(r"\.entry (\w+)\((.*?)\)", ptx, re.S)
    assert [entry for entry, _ in entries] == [name] == ["_pca_head_plugin_kernel"]
    types = re.findall(r"\.param \.(\w+)", entries[0][1])
    # Inputs, scalars, outputs; no pointer of Triton's own.
    assert types == list(PARAMETERS) == ["u64"] * len(given) + ["u32"] * len(scalars) + ["u64"]
    assert f".target sm_{ARCH}" in ptx
    assert isinstance(launch, plugins.KernelLaunchParams) and isinstance(scalars, plugins.SymIntExprs)
    assert launch.grid_x._expr == 3  # 130 rows, 64 a program
    assert launch.block_x._expr == 256 and 0 < launch.shared_mem._expr <= 48 << 10
    assert isinstance(scalars[0], plugins.SymInt32) and scalars[0]._expr == 130


def test_a_kernel_that_needs_too_much_shared_memory_gives_way_to_the_smaller(
    definition: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longclip_rt.errors import KernelError

    def compiled() -> Any:
        return definition.aot_impl_func(*descriptions(monkeypatch), **ATTRIBUTES, outputs=(None,), tactic=0)[2]

    many = compiled().shared_mem._expr
    monkeypatch.setattr("longclip_rt.export.plugin.LARGEST_SHARED", many - 1)
    launch = compiled()
    assert (launch.grid_x._expr, launch.block_x._expr) == (9, 128) and launch.shared_mem._expr < many
    monkeypatch.setattr("longclip_rt.export.plugin.LARGEST_SHARED", 0)
    with pytest.raises(KernelError, match="too much"):
        compiled()


def test_the_stripped_code_still_assembles(definition: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import subprocess

    import triton

    _, ptx, _, _ = definition.aot_impl_func(*descriptions(monkeypatch), **ATTRIBUTES, outputs=(None,), tactic=0)
    (tmp_path / "head.ptx").write_text(ptx)
    program = triton.knobs.nvidia.ptxas.path
    command = [program, f"-arch=sm_{ARCH}a", "-o", str(tmp_path / "head.cubin"), str(tmp_path / "head.ptx")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "head.cubin").stat().st_size > 1000


def test_a_parameter_that_is_used_is_not_taken_out() -> None:
    from longclip_rt.errors import KernelError

    ptx = ".visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .u64 .ptr .global .align 1 f_param_1\n)\n{ BODY }"
    stripped = without_hidden_parameters(ptx.replace("BODY", "ld.param.u64 %r, [f_param_0];"), 1)
    assert re.findall(r"f_param_\d", stripped) == ["f_param_0"] * 2
    with pytest.raises(KernelError, match=r"uses \['f_param_1'\]"):
        without_hidden_parameters(ptx.replace("BODY", "ld.param.u64 %r, [f_param_1];"), 1)
    with pytest.raises(KernelError, match="2 parameters"):
        without_hidden_parameters(ptx, 3)


def test_the_graphs_node_names_what_is_registered(definition: Any) -> None:
    """The node's attributes are the registered ones, beside those that say which plug-in it is."""
    from pathlib import Path

    import numpy as np
    from onnx import TensorProto, helper

    from longclip_rt.export.tensorrt.head_graph import with_head_plugin

    half = TensorProto.FLOAT16
    weights = {"g": (half, [W]), "b": (half, [W]), "pca_head.weight": (half, [W, D + K])}
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g", "b"], ["n"]),
        helper.make_node("MatMul", ["n", "pca_head.weight"], ["text_pca"]),
        helper.make_node("Identity", ["n"], ["text_embeds"]),
    ]
    values = [helper.make_tensor_value_info(name, half, ["batch", W]) for name in ("x", "text_embeds", "text_pca")]
    tensors = [helper.make_tensor(name, kind, dims, np.zeros(dims)) for name, (kind, dims) in weights.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], tensors))
    head = HeadFiles(
        np.zeros((W, COLUMNS), np.float16), np.zeros(COLUMNS, np.float32), np.zeros(K_PADDED, np.float32),
        D, K, 1e-5, 1e-12, "", (), Path(),
    )  # fmt: skip
    with_head_plugin(model, "text", head)
    (node,) = (node for node in model.graph.node if node.op_type == PLUGIN_NAME)
    names = {attribute.name for attribute in node.attribute}
    assert names - {"plugin_namespace", "plugin_version", "aot"} == set(definition.input_attrs)
    assert len(node.input) == len(definition.input_tensor_names)
