"""`engine verify` of a bundle that has engines, on a machine that cannot run them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from longclip_rt.backends.base import Backend
from longclip_rt.bundle.bundle import Bundle, load_bundle
from longclip_rt.commands.engine import verify
from longclip_rt.errors import BackendError
from longclip_rt.export import device_gate as gate
from longclip_rt.parity import gate as parity_gate
from longclip_rt.tensorrt.engines import ENGINES, EngineKey, graph_hashes, write_engine_manifest


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """With an engine of TensorRT-RTX for another machine."""
    texts = parity_gate.parity_texts
    monkeypatch.setattr(parity_gate, "parity_texts", lambda tokenizer: texts(tokenizer)[::16])
    monkeypatch.setattr("longclip_rt.system.machine.cuda_devices", lambda: [])
    bundle = load_bundle(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    folder = bundle.path / ENGINES / "engine"
    folder.mkdir(parents=True)
    for tower in ("text", "image"):
        (folder / f"{tower}.plan").write_bytes(b"a plan")
    key = EngineKey("tensorrt-rtx", "1.7.0.11", "", (89,), "fp16", graph_hashes(bundle, "fp16"))
    write_engine_manifest(folder, key, {})
    return bundle


def test_another_backend_is_not_taken_for_engines_that_cannot_be_used(bundle: Bundle) -> None:
    for precision in ("auto", "fp16"):
        result = CliRunner().invoke(verify, [str(bundle.path), "--precision", precision])
        assert isinstance(result.exception, BackendError) and result.exit_code == 1 and not result.stdout
        assert "has engines, and none of them can be used here. The backend tensorrt-rtx cannot" in str(
            result.exception
        )
        assert "--backend NAME" in str(result.exception)
    (bundle.path / ENGINES / "engine" / "engine.json").write_text("{")
    with pytest.raises(BackendError, match=r"none of them can be used here\. engine: its engine\.json cannot be used"):
        gate.device_checks(bundle.path)


def test_the_precision_is_that_of_the_engines(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundle.path / ENGINES / "engine"
    write_engine_manifest(folder, EngineKey("tensorrt", "11.4", "L4", (89,), "fp32", graph_hashes(bundle, "fp32")), {})
    asked: list[tuple[str, str]] = []
    real = gate.open_backend

    def opened(bundle: Bundle, backend: str, precision: str, devices: object = None) -> Backend:
        asked.append((backend, precision))
        return real(bundle, "onnxruntime" if backend == "tensorrt" else backend, precision)

    monkeypatch.setattr(gate, "open_backend", opened)
    assert {check.precision for check in gate.device_checks(bundle.path)} == {"fp32"}
    assert asked[0] == ("tensorrt", "fp32")


def test_what_was_asked_for_by_name_or_has_no_engine_is_checked(bundle: Bundle) -> None:
    assert {check.runtime for check in gate.device_checks(bundle.path, precision="fp32")} == {"openvino"}
    assert {check.runtime for check in gate.device_checks(bundle.path, "openvino", "fp32")} == {"openvino"}
    shutil.rmtree(bundle.path / ENGINES)
    assert {check.runtime for check in gate.device_checks(bundle.path)} == {"openvino"}
