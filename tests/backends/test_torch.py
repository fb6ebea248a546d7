"""What is decided for a GPU, on the CPU: sizes, lengths, pieces; graphs are replaced by the towers themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import token_ids

from longclip_rt.backends.graph_weights import weights_of
from longclip_rt.backends.torch import SIZES, TorchBackend, _Static, padded_size, pieces
from longclip_rt.bundle.bundle import load_bundle
from longclip_rt.weights.checkpoint import load_checkpoint


def test_batches_are_padded_to_a_few_sizes_and_cut_to_the_largest() -> None:
    assert [padded_size(rows) for rows in (1, 2, 8, 9, 65, 256)] == [1, 8, 8, 32, 256, 256]
    assert pieces(3) == [slice(0, 3)]
    assert [piece.stop - piece.start for piece in pieces(2 * SIZES[-1] + 5)] == [SIZES[-1], SIZES[-1], 5]


class Uncaptured(TorchBackend):
    """Takes the GPU's way on the CPU, and notes the shapes that graphs would be captured for."""

    def __init__(self, path: Path) -> None:
        super().__init__(load_bundle(path), "fp32")
        self._on_gpu = True
        self.shapes: list[tuple[str, tuple[int, ...]]] = []

    _exact = contextlib.nullcontext  # type: ignore[assignment]

    def _captured(self, tower: str, example: NDArray[Any]) -> _Static:
        self.shapes.append((tower, example.shape))
        given = self._torch.from_numpy(example.copy())
        outputs: list[Any] = [None] * len(self.bundle.outputs(tower))

        def run() -> None:
            with self._torch.inference_mode():
                outputs[:] = self._towers[tower](given)

        return _Static(given, run, outputs)


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
    backend, plain = Uncaptured(tiny_bundle), TorchBackend(load_bundle(tiny_bundle), "fp32")
    names = plain.bundle.outputs(tower)
    for _ in range(2):  # the second time with what the first has left in the static memory
        for got, wanted in zip(backend.run(tower, inputs, names), plain.run(tower, inputs, names), strict=True):
            assert got.dtype == np.float32 and got.shape == wanted.shape
            if got.ndim == 2:
                np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert backend.shapes == [(tower, shape) for shape in shapes]


def test_the_weights_in_a_bundles_graphs_are_those_it_was_made_of(tiny_bundle: Path, tiny_weights: Path) -> None:
    state = load_checkpoint(tiny_weights).state_dict
    found = weights_of(load_bundle(tiny_bundle))
    assert set(found) == set(state) - {"logit_scale"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, state[name].numpy(), err_msg=name)
