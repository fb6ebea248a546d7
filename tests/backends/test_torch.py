"""What is decided for a GPU, on the CPU: sizes, lengths, pieces; graphs are replaced by the towers themselves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import token_ids

from longclip_rt.backends.graph_weights import weights_of
from longclip_rt.backends.torch import TorchBackend
from longclip_rt.backends.torch_graphs import SIZES, StaticTowers, padded_size, pieces
from longclip_rt.bundle.bundle import load_bundle
from longclip_rt.errors import BackendError
from longclip_rt.weights.checkpoint import load_checkpoint


def test_batches_are_padded_to_a_few_sizes_and_cut_to_the_largest() -> None:
    assert [padded_size(rows) for rows in (1, 2, 8, 9, 65, 256)] == [1, 8, 8, 32, 256, 256]
    assert pieces(3) == [slice(0, 3)]
    assert [piece.stop - piece.start for piece in pieces(2 * SIZES[-1] + 5)] == [SIZES[-1], SIZES[-1], 5]


class Uncaptured(StaticTowers):
    """Takes the GPU's way on the CPU, and notes the shapes that graphs would be captured for."""

    _exact = contextlib.nullcontext  # type: ignore[assignment]

    def _start(self) -> None:
        self.shapes: list[tuple[str, tuple[int, ...]]] = []

    def _captured(self, tower: str, given: Any) -> tuple[Callable[[], object], list[Any]]:
        self.shapes.append((tower, tuple(given.shape)))
        with self._torch.inference_mode():
            outputs = [output.clone() for output in self._towers[tower](given)]

        def run() -> None:
            with self._torch.inference_mode():
                for output, computed in zip(outputs, self._towers[tower](given), strict=True):
                    output.copy_(computed)

        return run, outputs

    def _pinned(self, like: Any) -> Any:
        return self._torch.zeros(like.shape, dtype=like.dtype)

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        with self._lock:
            yield

    def _recorded(self) -> Callable[[], object]:
        return lambda: None

    def _event(self) -> Any:
        return Moment(time.perf_counter())


@dataclass
class Moment:
    """In the place of a CUDA event."""

    at: float

    def elapsed_time(self, later: Moment) -> float:
        return 1e3 * (later.at - self.at)


def uncaptured(path: Path) -> tuple[TorchBackend, Uncaptured]:
    backend = TorchBackend(load_bundle(path), "fp32")
    backend._on_gpu = backend.takes_crops = True
    towers = {"text": backend._towers["text"], "image": backend._image_encoder()}
    names = {tower: backend.bundle.outputs(tower) for tower in towers}
    static = Uncaptured(backend._torch, backend._device, towers, names, backend.buckets)
    backend._static = static
    return backend, static


@pytest.mark.parametrize(
    ("tower", "make", "shapes"),
    [
        ("text", lambda: token_ids([3, 20, 9], width=20).numpy(), [(8, 32)]),
        ("text", lambda: token_ids([40, 7, 9, 11, 5, 6, 7, 8, 9], width=40).numpy(), [(32, 77)]),
        ("text", lambda: token_ids([5] * 300, width=9).numpy(), [(256, 32), (64, 32)]),
        ("image", lambda: np.random.default_rng(0).standard_normal((2, 3, 24, 24)).astype("f"), [(8, 3, 24, 24)]),
    ],
)
def test_padding_changes_no_vector(
    tiny_bundle: Path, tower: str, make: Callable[[], NDArray[Any]], shapes: list[tuple[int, ...]]
) -> None:
    inputs = make()
    backend, static = uncaptured(tiny_bundle)
    plain = TorchBackend(load_bundle(tiny_bundle), "fp32")
    names = plain.bundle.outputs(tower)
    for _ in range(2):  # the second time with what the first has left in the static memory
        for got, wanted in zip(backend.run(tower, inputs, names), plain.run(tower, inputs, names), strict=True):
            assert got.dtype == np.float32 and got.shape == wanted.shape
            if got.ndim == 2:
                np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert static.shapes == [(tower, shape) for shape in shapes]


def test_stages_are_told_apart_on_a_gpu_and_add_up(tiny_bundle: Path) -> None:
    backend, static = uncaptured(tiny_bundle)
    ids = token_ids([5] * 300, width=9).numpy()  # two pieces
    backend.timed("text", ids)
    started = time.perf_counter()
    seconds = backend.timed("text", ids)
    assert list(seconds) == ["copy in", "encoder", "copy out"]
    assert 0 < sum(seconds.values()) <= time.perf_counter() - started
    assert static.shapes == [("text", (256, 32)), ("text", (64, 32))]
    assert list(TorchBackend(load_bundle(tiny_bundle), "fp32").timed("text", ids)) == ["encoder"]


def test_crops_become_the_same_pixels_where_the_tower_runs(tiny_bundle: Path) -> None:
    backend, static = uncaptured(tiny_bundle)
    crops = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)
    seen = []
    backend._towers["image"] = lambda pixels: seen.append(pixels.numpy().copy()) or [pixels]
    backend._image_encoder()(backend._torch.from_numpy(crops))
    np.testing.assert_array_equal(seen[0], backend.bundle.transform.normalize(crops))
    plain = TorchBackend(load_bundle(tiny_bundle), "fp32")
    assert plain.images(crops).dtype == np.float32 and backend.images(crops) is crops
    got, wanted = backend.run("image", crops)[0], plain.run("image", plain.images(crops))[0]
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert static.shapes == [("image", (8, 24, 24, 3))]
    with pytest.raises(BackendError, match=r"Crops must be \[batch, 24, 24, 3\]"):
        backend.run("image", crops[:, :20])
    with pytest.raises(BackendError, match="Pixels must be"):
        plain.run("image", crops)


def test_threads_that_share_static_memory_get_their_own_vectors(tiny_bundle: Path) -> None:
    backend, _ = uncaptured(tiny_bundle)
    batches = [token_ids([5 + index % 20, 30], width=32, seed=index).numpy() for index in range(24)]
    alone = [backend.run("text", ids)[0] for ids in batches]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda ids: backend.run("text", ids)[0], batches))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_backend_on_the_cpu_says_that_it_takes_no_tensors_of_a_gpu(tiny_bundle: Path) -> None:
    backend = TorchBackend(load_bundle(tiny_bundle), "fp32")
    with pytest.raises(BackendError, match="takes numpy arrays"):
        backend.run_on_device("text", backend._torch.ones((1, 3)))


def test_the_weights_in_a_bundles_graphs_are_those_it_was_made_of(tiny_bundle: Path, tiny_weights: Path) -> None:
    state = load_checkpoint(tiny_weights).state_dict
    found = weights_of(load_bundle(tiny_bundle))
    assert set(found) == set(state) - {"logit_scale"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, state[name].numpy(), err_msg=name)
