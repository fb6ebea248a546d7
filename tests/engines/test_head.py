from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_checkpoint, token_ids

from longclip_rt.errors import BackendError, ExportError
from longclip_rt.export.onnx import export_tower
from longclip_rt.export.precision import half_tower
from longclip_rt.export.tensorrt.head import head_from_states, head_variants, why_no_head, write_head
from longclip_rt.export.tensorrt.head_graph import with_head_plugin, with_head_states
from longclip_rt.kernels.aot import compile_variant
from longclip_rt.model.towers import ImageTower, TextTower
from longclip_rt.pca.basis import Basis, Pca
from longclip_rt.tensorrt.head import KERNELS, PARAMETERS, HeadFiles, copy_head, load_head, pca_name, states_name
from longclip_rt.weights.checkpoint import towers_from_checkpoint

onnx = pytest.importorskip("onnx")
needs_triton = pytest.mark.skipif(
    not __import__("importlib").util.find_spec("triton") or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton's compiler",
)
K = 8


@pytest.fixture(scope="module")
def towers() -> tuple[TextTower, ImageTower]:
    return towers_from_checkpoint(tiny_checkpoint())


@pytest.fixture(scope="module")
def pca() -> Pca:
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((32, 32)))
    return Pca({"joint": Basis(0.01 * rng.standard_normal(32), basis[:, :K], np.linspace(2, 1, 32), 100)})


@pytest.fixture(scope="module")
def graph(towers: tuple[TextTower, ImageTower], pca: Pca, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text tower's fp16 graph with its PCA; half precision is made on copies."""
    path = tmp_path_factory.mktemp("head") / "text.fp16.onnx"
    tower = towers[0].with_pca(pca)
    export_tower(half_tower(tower.with_outputs(["text_embeds", "pooler_output", "text_pca"])), path)
    return path


@pytest.fixture(scope="module")
def head(towers: tuple[TextTower, ImageTower], pca: Pca, tmp_path_factory: pytest.TempPathFactory) -> HeadFiles:
    folder = tmp_path_factory.mktemp("kernels")
    write_head(folder, *towers, pca, [89])
    found = load_head(folder, "text", 89)
    assert found is not None
    return found


def run(model: object, names: list[str], ids: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])  # type: ignore[attr-defined]
    return session.run(names, {"input_ids": ids})  # type: ignore[no-any-return]


@needs_triton
def test_the_cut_graph_and_the_weights_give_what_the_towers_give(
    graph: Path, head: HeadFiles, towers: tuple[TextTower, ImageTower], pca: Pca
) -> None:
    ids = token_ids([3, 20, 9, 40, 7, 31]).numpy()
    model = onnx.load(graph)
    before = len(model.graph.node)
    with_head_states(model, "text")
    assert [output.name for output in model.graph.output] == ["text_embeds", "pooler_output", states_name("text")]
    assert len(model.graph.node) < before
    used = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used and "pca_head.shift" not in used
    embeds, states = run(model, ["text_embeds", states_name("text")], ids)
    assert states.dtype == np.float16
    expected = towers[0](torch.from_numpy(ids))[0].numpy()
    np.testing.assert_allclose(embeds, expected, atol=4e-3)
    np.testing.assert_allclose(head_from_states(head, states), pca.apply(expected, "text"), atol=1e-2)
    # From exact states only the rounding of the weights is left.
    hidden = {}
    towers[0].ln_final.register_forward_pre_hook(lambda module, given: hidden.update(states=given[0]))
    towers[0](torch.from_numpy(ids))
    close = head_from_states(head, hidden["states"].numpy())
    np.testing.assert_allclose(close, pca.apply(expected, "text"), atol=2e-3)


@needs_triton
def test_the_plugin_takes_the_place_of_the_operators(graph: Path, head: HeadFiles) -> None:
    model = onnx.load(graph)
    with_head_plugin(model, "text", head)
    (node,) = (node for node in model.graph.node if node.domain == "longclip")
    assert node.op_type == "pca_head" and list(node.output) == [pca_name("text")]
    attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    assert attributes["plugin_namespace"] == b"longclip" and attributes["aot"] == 1 and attributes["k"] == K
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    assert [weights[name] for name in node.input[1:]] == [[64, 48], [48], [16]]
    assert [output.name for output in model.graph.output] == ["text_embeds", "pooler_output", "text_pca"]


def test_a_graph_without_a_head_or_in_fp32_is_refused(tiny_bundle: Path, graph: Path) -> None:
    model = onnx.load(tiny_bundle / "text.fp16.onnx")
    with pytest.raises(ExportError, match="no PCA head"):
        with_head_states(model, "text")
    model = onnx.load(graph)
    next(t for t in model.graph.initializer if t.name == "ln_final.weight").data_type = onnx.TensorProto.FLOAT
    with pytest.raises(ExportError, match="not in fp16"):
        with_head_states(model, "text")


@needs_triton
@pytest.mark.parametrize(("k", "arch"), [(K, 89), (65, 90), (K, 100)])
def test_the_parameters_are_those_that_the_machine_code_takes(k: int, arch: int) -> None:
    """What a launch passes, against the entry in the PTX: number, order by type, and Triton's hidden pointers."""
    for variant in head_variants(k):
        compiled = compile_variant(variant, arch)
        entry = re.search(r"\.entry (\w+)\((.*?)\)", compiled.ptx, re.S)
        assert entry is not None and entry[1] == compiled.entry
        types = re.findall(r"\.param \.(\w+)", entry[2])
        assert types == [kind for _, kind in PARAMETERS]
        names = [name for name, _ in PARAMETERS]
        import longclip_rt.kernels.pca_head as source

        declared = source._pca_head_kernel.arg_names
        assert [name for name in declared if name in names] == names[:-2]  # and the last two are Triton's own
        assert compiled.scratch == 0
        assert compiled.shared <= 48 << 10 or (arch == 100 and variant.config.rows > 16)


@needs_triton
def test_what_is_passed_has_those_types_and_the_kernels_meaning(head: HeadFiles) -> None:
    scalars = head.scalars(3)
    kinds = {np.int32: "u32", np.float32: "f32"}
    assert [kinds[type(number)] for number in scalars] == [kind for _, kind in PARAMETERS[6:-2]]
    named = dict(zip([name for name, _ in PARAMETERS[6:-2]], scalars, strict=True))
    assert {name: int(named[name]) for name in ("total_rows", "width", "dim", "k", "k_start")} == {
        "total_rows": 3, "width": 64, "dim": 32, "k": K, "k_start": 32,
    }  # fmt: skip
    assert named["stride_row"] == 64 and named["stride_weight"] == 48
    # What the kernel was compiled to take for granted.
    assert all(int(named[name]) % 16 == 0 for name in ("width", "dim", "k_start", "stride_row", "stride_weight"))
    assert [code.rows for code in head.codes] == [16, 64] and head.codes[0].warps == 4


@needs_triton
def test_the_head_is_put_beside_an_engine(head: HeadFiles, tmp_path: Path) -> None:
    beside = tmp_path / "engine"
    beside.mkdir()
    assert not copy_head(head.folder, beside, [89, 90]) and not copy_head(tmp_path, beside, [89])
    assert list(beside.iterdir()) == []
    assert copy_head(head.folder, beside, [89])
    copied = load_head(beside, "image", 89)
    assert copied is not None and copied.codes == head.codes and copied.pca == head.pca
    (beside / KERNELS).write_text("{}")
    with pytest.raises(BackendError, match="cannot be read"):
        copy_head(beside, tmp_path, [89])


@needs_triton
def test_code_that_needs_too_much_shared_memory_is_left_out(
    towers: tuple[TextTower, ImageTower], pca: Pca, tmp_path: Path
) -> None:
    write_head(tmp_path, *towers, pca, [100])
    head = load_head(tmp_path, "text", 100)
    assert head is not None and [code.rows for code in head.codes] == [16]
    assert head.code_for(1_000_000).rows == 16


def test_what_the_kernel_cannot_do_is_said(towers: tuple[TextTower, ImageTower]) -> None:
    assert "reconstruct" in why_no_head(*towers, "reconstruct")
    odd = towers_from_checkpoint(tiny_checkpoint(embed_dim=40))
    assert "multiples of 16" in why_no_head(*odd, "project")


INTERPRETED = """
import sys
from pathlib import Path
import numpy as np, torch
from longclip_rt.tensorrt.head import load_head
from longclip_rt.kernels.launch import interpreted
import longclip_rt.kernels.pca_head as source
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
head = load_head(folder, "text", 89)
states = torch.from_numpy(np.load(out / "states.npy"))
weights = [torch.from_numpy(array) for array in (head.weight, head.bias, head.shift)]
code, reduced = head.code_for(len(states)), torch.empty(len(states), head.k)
assert interpreted(source._pca_head_kernel)
numbers = [number.item() for number in head.scalars(len(states))]
config = next(c for c in source.HALF_CONFIGS if c.rows == code.rows)
source._pca_head_kernel[(-(-len(states) // code.rows),)](
    states, *weights, reduced, reduced, *numbers[:6], 1, *numbers[6:],
    WIDE=False, WIDE_DOT=False, WITH_EMBEDDING=False, NORMALIZE=True, ONE_TILE=True,
    BLOCK_B=config.rows, BLOCK_N=config.columns, BLOCK_W=config.inner,
)
np.save(out / "reduced.npy", reduced.numpy())
from longclip_rt.export.plugin import launch_callback
launch_callback([states, *weights, reduced.zero_()], head.dim, head.k, head.eps, head.floor)
np.save(out / "callback.npy", reduced.numpy())
"""


@needs_triton
def test_the_kernel_with_the_stored_weights_and_numbers_gives_the_pca(head: HeadFiles, tmp_path: Path) -> None:
    """The launch's own arguments, in Triton's interpreter."""
    states = np.random.default_rng(1).standard_normal((19, 64)).astype(np.float16)
    np.save(tmp_path / "states.npy", states)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED, str(head.folder), str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    np.testing.assert_allclose(np.load(tmp_path / "reduced.npy"), head_from_states(head, states), atol=2e-3)
    np.testing.assert_allclose(np.load(tmp_path / "callback.npy"), head_from_states(head, states), atol=2e-3)
    assert (head.folder / KERNELS).is_file()
