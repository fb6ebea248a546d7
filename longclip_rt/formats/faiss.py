"""FAISS indexes: `x.faiss` with inner products of normalised vectors; flat, HNSW or IVF-PQ; ids stand beside it.

FAISS builds an index in memory: all vectors for `flat` and `hnsw`, a byte for four numbers for `ivf-pq`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from longclip_rt.errors import OutputError
from longclip_rt.formats.ivf import clusters, probes, subvectors
from longclip_rt.system.extras import require

_LINKS = 32  # of each vector to its neighbours in HNSW
_BREADTH = 64  # how many candidates a search in HNSW keeps
_TRAINING_ROWS = 1 << 18


def write_faiss(
    path: Path, vectors: Callable[[], Iterable[np.ndarray]], *, rows: int, dim: int, dtype: str, index: str
) -> None:
    """Builds an index and writes it.

    Args:
        path: The file.
        vectors: Gives pieces [n, dim], anew at each call: an IVF-PQ index learns from a sample first.
        rows: Of all pieces together.
        dim: Length of a vector.
        dtype: `float16` stores halves in `flat` and `hnsw`.
        index: `flat`, `hnsw` or `ivf-pq`.

    Raises:
        MissingExtraError: faiss is not installed.
        OutputError: The disk refuses.
    """
    faiss: Any = require("faiss", "faiss")
    stored = "SQfp16" if dtype == "float16" else "Flat"
    # "np" is no polysemous training: minutes, for a filter by Hamming distances that nothing here uses.
    described = {
        "flat": stored,
        "hnsw": f"HNSW{_LINKS},{stored}",
        "ivf-pq": f"IVF{clusters(rows)},PQ{subvectors(dim)}x8np",
    }[index]
    built = faiss.index_factory(dim, described, faiss.METRIC_INNER_PRODUCT)
    if index == "ivf-pq":
        for quantiser in (built.cp, built.pq.cp):
            quantiser.min_points_per_centroid = 1  # its warnings go past every log
        built.train(_sample(vectors(), rows))
    for piece in vectors():
        built.add(np.ascontiguousarray(piece, np.float32))
    try:
        faiss.write_index(built, str(path))
    except RuntimeError as error:
        raise OutputError(f"{str(path)!r} cannot be written: {_reason(error)}.") from error


def _sample(pieces: Iterable[np.ndarray], rows: int) -> np.ndarray:
    """Vectors at equal distances, float32."""
    step, start, taken = -(-rows // _TRAINING_ROWS), 0, []
    for piece in pieces:
        taken.append(piece[-start % step :: step])
        start += len(piece)
    return np.ascontiguousarray(np.concatenate(taken), np.float32)


def _reason(error: RuntimeError) -> str:
    """What went wrong, without the place in FAISS's source."""
    return str(error).rpartition("Error: ")[2].partition("\n")[0]


def _read(path: Path, rows: int, dim: int) -> Any:
    """An index, mapped into memory.

    Raises:
        ValueError: It is damaged, or another one than was written.
        MissingExtraError: faiss is not installed.
    """
    faiss: Any = require("faiss", "faiss")
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ValueError(_reason(error)) from error
    if (index.ntotal, index.d) != (rows, dim):
        raise ValueError(f"the index has {index.ntotal} vectors of {index.d} numbers in place of {rows} of {dim}")
    return index


def faiss_vectors(path: Path, chunk_rows: int, rows: int, dim: int, dtype: str) -> Iterator[np.ndarray]:
    """The vectors [n, dim] of a `flat` or `hnsw` index in order.

    Raises:
        ValueError: It is damaged.
    """
    index = _read(path, rows, dim)
    for start in range(0, rows, chunk_rows):
        vectors: np.ndarray = index.reconstruct_n(start, min(chunk_rows, rows - start))
        yield vectors.astype(dtype, copy=False)


def faiss_nearest(
    path: Path, query: np.ndarray, k: int, among: np.ndarray | None, rows: int, dim: int
) -> list[tuple[int, float]]:
    """The rows that an `hnsw` or `ivf-pq` index finds, best first, with their scores.

    Args:
        path: The index.
        query: float32 [dim], normalised.
        k: How many are wanted.
        among: Rows that count, int64 [n]; None: all.
        rows: Of the index.
        dim: Length of a vector.

    Raises:
        ValueError: It is damaged.
    """
    faiss: Any = require("faiss", "faiss")
    index = _read(path, rows, dim)
    chosen = None if among is None else faiss.IDSelectorBatch(among)
    if isinstance(index, faiss.IndexIVF):
        parameters = faiss.SearchParametersIVF(sel=chosen, nprobe=probes(index.nlist))
    else:
        parameters = faiss.SearchParametersHNSW(sel=chosen, efSearch=max(_BREADTH, 2 * k))
    scores, found = index.search(np.ascontiguousarray(query, np.float32)[None], min(k, rows), params=parameters)
    return [(row, score) for row, score in zip(found[0].tolist(), scores[0].tolist(), strict=True) if row >= 0]
