"""Graphs whose weights lie in a file beside them, as those of real models do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from tiny_models import tiny_checkpoint, token_ids

from longclip_rt.bundle.bundle import TOWERS, load_bundle, write_manifest
from longclip_rt.errors import BundleError, EngineError
from longclip_rt.export.onnx import export_tower
from longclip_rt.export.rounding import RoundedHalfBackend
from longclip_rt.export.tensorrt.network import tensorrt_graph
from longclip_rt.opening import open_backend
from longclip_rt.system.closing import closed_after
from longclip_rt.weights.checkpoint import towers_from_checkpoint


@pytest.fixture(scope="module")
def beside(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_bundle`, with each graph's weights in a file of their own."""
    copy = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("beside") / "bundle"))
    for graph in copy.glob("*.onnx"):
        model = onnx.load(graph)
        onnx.save(model, graph, save_as_external_data=True, location=f"{graph.name}.data", size_threshold=256)
    fields = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    write_manifest(copy, {key: value for key, value in fields.items() if key not in ("files", "content", "format")})
    return copy


def test_the_exporter_puts_large_weights_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longclip_rt.export.onnx.LARGEST_INSIDE", 1000)
    _, image = towers_from_checkpoint(tiny_checkpoint(vocab_size=512))
    export_tower(image, tmp_path / "image.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"image.onnx", "image.onnx.data"}
    weights = sum(parameter.nbytes for parameter in image.parameters())
    assert (tmp_path / "image.onnx").stat().st_size < weights < (tmp_path / "image.onnx.data").stat().st_size * 1.1


def test_every_graph_is_small_and_its_weights_are_hashed_with_it(beside: Path, tmp_path: Path) -> None:
    graphs = [f"{tower}{half}.onnx" for tower in TOWERS for half in ("", ".fp16")]
    assert {f"{name}.data" for name in graphs} < set(load_bundle(beside).manifest["files"])
    assert all((beside / name).stat().st_size < (beside / f"{name}.data").stat().st_size for name in graphs)
    copy = shutil.copytree(beside, tmp_path / "copy")
    content = bytearray((copy / "image.onnx.data").read_bytes())
    content[1000] ^= 1
    (copy / "image.onnx.data").write_bytes(content)
    with pytest.raises(BundleError, match=r"image\.onnx\.data is damaged"):
        load_bundle(copy)
    (copy / "image.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"lacks image\.onnx\.data"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("backend", "precision"), [("openvino", "fp32"), ("onnxruntime", "fp16"), ("torch", "fp32"), ("rounded", "fp16")]
)
def test_every_backend_gives_the_very_vectors_of_weights_inside(
    beside: Path, tiny_bundle: Path, backend: str, precision: str
) -> None:
    def run(path: Path, tower: str, inputs: NDArray[Any]) -> Any:
        bundle = load_bundle(path)
        rounded = backend == "rounded"
        with closed_after(
            RoundedHalfBackend(bundle) if rounded else open_backend(bundle, backend, precision)
        ) as opened:
            return opened.run(tower, inputs)[0]

    pixels = np.random.default_rng(0).standard_normal((2, 3, 24, 24), np.float32)
    for tower, inputs in (("text", token_ids([5, 30, 100], width=100).numpy()), ("image", pixels)):
        np.testing.assert_array_equal(run(beside, tower, inputs), run(tiny_bundle, tower, inputs))


def test_tensorrts_parser_finds_the_weights(beside: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not to be had for this system")
    from rtx_network import parsed

    graph = shutil.copy(beside / "text.fp16.onnx", tmp_path)
    with pytest.raises(EngineError, match="parser refuses"):
        parsed(tensorrt_graph(Path(graph)).content, Path(graph))
    shutil.copy(beside / "text.fp16.onnx.data", tmp_path)
    network, *_alive = parsed(tensorrt_graph(Path(graph)).content, Path(graph))
    assert network.num_layers > 10
