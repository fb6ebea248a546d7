"""What a search finds, and the query as a vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from longclip_rt.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Hit:
    """One stored embedding that was found.

    Attributes:
        rank: From 1.
        score: Cosine similarity with the query, in [-1, 1].
        id: The input line it came from.
        kind: "image" or "text".
        row: Its row in the file, from 0.
    """

    rank: int
    score: float
    id: str
    kind: str
    row: int


def unit_vector(query: NDArray[np.floating]) -> NDArray[np.float64]:
    """A query as a vector of length 1.

    Raises:
        InputError: It is not one finite vector other than zero.
    """
    vector = np.asarray(query, np.float64)
    norm = float(np.linalg.norm(vector)) if vector.ndim == 1 else 0.0
    if vector.ndim != 1 or not np.isfinite(norm) or norm == 0.0:
        raise InputError(f"The query must be one finite vector other than zero; its shape is {list(vector.shape)}.")
    return vector / norm
