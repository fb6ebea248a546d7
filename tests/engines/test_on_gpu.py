"""What needs an NVIDIA GPU; `make test-gpu` runs it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_checkpoint
from trt_stubs import run_cases

from longclip_rt.bundle.bundle import BUILT_IN, load_bundle
from longclip_rt.bundle.samples import example_photos
from longclip_rt.choices import GPU_BACKENDS, LIBRARIES
from longclip_rt.errors import BackendError, EngineError
from longclip_rt.opening import availability, open_backend
from longclip_rt.runtime import Embedder
from longclip_rt.tensorrt.device import Gpu
from longclip_rt.tensorrt.engines import engines_of

MODEL = BUILT_IN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("LONGCLIP_RT_TEST_GPU") != "1", reason="run by make test-gpu, on an NVIDIA GPU"),
]


def test_some_inference_backend_can_be_used_on_this_gpu() -> None:
    """All that needs one is skipped otherwise, and a run of nothing must not pass."""
    import torch

    states = [availability(name) for name in GPU_BACKENDS]
    assert torch.cuda.is_available() or any(state.usable for state in states), states


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


def test_the_order_of_work_around_an_engine_on_the_real_driver() -> None:
    """The runner over an imitated engine that launches a small kernel: copies, slots, events, capture, closing."""
    run_cases(Path(__file__).with_name("real_driver_cases.py"), Path(), {})


@pytest.mark.parametrize("rows", [1, 16, 17, 333, 4096])
def test_the_compiled_head_gives_the_pca_alone_and_in_a_graph(rows: int, tmp_path: Path) -> None:
    from longclip_rt.export.tensorrt.head import head_from_states, write_head
    from longclip_rt.pca.basis import Basis, Pca
    from longclip_rt.tensorrt.head import HeadKernel, load_head
    from longclip_rt.weights.checkpoint import towers_from_checkpoint

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
    graph = gpu.capture(stream, lambda: kernel.launch(stream, source, reduced, rows))
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


def needs(backend: str) -> None:
    """Skips where the backend's libraries are not installed, or build for other GPUs than the one that is here."""
    from longclip_rt.export.tensorrt.build import choose_builders

    state = availability(backend)
    if not state.usable:
        pytest.skip(f"{state.reason}; mend it with: {state.remedy}")
    if backend in LIBRARIES:
        try:
            choose_builders(backend)
        except EngineError as error:
            pytest.skip(str(error))


def with_engines(source: Path, folder: Path, backend: str) -> Path:
    """A copy of a bundle with an engine for the GPU that is here; its own engines, of elsewhere, are left behind."""
    from longclip_rt.export.tensorrt.build import EngineOptions, build_engines, choose_builders

    path = shutil.copytree(source, folder / "bundle", ignore=shutil.ignore_patterns("engines"))
    build_engines(load_bundle(path), choose_builders(backend), EngineOptions(batches=(1, 16)))
    return path


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_engines_are_built_and_pass_the_whole_gate(backend: str, tmp_path: Path) -> None:
    """Of the built-in model, or of the bundle that LONGCLIP_RT_TEST_BUNDLE names."""
    from longclip_rt.export.device_gate import device_checks

    needs(backend)
    path = with_engines(Path(os.environ.get("LONGCLIP_RT_TEST_BUNDLE", MODEL)), tmp_path, backend)
    checks = device_checks(path, backend, "fp16")
    assert checks and not [check for check in checks if not check.passed]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_torch_passes_the_whole_gate(precision: str, tiny_bundle: Path) -> None:
    from longclip_rt.export.device_gate import device_checks

    needs("torch")
    assert "cuda" in open_backend(load_bundle(tiny_bundle), "torch", precision).device
    checks = device_checks(tiny_bundle, "torch", precision)
    assert checks and not [check for check in checks if not check.passed]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_torch_takes_crops_and_gives_what_the_cpu_gives(precision: str, tiny_bundle: Path) -> None:
    from longclip_rt import Embedder
    from longclip_rt.bundle.samples import example_captions, example_photos

    needs("torch")
    captions, photos = [caption.long for caption in example_captions()], example_photos() * 8
    there = Embedder.from_bundle(tiny_bundle, "onnxruntime", "fp32")
    with Embedder.from_bundle(tiny_bundle, "torch", precision) as here:
        assert here.backend.takes_crops
        limit = {"fp32": 1e-5, "fp16": 4e-3}[precision]
        for _ in range(2):
            np.testing.assert_allclose(here.embed_images(photos), there.embed_images(photos), atol=limit)
            np.testing.assert_allclose(here.embed_texts(captions), there.embed_texts(captions), atol=limit)


def test_torch_gives_the_bundles_pca_by_the_kernel(pca_bundle: Path) -> None:
    from longclip_rt import Embedder
    from longclip_rt.bundle.samples import example_captions, example_photos

    needs("torch")
    pca = load_bundle(pca_bundle).pca
    assert pca is not None
    captions, photos = [caption.long for caption in example_captions()], example_photos()
    whole = Embedder.from_bundle(pca_bundle, "onnxruntime", "fp32")
    for precision, limit in (("fp32", 2e-4), ("fp16", 2e-2), ("bf16", 6e-2)):
        with Embedder.from_bundle(pca_bundle, "torch", precision, pca="bundle") as reduced:
            assert reduced.backend.fused_pca == pca.sha256
            texts, images = reduced.embed_texts(captions), reduced.embed_images(photos)
        np.testing.assert_allclose(texts, pca.apply(whole.embed_texts(captions), "text"), atol=limit)
        np.testing.assert_allclose(images, pca.apply(whole.embed_images(photos), "image"), atol=limit)


def test_tensors_stay_on_the_gpu(tiny_bundle: Path) -> None:
    import torch

    from longclip_rt import Embedder

    needs("torch")
    rng = np.random.default_rng(0)
    with Embedder.from_bundle(tiny_bundle, "torch", "fp16") as embedder:
        size, eot = embedder.image_size, embedder.bundle.architecture.eot_id
        crops = rng.integers(0, 256, (300, size, size, 3), dtype=np.uint8)
        ids = rng.integers(1, eot, (300, 40)).astype(np.int32)
        ids[:, -1] = eot
        for turn in range(3):
            images = embedder.encode_crops(torch.from_numpy(crops).cuda())
            texts = embedder.encode_tokens(torch.from_numpy(ids).cuda().long() + 0 * turn)
            assert images.is_cuda and texts.dtype == torch.float32
            np.testing.assert_array_equal(images.cpu().numpy(), embedder.encode_crops(crops))
            np.testing.assert_array_equal(texts.cpu().numpy(), embedder.encode_tokens(ids))
        (texts.requires_grad_().sum() * 2).backward()  # what a training loop may do with them
        with pytest.raises(BackendError, match="uint8"):
            embedder.encode_crops(torch.zeros(2, size, size, 3, device="cuda"))


def test_auto_takes_torch_where_nothing_else_runs_on_the_gpu(tiny_bundle: Path) -> None:
    needs("torch")
    opened = open_backend(load_bundle(tiny_bundle))
    assert (opened.name, opened.precision) == ("torch", "fp16")
    opened.close()


def test_onnx_runtime_passes_the_whole_gate(tiny_bundle: Path) -> None:
    from longclip_rt.export.device_gate import device_checks

    needs("onnxruntime-cuda")
    path = Path(os.environ.get("LONGCLIP_RT_TEST_BUNDLE", tiny_bundle))
    checks = device_checks(path, "onnxruntime-cuda")
    assert checks and not [check for check in checks if not check.passed]


@pytest.mark.parametrize(
    ("backend", "plugins", "head"),
    [("tensorrt", (), "kernel"), ("tensorrt", ("tensorrt",), "plugin"), ("tensorrt-rtx", (), "kernel")],
)
def test_the_engines_own_pca_is_what_numpy_makes_of_the_embeddings(
    pca_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, plugins: tuple[str, ...], head: str
) -> None:
    from longclip_rt import Embedder
    from longclip_rt.bundle.samples import example_captions, example_photos

    needs(backend)
    monkeypatch.setattr("longclip_rt.export.tensorrt.build.WITH_PLUGINS", plugins)
    path = with_engines(pca_bundle, tmp_path, backend)
    (engine,) = engines_of(load_bundle(path))[0]
    assert engine.key.options["pca_head"] == head
    reduced = Embedder.from_bundle(path, backend, "fp16", pca="bundle")
    whole = Embedder.from_bundle(path, "onnxruntime", "fp32")
    pca = load_bundle(path).pca
    assert pca is not None and reduced.backend.fused_pca == pca.sha256
    captions, photos = [caption.long for caption in example_captions()], example_photos()
    for _ in range(3):  # with and without a CUDA graph
        np.testing.assert_allclose(
            reduced.embed_texts(captions), pca.apply(whole.embed_texts(captions), "text"), atol=2e-2
        )
        np.testing.assert_allclose(
            reduced.embed_images(photos), pca.apply(whole.embed_images(photos), "image"), atol=2e-2
        )
    reduced.close()


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_memory_on_the_gpu_does_not_grow_with_the_shapes_seen(backend: str, tmp_path: Path) -> None:
    from cuda.bindings import driver

    needs(backend)
    opened = open_backend(load_bundle(with_engines(MODEL, tmp_path, backend)), backend, "fp16")

    def run(count: int) -> int:
        """Free bytes after texts of `count` shapes, each of which comes three times."""
        for number in range(count):
            batch = np.ones((1 + number % 16, 1 + 31 * number % opened.bundle.architecture.context_length), np.int32)
            for _ in range(3):
                opened.run("text", batch)
        return int(driver.cuMemGetInfo()[1])

    before = run(100)  # as many graphs as are kept, and more
    assert before - run(300) < 32 << 20
    opened.close()


def test_vectors_as_tensors_stay_on_the_gpu() -> None:
    if not availability("torch").usable:
        pytest.skip("the torch backend cannot be used here")
    texts, photos = ["a red circle", "many words " * 40], example_photos()[:3]
    with Embedder.from_bundle(MODEL, "torch", "fp32", devices=[0]) as embedder:
        for embed, given in ((embedder.embed_texts, texts), (embedder.embed_images, photos)):
            tensor = embed(given, convert_to="torch")  # type: ignore[operator]
            assert str(tensor.device) == "cuda:0"
            np.testing.assert_allclose(tensor.cpu().numpy(), embed(given), atol=1e-5)  # type: ignore[operator]
