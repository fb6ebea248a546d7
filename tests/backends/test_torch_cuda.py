"""The torch backend for GPUs on the real torch, whose CUDA is imitated: work is captured and replayed on the CPU."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longclip_rt.backends import torch_cuda
from longclip_rt.backends.graph_weights import weights_of
from longclip_rt.backends.torch_cuda import ROWS, TorchCudaBackend, full_fp32, towers_of
from longclip_rt.bundle.bundle import BUILT_IN, load_bundle
from longclip_rt.errors import BackendError
from longclip_rt.opening import availability, open_backend
from longclip_rt.parity.gate import reference_from_backend, sample_for, verify_backend
from longclip_rt.system.machine import CudaDevice


class Recorded(TorchDispatchMode):
    """Runs operators and keeps them, so that they can be run again on what their tensors then hold."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.steps:
            again = func(*args, **kwargs)
            olds, news = ((each,) if isinstance(each, torch.Tensor) else each for each in (out, again))
            for old, new in zip(olds, news, strict=True):
                if old is not new:
                    old.copy_(new)


class Stream:
    def __init__(self, device: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any) -> Any:
        return event


class ImitatedTorch:
    """torch with one imitated GPU; `captured` counts graphs."""

    def __init__(self) -> None:
        self.captured = 0
        self.tf32_seen: list[bool] = []

        @contextlib.contextmanager
        def graph(recorded: Any, **how: Any) -> Iterator[None]:
            assert how["capture_error_mode"] == "thread_local"
            self.captured += 1
            self.tf32_seen.append(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
            with recorded:
                yield

        self.cuda = SimpleNamespace(
            device_count=lambda: 1, get_device_name=lambda number: "Imitated GPU", device=contextlib.nullcontext,
            stream=contextlib.nullcontext, Stream=Stream, CUDAGraph=Recorded, graph=graph,
            graph_pool_handle=lambda: None, synchronize=lambda device: None, OutOfMemoryError=MemoryError,
            Event=lambda blocking: SimpleNamespace(synchronize=lambda: None),
        )  # fmt: skip

    def device(self, kind: str, number: int) -> torch.device:
        return torch.device("cpu")

    def zeros(self, *given: Any, pin_memory: bool, **more: Any) -> torch.Tensor:
        return torch.zeros(*given, **more)

    def empty(self, *given: Any, pin_memory: bool, **more: Any) -> torch.Tensor:
        return torch.empty(*given, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ImitatedTorch:
    imitated = ImitatedTorch()
    monkeypatch.setattr(torch_cuda, "require", lambda name, extra: imitated)
    monkeypatch.setattr("longclip_rt.system.machine.cuda_devices", lambda: [CudaDevice("GPU", 90, 80 << 30)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch_cuda, "ROWS", (1, 4, 8))
    return imitated


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_whole_gate_passes_on_captured_graphs(tiny_bundle: Path, gpu: ImitatedTorch, precision: str) -> None:
    bundle = load_bundle(tiny_bundle)
    opened = open_backend(bundle, "torch-cuda", precision)
    assert gpu.captured == 4 * 3 + 3  # by the self-check: every bucket in every size, and images; nothing afterwards
    sample = sample_for(bundle)
    reference = reference_from_backend(open_backend(bundle, "onnxruntime", "fp32"), sample)
    checks = list(verify_backend(opened, sample, reference))
    assert checks and not [check for check in checks if not check.passed]
    assert gpu.captured == 4 * 3 + 3 and not any(gpu.tf32_seen)
    opened.close()
    opened.close()


def test_rows_of_an_older_batch_do_not_come_back(tiny_bundle: Path, gpu: ImitatedTorch) -> None:
    bundle = load_bundle(tiny_bundle)
    opened, plain = TorchCudaBackend(bundle, "fp32"), open_backend(bundle, "onnxruntime", "fp32")
    rng = np.random.default_rng(0)
    for rows, length in ((20, 40), (3, 33), (1, 5), (9, 248), (4, 40)):
        ids = rng.integers(1, bundle.architecture.vocab_size, (rows, length), dtype=np.int32)
        ids[:, -1] = bundle.architecture.eot_id
        np.testing.assert_allclose(opened.encode_text(ids), plain.encode_text(ids), atol=1e-5)
    (states,) = opened.run("text", ids, ["hidden_states.-2"])
    np.testing.assert_allclose(states, plain.run("text", ids, ["hidden_states.-2"])[0], atol=1e-4)


def test_the_pca_is_there_too(pca_bundle: Path, gpu: ImitatedTorch) -> None:
    bundle = load_bundle(pca_bundle)
    opened, plain = TorchCudaBackend(bundle, "fp32"), open_backend(bundle, "onnxruntime", "fp32")
    ids = np.random.default_rng(0).integers(1, bundle.architecture.vocab_size, (3, 9), dtype=np.int32)
    ids[:, -1] = bundle.architecture.eot_id
    both = [each.run("text", ids, ["text_embeds", "text_pca"]) for each in (opened, plain)]
    for got, wanted in zip(*both, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_the_built_in_weights_come_out_of_its_graphs_and_others_are_refused(tmp_path: Path) -> None:
    bundle = load_bundle(BUILT_IN)
    weights = weights_of(bundle)
    assert set(bundle.architecture.shapes()) - set(weights) == {"logit_scale"}
    text, _ = towers_of(bundle, "fp32")
    ids = np.full((1, 5), bundle.architecture.eot_id, np.int32)
    with torch.inference_mode():
        got = text(torch.from_numpy(ids))[0].numpy()
    np.testing.assert_allclose(got, open_backend(bundle, "onnxruntime", "fp32").encode_text(ids), atol=1e-5)
    copy = load_bundle(shutil.copytree(BUILT_IN, tmp_path / "copy"))
    model = onnx.load(str(copy.onnx("text", "fp32")))
    for node in model.graph.node:
        node.input[:] = ["other" if name == "ln_final.bias" else name for name in node.input]
    for tensor in model.graph.initializer:
        tensor.name = "other" if tensor.name == "ln_final.bias" else tensor.name
    onnx.save(model, str(copy.onnx("text", "fp32")))
    with pytest.raises(BackendError, match=r"lack 1 of \d+ weights .* such as ln_final\.bias"):
        weights_of(copy)


def test_tf32_is_off_inside_and_as_it_was_behind() -> None:
    assert tuple(sorted(ROWS)) == ROWS and ROWS[0] == 1
    torch.backends.cudnn.allow_tf32 = True
    with full_fp32(torch):
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def test_what_is_missing_is_said(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.cuda.is_available():
        pytest.skip("PyTorch has a GPU here")
    assert "no NVIDIA GPU" in availability("torch-cuda").reason
    with pytest.raises(BackendError, match=r"sees 0 NVIDIA GPUs, and GPU 0 was asked for"):
        TorchCudaBackend(load_bundle(tiny_bundle), "fp16")
    monkeypatch.setattr("longclip_rt.system.machine.cuda_devices", lambda: [CudaDevice("GPU", 90, 80 << 30)])
    assert "the installed PyTorch" in availability("torch-cuda").reason
    with caplog.at_level(logging.INFO, "longclip_rt"):
        assert open_backend(load_bundle(tiny_bundle)).name in ("openvino", "onnxruntime")
    assert "passed over" in caplog.text and "torch-cuda: the installed PyTorch" in caplog.text
