"""Sizes of IVF-PQ indexes: clusters, how many are looked into, and the bytes of a vector."""

from __future__ import annotations

import math

MIN_PQ_ROWS = 256
"""A product quantiser of 8 bits learns 256 centres, so it needs as many vectors at least."""

_ROWS_A_CLUSTER = 39  # k-means wants as many vectors for each
_DIMENSIONS_A_BYTE = 4


def clusters(rows: int) -> int:
    """Clusters that `rows` vectors are sorted into: four times the root, as far as there are enough vectors."""
    return max(1, min(4 * math.isqrt(rows), rows // _ROWS_A_CLUSTER))


def probes(count: int) -> int:
    """How many of so many clusters a search looks into: a tenth, and at least 16."""
    return min(count, max(16, count // 10))


def subvectors(dim: int) -> int:
    """Bytes that a vector of `dim` numbers is coded in: one for four numbers, where that goes."""
    return next(dim // size for size in (_DIMENSIONS_A_BYTE, 2, 1) if dim % size == 0)


def index_of(wanted: str, rows: int) -> str:
    """The index that `rows` vectors get: `flat` where there are too few for the one that is wanted."""
    return "flat" if wanted == "ivf-pq" and rows < MIN_PQ_ROWS else wanted
