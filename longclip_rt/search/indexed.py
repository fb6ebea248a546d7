"""Nearest neighbours by the index of a `.lance` or `.faiss` file: quick, and not always all of the nearest."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from longclip_rt.errors import InputError, OutputError
from longclip_rt.search.hits import Hit, unit_vector

if TYPE_CHECKING:
    from numpy.typing import NDArray


def approximate_index(metadata: dict[str, str]) -> str:
    """The index that a file is searched with, such as `hnsw`; empty where every vector is compared."""
    index = metadata.get("longclip_rt.index", "flat")
    return "" if index == "flat" else index


def search_index(
    path: str | Path,
    query: NDArray[np.floating],
    k: int,
    kinds: Collection[str] | None,
    metadata: dict[str, str],
) -> list[Hit]:
    """The `k` nearest rows that the index finds, best first.

    Args:
        path: A `.lance` table with an index, or a `.faiss` index that is not flat.
        query: Vector [D], any float type; it need not be normalised.
        k: Number of hits wanted.
        kinds: Only rows of these kinds; None means all.
        metadata: The file's.

    Raises:
        InputError: `k` is below 1, or `query` is not a finite vector of the stored length.
        OutputError: The file cannot be read.
        MissingExtraError: What reads it is not installed.
    """
    if k < 1:
        raise InputError(f"k is {k}; ask for at least 1 hit.")
    path, direction = Path(path), unit_vector(query)
    try:
        dim = int(metadata["longclip_rt.dim"])
        if len(direction) != dim:
            raise InputError(f"The query has {len(direction)} values and the vectors of {path} have {dim}.")
        if path.suffix == ".lance":
            return _in_lance(path, direction, k, kinds)
        return _in_faiss(path, direction, k, kinds, int(metadata["longclip_rt.rows"]), dim)
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{str(path)!r} is damaged: {error}. Make it again with: longclip-rt embed") from error


def _in_lance(path: Path, direction: NDArray[np.float64], k: int, kinds: Collection[str] | None) -> list[Hit]:
    from longclip_rt.formats.lance import lance_candidates

    found = lance_candidates(path, direction.astype(np.float32), k, kinds)
    scored = []
    for row, entry in found:
        vector = np.asarray(entry["embedding"], np.float64)
        score = float(np.float32(vector @ direction / max(float(np.linalg.norm(vector)), 1e-12)))
        scored.append((-score, row, entry["id"], entry["kind"]))
    return [Hit(rank, -negated, id_, kind, row) for rank, (negated, row, id_, kind) in enumerate(sorted(scored), 1)]


def _in_faiss(
    path: Path, direction: NDArray[np.float64], k: int, kinds: Collection[str] | None, rows: int, dim: int
) -> list[Hit]:
    from longclip_rt.formats.faiss import faiss_nearest

    ids = path.with_suffix(".ids.jsonl")
    among = None
    try:
        if kinds is not None:
            with ids.open("rb") as lines:
                chosen = [row for row, line in enumerate(lines) if json.loads(line)["kind"] in kinds]
            among = np.array(chosen, np.int64)
            if not chosen:
                return []
        found = dict(faiss_nearest(path, direction, k, among, rows, dim))
        with ids.open("rb") as lines:
            named = {row: json.loads(line) for row, line in enumerate(lines) if row in found}
    except OSError as error:
        raise OutputError(f"{str(ids)!r} cannot be read: {error.strerror or error}.") from error
    if named.keys() != found.keys():
        raise ValueError(f"{ids.name!r} lacks rows that the index has")
    best = sorted(found, key=lambda row: (-found[row], row))
    return [Hit(rank, found[row], named[row]["id"], named[row]["kind"], row) for rank, row in enumerate(best, start=1)]
