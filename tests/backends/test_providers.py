from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny_models import token_ids

from longclip_rt.backends.onnxruntime import (
    OnnxRuntimeBackend,
    OnnxRuntimeCudaBackend,
    assignments,
)
from longclip_rt.backends.providers import (
    CPU,
    CUDA,
    NO_GPU,
    RECORD_ASSIGNMENT,
    Assignment,
    check_assignment,
    check_provider,
    provider_settings,
    unavailable,
)
from longclip_rt.bundle.bundle import load_bundle
from longclip_rt.errors import BackendError
from longclip_rt.opening import open_backend


def test_fp32_on_a_gpu_is_fp32() -> None:
    assert provider_settings("onnxruntime", 3) == [(CPU, {})]
    assert provider_settings("onnxruntime-cuda", 3) == [(CUDA, {"device_id": 3, "use_tf32": 0})]


def test_a_provider_that_is_not_there_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unavailable("onnxruntime", [CPU], 0) is None
    assert unavailable("onnxruntime-cuda", [CUDA, CPU], 1) is None
    assert unavailable("onnxruntime-cuda", [CUDA, CPU], 0) == NO_GPU
    reason, remedy = unavailable("onnxruntime-cuda", [CPU], 1) or ("", "")
    assert "no CUDAExecutionProvider" in reason and "longclip-rt[gpu]" in remedy
    monkeypatch.setattr("longclip_rt.backends.providers.version", lambda name: "1.32.0")
    reason, remedy = unavailable("onnxruntime-cuda", [CPU], 1) or ("", "")
    assert "overwrite each other" in reason and "pip uninstall -y onnxruntime onnxruntime-gpu" in remedy


def test_a_dropped_provider_is_an_error() -> None:
    check_provider("onnxruntime-cuda", [CUDA, CPU])
    for backend, given in (("onnxruntime-cuda", [CPU]), ("onnxruntime", [])):
        with pytest.raises(BackendError, match=r"dropped .*ExecutionProvider and would run on"):
            check_provider(backend, given)


def test_the_installed_onnx_runtime_drops_the_gpu_and_that_is_noticed(tiny_bundle: Path) -> None:
    import onnxruntime

    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime may have a GPU")
    bundle = load_bundle(tiny_bundle)
    with pytest.warns(UserWarning, match="not in available provider"), pytest.raises(BackendError, match="dropped"):
        OnnxRuntimeCudaBackend(bundle, "fp32").run("text", token_ids([5]).numpy())


def test_encoder_nodes_on_the_cpu_are_an_error_and_shapes_are_not() -> None:
    fine = [Assignment(CUDA, "Attention"), Assignment(CPU, "Shape"), Assignment(CPU, "Gather")]
    check_assignment("onnxruntime-cuda", fine)
    with pytest.raises(BackendError, match=r"on the CPU \(2 Attention, 1 MatMul\)"):
        check_assignment("onnxruntime-cuda", [*fine, *[Assignment(CPU, "Attention")] * 2, Assignment(CPU, "MatMul")])
    with pytest.raises(BackendError, match="all nodes"):
        check_assignment("onnxruntime-cuda", [])


@pytest.mark.parametrize("tower", ["text", "image"])
def test_onnx_runtime_tells_which_nodes_are_on_the_cpu(tiny_bundle: Path, tower: str) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
    graph = load_bundle(tiny_bundle).onnx(tower, "fp16")
    found = assignments(onnxruntime.InferenceSession(str(graph), options, providers=[CPU]))
    assert {node.provider for node in found} == {CPU}
    with pytest.raises(BackendError, match=r"Attention.*MatMul"):
        check_assignment("onnxruntime-cuda", found)
    # Only what works on numbers of the encoder is named.
    left = [Assignment(CUDA if node.operator in ("Attention", "MatMul") else CPU, node.operator) for node in found]
    with pytest.raises(BackendError, match="LayerNormalization"):
        check_assignment("onnxruntime-cuda", left)


@pytest.mark.parametrize("kind", [OnnxRuntimeCudaBackend, OnnxRuntimeBackend])
def test_what_goes_wrong_in_a_run_is_a_sentence(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, kind: type[OnnxRuntimeBackend]
) -> None:
    class Failing:
        def fail(self, *arguments: object) -> None:
            raise RuntimeError("no kernel image is available")

        run = io_binding = fail

    backend = kind(load_bundle(tiny_bundle), "fp32")
    monkeypatch.setattr(backend, "_session", lambda tower: Failing())
    with pytest.raises(BackendError, match=r"ONNX Runtime failed on 2 texts.*: no kernel image"):
        backend.run("text", token_ids([5, 6]).numpy())


class BoundOnTheCpu(OnnxRuntimeCudaBackend):
    """The path with bound inputs and outputs, on the one device that every machine has."""

    name = "onnxruntime"
    on_gpu = False
    memory = "cpu"


def test_bound_inputs_and_outputs_give_the_same_vectors(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    ids = token_ids([3, 20, 9, 40, 7], width=40).numpy()
    pixels = np.random.default_rng(0).standard_normal((5, 3, 24, 24)).astype(np.float32)
    names: dict[str, Sequence[str]] = {"text": ("pooler_output", "text_embeds"), "image": ("image_embeds",)}
    expected = open_backend(bundle, "onnxruntime", "fp32")
    bound = BoundOnTheCpu(bundle, "fp32")
    for tower, inputs in (("text", ids), ("image", pixels)):
        for one, other in zip(
            bound.run(tower, inputs, names[tower]), expected.run(tower, inputs, names[tower]), strict=True
        ):
            assert one.dtype == np.float32
            np.testing.assert_allclose(one, other, atol=1e-5)
        assert list(bound.timed(tower, inputs)) == ["copy in", "encoder", "copy out"]
