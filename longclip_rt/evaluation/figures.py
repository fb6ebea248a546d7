"""Figures that are shares of hits, and how sure a difference between two of them is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
"""Resamples of the bootstrap."""

_INTERVAL = (2.5, 97.5)  # percent


@dataclass(frozen=True)
class Figure:
    """A share of hits over Q queries.

    Attributes:
        hits: float64 [Q], each from 0 to 1.
        units: int [Q]: queries of one unit are drawn together, for they are not independent: an image's captions.
    """

    hits: NDArray[np.float64]
    units: NDArray[np.int64]

    @property
    def share(self) -> float:
        """Their mean, from 0 to 1."""
        return float(self.hits.mean())


@dataclass(frozen=True)
class Difference:
    """How much a figure is above another one on the same queries, in points (hundredths).

    Attributes:
        points: The difference.
        low: Where the 95% bootstrap interval begins.
        high: Where it ends.
    """

    points: float
    low: float
    high: float


def difference(figure: Figure, base: Figure, seed: int = 0) -> Difference:
    """How much a figure is above `base`, with the percentile interval of a paired bootstrap over units.

    Args:
        figure: Of one model.
        base: Of another, on the same queries.
        seed: Of the resamples.
    """
    found = np.unique(figure.units, return_inverse=True)[1]
    count = int(found.max()) + 1
    sums = np.bincount(found, figure.hits - base.hits, count)  # [units]
    sizes = np.bincount(found, minlength=count)
    rng = np.random.default_rng(seed)
    draws = np.empty(DRAWS)
    for number in range(DRAWS):
        weights = np.bincount(rng.integers(count, size=count), minlength=count)
        draws[number] = weights @ sums / (weights @ sizes)
    low, high = np.percentile(draws, _INTERVAL) * 100
    return Difference(100 * (figure.share - base.share), float(low), float(high))


def differences(figures: Mapping[str, Figure], base: Mapping[str, Figure]) -> dict[str, Difference]:
    """The difference of each figure, by name."""
    return {name: difference(figure, base[name]) for name, figure in figures.items()}
