from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from longclip_rt.backends.base import Backend, Float32
from longclip_rt.backends.openvino import streams_for
from longclip_rt.bundle.bundle import load_bundle
from longclip_rt.opening import open_backend


class Watched(Backend):
    """Notes how many calls are inside a tower's first inference at once."""

    name = version = device = "watched"  # type: ignore[assignment]

    def __init__(self, path: Path) -> None:
        super().__init__(load_bundle(path), "fp32")
        self.inside = 0
        self.crowd: dict[str, list[int]] = {"text": [], "image": []}

    def _run(self, tower: str, inputs: NDArray[np.generic], outputs: Sequence[str]) -> list[Float32]:
        self.inside += 1
        self.crowd[tower].append(self.inside)
        time.sleep(0.05)
        self.inside -= 1
        return [np.zeros((len(inputs), self.bundle.architecture.embed_dim), np.float32)]

    def _close(self) -> None:
        pass


def test_the_first_inference_of_a_tower_is_made_by_one_thread_alone(tiny_bundle: Path) -> None:
    backend = Watched(tiny_bundle)
    size = backend.bundle.architecture.image_size
    barrier = threading.Barrier(4)

    def use(_: int) -> None:
        barrier.wait(10)
        backend.run("image", np.zeros((1, 3, size, size), np.float32))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(4)))
    assert backend.crowd["image"][0] == 1 and max(backend.crowd["image"]) > 1
    assert backend.crowd["image"][1] == 1  # the others began only when the first was done


@pytest.mark.parametrize(
    ("name", "loader"), [("openvino", "openvino.Core.compile_model"), ("onnxruntime", "onnxruntime.InferenceSession")]
)
def test_a_tower_is_loaded_when_it_is_first_needed(
    name: str, loader: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, attribute = loader.partition(".")
    owner: Any = importlib.import_module(module)
    for part in attribute.split(".")[:-1]:
        owner = getattr(owner, part)
    real, loaded = getattr(owner, attribute.split(".")[-1]), []

    def note(*arguments: Any, **options: Any) -> Any:
        loaded.extend(Path(one).name for one in arguments if isinstance(one, str) and one.endswith(".onnx"))
        return real(*arguments, **options)

    monkeypatch.setattr(loader, note)
    backend = open_backend(load_bundle(tiny_bundle), name, "fp32")
    assert loaded == [] and backend.concurrency >= 1
    size = backend.bundle.architecture.image_size
    for _ in range(2):
        backend.run("image", np.zeros((1, 3, size, size), np.float32))
    assert loaded == ["image.onnx"]
    backend.close()


def test_streams_are_one_a_thread_up_to_four() -> None:
    assert [streams_for(threads) for threads in (1, 2, 3, 4, 8, 16, 32)] == [1, 2, 3, 4, 4, 4, 8]
