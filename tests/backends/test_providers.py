from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny_models import TINY, token_ids

from longclip_rt.backends.onnxruntime import (
    OnnxRuntimeBackend,
    OnnxRuntimeCudaBackend,
    OnnxRuntimeTensorrtBackend,
    assignments,
)
from longclip_rt.backends.providers import (
    CPU,
    CUDA,
    NO_GPU,
    RECORD_ASSIGNMENT,
    TENSORRT,
    Assignment,
    check_assignment,
    check_provider,
    provider_settings,
    unavailable,
)
from longclip_rt.bundle.bundle import load_bundle
from longclip_rt.errors import BackendError
from longclip_rt.opening import open_backend


@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt"])
@pytest.mark.parametrize("tower", ["text", "image"])
def test_providers_come_in_order_with_options_that_onnx_runtime_takes(backend: str, tower: str) -> None:
    settings = provider_settings(backend, TINY, tower, "fp16", 3, Path("/cache"))
    expected = {"onnxruntime": [CPU], "onnxruntime-cuda": [CUDA], "onnxruntime-tensorrt": [TENSORRT, CUDA]}
    assert [name for name, _ in settings] == expected[backend]
    for _, options in settings[: 0 if backend == "onnxruntime" else None]:
        assert options["device_id"] == 3
    if backend != "onnxruntime":  # its TF32 is on unless it is told, and moves fp32 vectors by more than the limit
        assert dict(settings)[CUDA]["use_tf32"] == 0
    if backend == "onnxruntime-tensorrt":
        options = settings[0][1]
        assert options["trt_engine_cache_enable"] is options["trt_timing_cache_enable"] is True
        assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == "/cache"
        shapes = [options[f"trt_profile_{end}_shapes"] for end in ("min", "opt", "max")]
        assert (
            shapes
            == {
                "text": ["input_ids:1x1", "input_ids:32x77", "input_ids:128x248"],
                "image": ["pixel_values:1x3x24x24", "pixel_values:32x3x24x24", "pixel_values:64x3x24x24"],
            }[tower]
        )


def test_a_provider_that_is_not_there_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unavailable("onnxruntime", [CPU], 0) is None
    assert unavailable("onnxruntime-cuda", [CUDA, CPU], 1) is None
    assert unavailable("onnxruntime-cuda", [CUDA, CPU], 0) == NO_GPU
    reason, remedy = unavailable("onnxruntime-tensorrt", [CPU], 1) or ("", "")
    assert "no TensorrtExecutionProvider" in reason and "longclip-rt[gpu]" in remedy
    monkeypatch.setattr("longclip_rt.backends.providers.version", lambda name: "1.32.0")
    reason, remedy = unavailable("onnxruntime-cuda", [CPU], 1) or ("", "")
    assert "overwrite each other" in reason and "pip uninstall -y onnxruntime onnxruntime-gpu" in remedy


def test_a_dropped_provider_is_an_error() -> None:
    check_provider("onnxruntime-cuda", [CUDA, CPU])
    check_provider("onnxruntime-tensorrt", [TENSORRT, CUDA, CPU])
    for backend, given in (("onnxruntime-cuda", [CPU]), ("onnxruntime-tensorrt", [CUDA, CPU]), ("onnxruntime", [])):
        with pytest.raises(BackendError, match=r"dropped .*ExecutionProvider and would run on"):
            check_provider(backend, given)


def test_the_installed_onnx_runtime_drops_the_gpu_and_that_is_noticed(tiny_bundle: Path) -> None:
    import onnxruntime

    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime may have a GPU")
    bundle = load_bundle(tiny_bundle)
    for kind in (OnnxRuntimeCudaBackend, OnnxRuntimeTensorrtBackend):
        with pytest.warns(UserWarning, match="not in available provider"), pytest.raises(BackendError, match="dropped"):
            kind(bundle, "fp32").encode_text(token_ids([5]).numpy())


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


def test_the_tensorrt_provider_gets_a_graph_that_its_parser_takes(tiny_bundle: Path) -> None:
    import onnx
    import onnxruntime

    backend = OnnxRuntimeTensorrtBackend(load_bundle(tiny_bundle), "fp32")
    content = backend._graph("text")
    attributes = {one.name for node in onnx.load_from_string(content).graph.node for one in node.attribute}
    assert "is_causal" in attributes and "softmax_precision" not in attributes
    ids = token_ids([3, 20, 9]).numpy()
    whole, changed = (
        onnxruntime.InferenceSession(graph, providers=[CPU]).run(["text_embeds"], {"input_ids": ids})[0]
        for graph in (str(tiny_bundle / "text.onnx"), content)
    )
    np.testing.assert_allclose(changed, whole, atol=1e-6)


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
        backend.encode_text(token_ids([5, 6]).numpy())


class BoundOnTheCpu(OnnxRuntimeCudaBackend):
    """The path with bound inputs and outputs, on the one device that every machine has."""

    name = "onnxruntime"
    on_gpu = False
    memory = "cpu"


def test_bound_inputs_and_outputs_give_the_same_vectors(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(tiny_bundle)
    ids = token_ids([3, 20, 9, 40, 7], width=40).numpy()
    pixels = np.random.default_rng(0).standard_normal((5, 3, 24, 24)).astype(np.float32)
    names: dict[str, Sequence[str]] = {"text": ("pooler_output", "text_embeds"), "image": ("image_embeds",)}
    expected = open_backend(bundle, "onnxruntime", "fp32")
    bound = BoundOnTheCpu(bundle, "fp32")
    for most in (None, 2):
        monkeypatch.setattr("longclip_rt.backends.onnxruntime.largest_batch", lambda name, tower: most)  # noqa: B023
        for tower, inputs in (("text", ids), ("image", pixels)):
            for one, other in zip(
                bound.run(tower, inputs, names[tower]), expected.run(tower, inputs, names[tower]), strict=True
            ):
                assert one.dtype == np.float32
                np.testing.assert_allclose(one, other, atol=1e-5)
