"""What computes the PCA of an engine's embeddings: real engines of TensorRT-RTX, and what its parser takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from rtx_network import parsed

from longclip_rt.bundle.bundle import BUILT_IN, load_bundle
from longclip_rt.choices import ARCHITECTURES
from longclip_rt.cli import longclip_rt
from longclip_rt.errors import BackendError, BundleError, EngineError, ExportError
from longclip_rt.export.tensorrt.build import head_for
from longclip_rt.export.tensorrt.network import network_facts, tensorrt_graph
from longclip_rt.tensorrt.engines import engines_of
from longclip_rt.tensorrt.head import (
    HEAD_KERNEL,
    HEAD_OPERATORS,
    HEAD_PLUGIN,
    load_head,
    pca_name,
    plugin_graph_name,
    states_name,
)

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not to be had for this system")
MODEL = BUILT_IN
SMALL = ("--engine", "tensorrt-rtx", "--text-buckets", "32", "--batches", "8")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(longclip_rt, [str(argument) for argument in arguments])


def outputs_of(network: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    tensors = [network.get_output(index) for index in range(network.num_outputs)]
    return {tensor.name: (tensor.dtype.name, tuple(tensor.shape)) for tensor in tensors}


def test_every_engine_gets_the_kernel_that_was_compiled_for_its_card(pca_bundle: Path, tmp_path: Path) -> None:
    bundle = load_bundle(shutil.copytree(pca_bundle, tmp_path / "bundle"))
    result = run("engine", "build", bundle.path, "--arch", "all", *SMALL)
    assert result.exit_code == 0, result.stderr
    found = {engine.key.archs[0]: engine for engine in engines_of(bundle)[0]}
    assert set(found) > set(ARCHITECTURES) & set(found) >= {80, 86, 89, 120}
    for arch, engine in found.items():
        own = HEAD_KERNEL if arch in ARCHITECTURES else HEAD_OPERATORS
        assert engine.key.options["pca_head"] == own
        for tower, facts in engine.towers.items():
            assert facts["fp32_products"] == 0 and facts["attention"] == facts["blocks"]
            head = load_head(engine.path, tower, arch)
            if own == HEAD_OPERATORS:
                assert head is None
            else:
                assert head is not None and head.pca == bundle.manifest["pca"]["sha256"] and len(head.codes) == 2
    assert result.stderr.count("PCA: a kernel behind the engine") == 4
    assert result.stderr.count("PCA: operators of the graph") == len(found) - 4
    # The plug-in that this bundle was exported with is not for this library, and that is said.
    assert "with the PCA as a plug-in, which tensorrt-rtx does not take from Python" in result.stderr
    options = json.loads(run("engine", "list", bundle.path, "--json").stdout)[0]["options"]
    assert options["pca_head"] in (HEAD_KERNEL, HEAD_OPERATORS)


def test_a_head_in_the_bundle_that_is_damaged_ends_the_build(pca_bundle: Path, tmp_path: Path) -> None:
    bundle = load_bundle(shutil.copytree(pca_bundle, tmp_path / "bundle"))
    (bundle.path / "text.head.safetensors").unlink()
    result = run("engine", "build", bundle.path, "--arch", "sm89", *SMALL)
    assert isinstance(result.exception, BundleError) and "text.head.safetensors" in str(result.exception)
    (bundle.path / "pca_head.json").write_text("{}")
    with pytest.raises(BackendError, match=r"PCA head in .* cannot be read.*Export the bundle again"):
        head_for(bundle, "tensorrt-rtx", 89, "fp16")


def test_damage_to_the_head_beside_an_engine_is_noticed(pca_bundle: Path, tmp_path: Path) -> None:
    bundle = load_bundle(shutil.copytree(pca_bundle, tmp_path / "bundle"))
    arguments = ("engine", "build", bundle.path, "--arch", "sm89", *SMALL, "--missing")
    (folder,) = map(Path, run(*arguments).stdout.split())
    (engine,) = engines_of(bundle)[0]
    heads = {f"{tower}.head.safetensors" for tower in ("text", "image")} | {"pca_head.json"}
    cubins = {name for name in engine.files if name.endswith(".cubin")}
    assert set(engine.files) == heads | cubins | {"text.plan", "image.plan", "timing.cache"} and len(cubins) == 2
    assert engine.key.head and "kept, it was there already" in run(*arguments).stderr
    for name in sorted(heads | cubins):
        (engine,) = engines_of(bundle)[0]
        assert engine.damage() == ""
        (folder / name).write_bytes(bytes((folder / name).stat().st_size))
        with pytest.raises(EngineError, match=rf"{name} is damaged: .*Build it again with: longclip-rt engine build"):
            engine.check_head()
        result = run(*arguments)
        assert result.stdout == f"{folder}\n" and "kept" not in result.stderr
    (folder / min(cubins)).unlink()
    assert run(*arguments).exit_code == 0 and (folder / min(cubins)).is_file()


def test_the_choice(pca_bundle: Path) -> None:
    bundle = load_bundle(pca_bundle)
    assert head_for(bundle, "tensorrt", 90, "fp16") == HEAD_PLUGIN
    assert head_for(bundle, "tensorrt-rtx", 89, "fp16") == HEAD_KERNEL
    assert head_for(bundle, "tensorrt-rtx", 75, "fp16") == HEAD_OPERATORS
    assert head_for(bundle, "tensorrt", 90, "fp32") == HEAD_OPERATORS
    assert head_for(load_bundle(MODEL), "tensorrt", 90, "fp16") == ""


@pytest.mark.parametrize("tower", ["text", "image"])
def test_the_network_hands_out_half_states_in_the_place_of_the_pca(pca_bundle: Path, tower: str) -> None:
    path = pca_bundle / f"{tower}.fp16.onnx"
    network, *_alive = parsed(tensorrt_graph(path, tower).content, path)
    whole, *_kept = parsed(tensorrt_graph(path).content, path)
    width = {"text": 64, "image": 128}[tower]
    assert outputs_of(network) == {f"{tower}_embeds": ("FLOAT", (-1, 32)), states_name(tower): ("HALF", (-1, width))}
    assert outputs_of(whole) == {f"{tower}_embeds": ("FLOAT", (-1, 32)), pca_name(tower): ("FLOAT", (-1, 8))}
    cut, full = network_facts(trt, network), network_facts(trt, whole)
    assert sum(cut.layers.values()) < sum(full.layers.values()) - 5
    assert cut.fp32_products == full.fp32_products == 0


def test_the_plugin_and_rtx_by_name_do_not_go_together(pca_bundle: Path, tiny_weights: Path, tmp_path: Path) -> None:
    options = ("--pca", pca_bundle / "pca.safetensors", "--pca-in-engine", "--fp16", "--out", tmp_path / "new")
    result = run("export", "--weights", tiny_weights, *options, "--engine", "tensorrt-rtx", "--arch", "sm89")
    assert isinstance(result.exception, ExportError) and "takes no plug-ins" in str(result.exception)
    assert not (tmp_path / "new").exists()


def test_without_plugins_in_python_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from longclip_rt.export import plugin

    monkeypatch.setattr(plugin, "_registered", {})
    with pytest.raises(EngineError, match=r"no plug-ins in Python \(No module named.*without --pca-in-engine"):
        plugin.ensure_pca_head(trt, 89)
    plugin._registered["tensorrt_rtx"] = 89
    plugin.ensure_pca_head(trt, 89)
    with pytest.raises(EngineError, match="for sm_89, and cannot for sm_90 too"):
        plugin.ensure_pca_head(trt, 90)


PARSED = """
import json, sys
import numpy as np
import tensorrt_rtx as trt
from longclip_rt.export.tensorrt.network import tensorrt_graph
from pathlib import Path

seen = {}


class Creator(trt.IPluginCreatorV3One):
    def __init__(self):
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_namespace, self.plugin_version = "pca_head", "longclip", "1"
        kinds = {"dim": trt.PluginFieldType.INT32, "k": trt.PluginFieldType.INT32,
                 "eps": trt.PluginFieldType.FLOAT32, "floor": trt.PluginFieldType.FLOAT32}
        self.field_names = trt.PluginFieldCollection([trt.PluginField(n, np.array([]), k) for n, k in kinds.items()])

    def create_plugin(self, name, fields, phase):
        seen[name] = {field.name: (field.type.name, field.data.tolist()) for field in fields}
        return None


assert trt.get_plugin_registry().register_creator(Creator(), "longclip")
logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
path = Path(sys.argv[1])
assert not parser.parse(tensorrt_graph(path).content, str(path))
errors = [(parser.get_error(index).node_name(), parser.get_error(index).desc()) for index in range(parser.num_errors)]
print(json.dumps([seen, errors]))
"""


def test_the_parser_hands_the_plugin_what_the_node_says(pca_bundle: Path) -> None:
    """A plug-in of the same name, of the only kind that TensorRT-RTX takes, gets the node's numbers, and ends it."""
    path = pca_bundle / plugin_graph_name("text")
    result = subprocess.run([sys.executable, "-c", PARSED, str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    seen, errors = json.loads(result.stdout.splitlines()[-1])
    head = load_head(pca_bundle, "text", 89)
    assert head is not None
    fields = seen["pca_head_plugin"]
    assert {name: kind for name, (kind, _) in fields.items()} == {
        "dim": "INT32", "k": "INT32", "eps": "FLOAT32", "floor": "FLOAT32",
    }  # fmt: skip
    numbers = [fields[name][1] for name in ("dim", "k", "eps", "floor")]
    np.testing.assert_allclose(numbers, [[head.dim], [head.k], [head.eps], [head.floor]], rtol=1e-6)
    ((node, told),) = errors
    assert node == "pca_head_plugin" and "Could not create the plugin" in told
