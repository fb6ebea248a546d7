"""How much of a model an approximation keeps: of its vectors, of their neighbours, and of what is found first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import Float32
from longclip_rt.parity.limits import Check

TIE = 0.01
"""Of two candidates whose cosines differ by less than this in fp32, either may come first without a loss."""

MEAN, WORST, LOST = 0.01, 0.05, 0.1
"""The largest mean and single 1 - cosine, and the largest share of lost neighbours, that passes."""


@dataclass(frozen=True)
class Fidelity:
    """Of one tower's vectors against the same in fp32. Shares are 0 to 1.

    Attributes:
        count: Vectors compared.
        mean: Their mean cosine with fp32's.
        worst: The lowest.
        same_neighbour: Share of vectors whose nearest other vector is the same.
        lost_neighbour: Share of those whose nearest other vector is farther in fp32 by more than `TIE`.
        same_first: Share of vectors to which the same vector of the other tower is the nearest (R@1's agreement).
        lost_first: Share of those to which one is that is farther in fp32 by more than `TIE`.
    """

    count: int
    mean: float
    worst: float
    same_neighbour: float
    lost_neighbour: float
    same_first: float
    lost_first: float

    def to_dict(self) -> dict[str, float]:
        """Plain values for the manifest."""
        return {name: round(value, 6) for name, value in asdict(self).items()}

    def checks(self, runtime: str, precision: str, tower: str, trained: bool = True) -> Iterator[Check]:
        """What must hold, as lines of the gate's report; untrained towers' answers to one another mean nothing."""
        lines = [
            ("mean 1 - cosine", 1 - self.mean, MEAN),
            (f"{tower}_embeds: 1 - cosine", 1 - self.worst, WORST),
            ("share of lost neighbours", self.lost_neighbour, LOST),
        ]
        lines += [("share of lost first answers", self.lost_first, LOST)] if trained else []
        for name, value, limit in lines:
            yield Check(runtime, precision, tower, name, value, limit)


def cosines(got: Float32, expected: Float32) -> NDArray[np.float64]:
    """Of each pair of rows of two arrays of normalised vectors [N, D]."""
    found: NDArray[np.float64] = (got.astype(np.float64) * expected).sum(axis=1)
    return found


def fidelity(got: Mapping[str, Float32], expected: Mapping[str, Float32]) -> dict[str, Fidelity]:
    """Compares both towers' vectors with the same in fp32.

    Args:
        got: Tower -> normalised vectors [N, D], N at least 2.
        expected: The same inputs' in fp32.
    """
    found = {}
    for tower, other in (("text", "image"), ("image", "text")):
        near = cosines(got[tower], expected[tower])
        own = [_first(vectors[tower], vectors[tower], itself=False) for vectors in (expected, got)]
        across = [_first(vectors[tower], vectors[other], itself=True) for vectors in (expected, got)]
        found[tower] = Fidelity(
            len(near), float(near.mean()), float(near.min()),
            *_agreement(expected[tower] @ expected[tower].T, *own),
            *_agreement(expected[tower] @ expected[other].T, *across),
        )  # fmt: skip
    return found


def _first(queries: Float32, targets: Float32, itself: bool) -> NDArray[np.intp]:
    similarities = queries @ targets.T
    if not itself:
        np.fill_diagonal(similarities, -np.inf)
    first: NDArray[np.intp] = similarities.argmax(axis=1)
    return first


def _agreement(true: Float32, expected: NDArray[np.intp], got: NDArray[np.intp]) -> tuple[float, float]:
    """Shares of queries whose first answer is the same, and of those to which it is farther in `true` by a `TIE`."""
    rows = np.arange(len(true))
    loss = true[rows, expected] - true[rows, got]
    return float((got == expected).mean()), float((loss > TIE).mean())
