from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import token_ids

from longclip_rt.bundle.bundle import load_bundle
from longclip_rt.bundle.manifest import write_fields
from longclip_rt.errors import BackendError
from longclip_rt.opening import availability, open_backend
from longclip_rt.weights.checkpoint import load_checkpoint, towers_from_checkpoint

IDS = token_ids([3, 20, 9, 40], width=40).numpy()
PIXELS = np.random.default_rng(0).standard_normal((3, 3, 24, 24)).astype(np.float32)

PAIRS = [
    (name, precision) for name in ("openvino", "onnxruntime", "torch") for precision in availability(name).precisions
]  # what this machine can run, bf16 in OpenVINO only where the CPU has it


@pytest.fixture(scope="module")
def expected(tiny_weights: Path) -> dict[str, np.ndarray]:
    text, image = towers_from_checkpoint(load_checkpoint(tiny_weights))
    return {"text": text(torch.from_numpy(IDS))[0].numpy(), "image": image(torch.from_numpy(PIXELS))[0].numpy()}


@pytest.mark.parametrize(("name", "precision"), PAIRS)
def test_every_backend_gives_the_towers_vectors(
    tiny_bundle: Path, expected: dict[str, np.ndarray], name: str, precision: str
) -> None:
    backend = open_backend(load_bundle(tiny_bundle), name, precision)
    assert (backend.name, backend.precision) == (name, precision)
    assert backend.version and backend.device
    got = {"text": backend.run("text", IDS)[0], "image": backend.run("image", PIXELS)[0]}
    for tower, vectors in got.items():
        assert vectors.dtype == np.float32
        tolerance = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}[precision]
        np.testing.assert_allclose(vectors, expected[tower], atol=tolerance)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        if precision != "fp32":  # proof that the precision was lowered at all
            assert np.abs(vectors - expected[tower]).max() > 1e-6
    backend.close()
    backend.close()


@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "torch"])
def test_results_belong_to_the_caller_and_threads_do_not_mix(tiny_bundle: Path, name: str) -> None:
    backend = open_backend(load_bundle(tiny_bundle), name, "fp32")
    batches = [token_ids([5 + index, 30], width=32, seed=index).numpy() for index in range(24)]
    alone = [backend.run("text", ids)[0].copy() for ids in batches]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda ids: backend.run("text", ids)[0], batches))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "torch"])
def test_further_outputs_come_by_name(tiny_bundle: Path, tiny_weights: Path, name: str) -> None:
    backend = open_backend(load_bundle(tiny_bundle), name, "fp32")
    text, _ = towers_from_checkpoint(load_checkpoint(tiny_weights))
    names = ("hidden_states.-2", "pooler_output", "text_embeds")
    for got, wanted in zip(
        backend.run("text", IDS, names), text.with_outputs(names)(torch.from_numpy(IDS)), strict=True
    ):
        np.testing.assert_allclose(got, wanted.numpy(), atol=2e-5)
    with pytest.raises(BackendError, match=r"hidden_states\.-1.*--output-name hidden_states\.-1"):
        backend.run("text", IDS, ("hidden_states.-1",))


@pytest.mark.parametrize(
    ("tower", "shape"),
    [
        ("text", (2, 249)),
        ("text", (2, 0)),
        ("text", (0, 5)),
        ("text", (5,)),
        ("image", (1, 3, 24, 25)),
        ("image", (0, 3, 24, 24)),
    ],
)
def test_wrong_shapes_are_named(tiny_bundle: Path, tower: str, shape: tuple[int, ...]) -> None:
    backend = open_backend(load_bundle(tiny_bundle), "onnxruntime", "fp32")
    with pytest.raises(BackendError, match="must be"):
        backend.run(tower, np.zeros(shape, np.int32 if tower == "text" else np.float32))


def test_what_is_asked_for_by_name_is_never_replaced(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    with pytest.raises(BackendError, match=r"does not compute in bf16.*longclip-rt info"):
        open_backend(bundle, "onnxruntime", "bf16")
    with pytest.raises(BackendError, match="no backend 'tensorflow'"):
        open_backend(bundle, "tensorflow")
    with pytest.raises(BackendError, match="no precision 'int4'"):
        open_backend(bundle, "auto", "int4")


def test_auto_takes_openvino_and_the_next_when_it_is_absent(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = load_bundle(tiny_bundle)
    preferred = availability("openvino").precisions[0]
    opened = open_backend(bundle)
    assert (opened.name, opened.precision) == ("openvino", preferred)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with caplog.at_level(logging.DEBUG, "longclip_rt"):
        opened = open_backend(bundle)
    assert (opened.name, opened.precision) == ("onnxruntime", "fp32")
    assert "openvino: the Python package openvino is not installed" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "longclip_rt"):
        open_backend(bundle)
    assert [record.getMessage() for record in caplog.records] == [
        f"onnxruntime {opened.version} in fp32 on {opened.device}"
    ]
    from longclip_rt.system.machine import CudaDevice

    monkeypatch.setattr("longclip_rt.system.machine.cuda_devices", lambda: [CudaDevice("NVIDIA L4", 89, 24 << 30)])
    with caplog.at_level(logging.INFO, "longclip_rt"):
        open_backend(bundle)
    assert "passed over: tensorrt:" in caplog.text  # a GPU is there, and is not used
    with pytest.raises(BackendError, match=r"openvino.*not installed.*pip install"):
        open_backend(bundle, "openvino")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"No backend can be used.*longclip-rt\[cpu\]"):
        open_backend(bundle)


def test_a_tensorrt_that_is_too_old_or_broken_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.machinery
    import types

    from longclip_rt.system.machine import CudaDevice

    monkeypatch.setattr("longclip_rt.system.machine.cuda_devices", lambda: [CudaDevice("NVIDIA L4", 89, 24 << 30)])
    library = types.ModuleType("tensorrt")
    library.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    library.Builder, library.__version__ = object, "10.0.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setitem(sys.modules, "cuda.core", types.ModuleType("cuda.core"))
    sys.modules["cuda.core"].__spec__ = importlib.machinery.ModuleSpec("cuda.core", None)
    state = availability("tensorrt")
    assert not state.usable and state.reason == "tensorrt 10.0.1 is too old; 10.14 or newer is needed"
    assert state.remedy == 'pip install -U "longclip-rt[gpu,tensorrt]"'
    library.__version__ = "11.4.0"
    assert availability("tensorrt").usable and availability("tensorrt").precisions == ("fp16", "fp32")
    del library.Builder  # type: ignore[attr-defined]
    assert "is there and is empty" in availability("tensorrt").reason


def test_fp16_without_an_fp16_graph_is_an_error(tiny_bundle: Path, tmp_path: Path) -> None:
    import json

    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    manifest = json.loads((copy / "bundle.json").read_text())
    write_fields(copy, manifest | {"precisions": ["fp32"]})
    with pytest.raises(BackendError, match="exported without --fp16"):
        open_backend(load_bundle(copy), "onnxruntime", "fp16")


def test_the_torch_backend_refuses_other_weights_than_the_bundles(tiny_bundle: Path, tmp_path: Path) -> None:
    import json

    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["source"]["sha256"] = "0" * 64
    write_fields(copy, manifest)
    with pytest.raises(BackendError, match="not what the bundle was exported from"):
        open_backend(load_bundle(copy), "torch")
    manifest["source"]["weights"] = str(tmp_path / "gone.safetensors")
    write_fields(copy, manifest)
    with pytest.raises(BackendError, match=r"cannot be loaded.*--backend auto"):
        open_backend(load_bundle(copy), "torch")


def test_signals_arrive_after_backends_are_dropped(tiny_bundle: Path) -> None:
    """OpenVINO sets a stack for signal handlers, and must not leave one behind that is gone."""
    script = (
        "import gc, os, signal, sys\n"
        "from longclip_rt.opening import open_backend\n"
        "from longclip_rt.bundle.bundle import load_bundle\n"
        "signal.signal(signal.SIGINT, lambda *_: print('arrived'))\n"
        "opened = [open_backend(load_bundle(sys.argv[1]), 'openvino', 'fp32') for _ in range(2)]\n"
        "while opened: opened.pop(0); gc.collect()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tiny_bundle)], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "arrived\n"), result.stderr
