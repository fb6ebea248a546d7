"""What needs an NVIDIA GPU; `make test-gpu` runs it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_checkpoint

from longclip_rt.backends import availability
from longclip_rt.backends.device import Gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("LONGCLIP_RT_TEST_GPU") != "1", reason="run by make test-gpu, on an NVIDIA GPU"),
]


def test_what_is_copied_in_comes_out() -> None:
    gpu = Gpu(0)
    stream = gpu.stream()
    pinned, device = gpu.allocate_pinned(4096, stream), gpu.allocate(4096, stream)
    stream.sync()
    sent = pinned.view((16, 64), np.int32)
    back = gpu.allocate_pinned(4096, stream)
    for turn in range(4):
        sent[...] = np.arange(1024).reshape(16, 64) + turn
        gpu.copy(device, pinned.buffer, 4096, stream)
        gpu.copy(back.buffer, device, 4096, stream)
        gpu.record(stream).sync()
        np.testing.assert_array_equal(back.view((16, 64), np.int32), sent)
    for buffer in (pinned.buffer, back.buffer, device):
        buffer.close(stream)
    stream.close()


@pytest.mark.parametrize("rows", [1, 16, 17, 333, 4096])
def test_the_compiled_head_gives_the_pca_alone_and_in_a_graph(rows: int, tmp_path: Path) -> None:
    from longclip_rt.backends.head_kernel import HeadKernel, load_head
    from longclip_rt.export.head import head_from_states, write_head
    from longclip_rt.pca import Basis, Pca
    from longclip_rt.towers import towers_from_checkpoint

    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((32, 32)))
    pca = Pca({"joint": Basis(0.01 * rng.standard_normal(32), basis[:, :8], np.linspace(2, 1, 32), 100)})
    gpu = Gpu(0)
    write_head(tmp_path, *towers_from_checkpoint(tiny_checkpoint()), pca, [gpu.arch])
    head = load_head(tmp_path, "text", gpu.arch)
    assert head is not None
    stream = gpu.stream()
    kernel = HeadKernel(head, gpu, stream)
    states = rng.standard_normal((rows, head.width)).astype(np.float16)
    source = gpu.upload(states, stream)
    reduced, back = gpu.allocate(rows * 32, stream), gpu.allocate_pinned(rows * 32, stream)
    stream.sync()
    expected = head_from_states(head, states)
    kernel.launch(stream, source, reduced, rows)
    graph = gpu.capture(stream, lambda builder: kernel.launch(builder, source, reduced, rows))
    for turn in range(3):
        if turn:
            graph.launch(stream)
        gpu.copy(back.buffer, reduced, rows * 32, stream)
        stream.sync()
        np.testing.assert_allclose(back.view((rows, 8), np.float32), expected, atol=2e-3)
        back.array[...] = 0
    graph.close()
    kernel.close(stream)
    stream.sync()
    stream.close()


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"])
def test_the_whole_gate_holds_on_the_device(tiny_bundle: Path, backend: str) -> None:
    """With TensorRT for the bundle named in LONGCLIP_RT_TEST_BUNDLE, which has engines; else for the small model."""
    from longclip_rt.export.gate import device_checks

    state = availability(backend)
    if not state.usable:
        pytest.skip(state.reason)
    bundle = Path(os.environ.get("LONGCLIP_RT_TEST_BUNDLE", tiny_bundle))
    if backend.startswith("tensorrt") and not (bundle / "engines").is_dir():
        pytest.skip("the bundle has no engines; name one that has in LONGCLIP_RT_TEST_BUNDLE")
    failed = [check for check in device_checks(bundle, backend) if not check.passed]
    assert not failed
