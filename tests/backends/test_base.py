from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from longclip_rt.backends.base import Backend, Float32
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


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_the_thread_that_opens_a_backend_makes_its_first_inference(
    name: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    run = Backend.run

    def note(backend: Backend, tower: str, inputs: NDArray[np.generic], outputs: Sequence[str] | None = None) -> object:
        threads.append(threading.get_ident())
        return run(backend, tower, inputs, outputs)

    monkeypatch.setattr(Backend, "run", note)
    open_backend(load_bundle(tiny_bundle), name, "fp32").close()
    assert threads == [threading.get_ident()]
