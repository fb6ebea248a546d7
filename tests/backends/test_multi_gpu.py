from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import longclip_rt.opening as backends
from longclip_rt.backends.base import Backend, Float32
from longclip_rt.backends.multi_gpu import DevicePool
from longclip_rt.bundle.bundle import Bundle, load_bundle
from longclip_rt.choices import BACKENDS, GPU_BACKENDS
from longclip_rt.embedding.pipeline import EmbedOptions, embed_files
from longclip_rt.errors import BackendError
from longclip_rt.opening import Availability, open_backend
from longclip_rt.runtime import Embedder

FILES = str(Path(__file__).parents[2] / "examples" / "files.txt")


class Card(Backend):
    """A GPU of the imagination, on ONNX Runtime's CPU provider."""

    name = "tensorrt"
    version = "11"  # type: ignore[assignment]
    concurrency = 2
    opened: ClassVar[list[Card]] = []
    fails: ClassVar[dict[int, str]] = {}
    stuck: ClassVar[bool] = False

    def __init__(self, bundle: Bundle, precision: str, number: int = 0, model: str = "NVIDIA L4") -> None:
        super().__init__(bundle, precision)
        if number in self.fails:
            raise BackendError(self.fails[number])
        self.inner = open_backend(bundle, "onnxruntime", precision)
        self.number, self.model = number, model
        self.calls, self.running, self.most, self.closed = 0, 0, 0, 0
        self.lock = threading.Lock()
        self.wrong = False
        self.shapes: set[tuple[int, ...]] = set()
        self.opened.append(self)

    @property
    def device(self) -> str:
        return self.model

    @property
    def buckets(self) -> tuple[int, ...]:
        return (32, 77, 248)

    def _run(self, tower: str, inputs: Any, outputs: Sequence[str]) -> list[Float32]:
        with self.lock:
            self.calls += 1
            self.shapes.add(inputs.shape)
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            got = self.inner.run(tower, inputs, outputs)
            return [-array for array in got] if self.wrong else got
        finally:
            with self.lock:
                self.running -= 1

    def _close(self) -> None:
        self.closed += 1
        self.inner.close()
        if self.stuck:
            raise BackendError("GPU failed while it was closed")


@pytest.fixture(autouse=True)
def cards(monkeypatch: pytest.MonkeyPatch) -> list[Card]:
    monkeypatch.setattr(Card, "opened", [])
    monkeypatch.setattr(Card, "fails", {})
    real = backends.availability
    real_class = backends._class_of
    monkeypatch.setattr(backends, "_class_of", lambda name: Card if name in GPU_BACKENDS else real_class(name))
    monkeypatch.setattr(
        backends,
        "availability",
        lambda name: Availability(name, True, ("fp16", "fp32")) if name in GPU_BACKENDS else real(name),
    )
    return Card.opened


def test_batches_go_to_all_devices_within_what_each_takes_at_a_time(tiny_bundle: Path, cards: list[Card]) -> None:
    bundle = load_bundle(tiny_bundle)
    pool = DevicePool([Card(bundle, "fp16", number) for number in range(3)])
    assert pool.concurrency == 6 and pool.buckets == (32, 77, 248) and pool.device == "NVIDIA L4"
    pixels = np.random.default_rng(0).standard_normal((40, 1, 3, 24, 24)).astype(np.float32)
    alone = [cards[0].inner.run("image", one)[0] for one in pixels]
    with ThreadPoolExecutor(12) as threads:
        for one, other in zip(alone, threads.map(lambda batch: pool.run("image", batch)[0], pixels), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
    assert all(card.calls > 0 and card.most <= 2 for card in cards)
    pool.close()
    assert [card.closed for card in cards] == [1, 1, 1]


def test_unlike_devices_are_not_mixed(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    with pytest.raises(BackendError, match=r"not alike: .*NVIDIA L4 and .*NVIDIA A100"):
        DevicePool([Card(bundle, "fp16", 0), Card(bundle, "fp16", 1, "NVIDIA A100")])


def test_embed_on_two_devices_gives_one_output_in_order(tiny_bundle: Path, cards: list[Card], tmp_path: Path) -> None:
    from longclip_rt.formats.embeddings import load_embeddings

    outputs = []
    for devices in ((0,), (0, 1)):
        with Embedder.from_bundle(tiny_bundle, "auto", "auto", devices=devices) as embedder:
            assert embedder.backend.name == "tensorrt" and embedder.backend.precision == "fp16"
            before = [card.calls for card in cards]
            for card in cards:
                card.shapes.clear()  # of the self-check
            out = tmp_path / f"{len(devices)}.parquet"
            embed_files([FILES], out, embedder, EmbedOptions(batch_size=2))
            outputs.append(load_embeddings(out))
            lengths = {shape[1] for card in cards for shape in card.shapes if len(shape) == 2}
            assert len(lengths) > 1 and lengths <= {32, 77, 248}
    assert outputs[0].ids == outputs[1].ids
    np.testing.assert_allclose(outputs[0].vectors, outputs[1].vectors, atol=2e-3)
    assert outputs[0].metadata == outputs[1].metadata | {
        key: value for key, value in outputs[0].metadata.items() if key.endswith("fingerprint")
    }
    assert all(card.calls > calls for card, calls in zip(cards[1:], before[1:], strict=True))


def test_the_first_gpu_that_can_is_auto_and_why_not_is_told(
    tiny_bundle: Path, cards: list[Card], caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    bundle = load_bundle(tiny_bundle)
    Card.fails[0] = "no engine for this card"
    with caplog.at_level(logging.DEBUG, "longclip_rt"):
        assert open_backend(bundle).name == "openvino"
    assert "passed over: tensorrt: no engine for this card; tensorrt-rtx: no engine" in caplog.text
    with pytest.raises(BackendError, match="no engine for this card"):
        open_backend(bundle, "tensorrt")
    with pytest.raises(BackendError, match=r"No backend can .*openvino runs on the CPU, and GPUs were asked for"):
        open_backend(bundle, devices=[0])
    assert open_backend(bundle, devices=[1]).name == "tensorrt"


def test_a_gpu_that_fails_its_self_check_is_closed_and_passed_over(
    tiny_bundle: Path, cards: list[Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(tiny_bundle)
    prepare = Card.prepare

    def spoil(card: Card) -> None:
        card.wrong = card.number == 1
        prepare(card)

    monkeypatch.setattr(Card, "prepare", spoil)
    with pytest.raises(BackendError, match="fails its self-check"):
        open_backend(bundle, "tensorrt", devices=[0, 1])
    assert [card.closed for card in cards] == [1, 1]
    monkeypatch.setattr(Card, "stuck", True)
    with pytest.raises(BackendError, match="fails its self-check"):  # not that closing failed too
        open_backend(bundle, "tensorrt", devices=[0, 1])
    assert [card.closed for card in cards[2:]] == [1, 1]
    monkeypatch.setattr(Card, "stuck", False)
    with pytest.raises(BackendError, match=r"each once; got \[0, 0\]"):
        open_backend(bundle, "tensorrt", devices=[0, 0])
    with pytest.raises(BackendError, match=r"cannot be used.*runs on the CPU"):
        open_backend(bundle, "openvino", devices=[0])


def test_every_class_of_has_its_class() -> None:
    assert set(GPU_BACKENDS) < set(BACKENDS)
    from importlib import reload

    for name in GPU_BACKENDS:
        kind = reload(backends)._class_of(name)
        assert kind.name == name  # type: ignore[attr-defined]
