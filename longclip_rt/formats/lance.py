"""Lance tables: a folder `x.lance` that Lance and LanceDB open, with an IVF-PQ index on request."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longclip_rt.errors import OutputError
from longclip_rt.formats.ivf import clusters, probes, subvectors
from longclip_rt.system.extras import require
from longclip_rt.system.files import sync_file, sync_folder

# How many times k candidates are ranked again by their whole vectors.
_REFINE = 10
_BATCH_ROWS = 8192


def is_lance(path: Path) -> bool:
    """Whether a folder is a Lance table."""
    return (path / "_versions").is_dir()


def write_lance(folder: Path, tables: Iterable[Any], schema: Any, *, rows: int, dim: int, index: str) -> None:
    """Writes a table into a folder that does not exist yet, synced.

    Args:
        folder: Its name ends with `.lance`.
        tables: Arrow tables of `schema`.
        schema: With the metadata.
        rows: Of all tables together.
        dim: Length of a vector.
        index: `flat` for none, or `ivf-pq`.

    Raises:
        MissingExtraError: pylance is not installed.
        OutputError: Lance cannot write.
    """
    import pyarrow as pa

    lance: Any = require("lance", "lance")
    batches = (batch for table in tables for batch in table.to_batches(max_chunksize=_BATCH_ROWS))
    try:
        dataset = lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches), str(folder))
        if index == "ivf-pq":
            dataset.create_index(
                "embedding",
                "IVF_PQ",
                metric="cosine",
                num_partitions=clusters(rows),
                num_sub_vectors=subvectors(dim),
            )
    except (RuntimeError, ValueError) as error:
        raise OutputError(f"{str(folder)!r} cannot be written: {_first_line(error)}.") from error
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as stream:
                sync_file(stream)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A table; what Lance raises in the block is a `ValueError`, whose message is one line."""
    lance: Any = require("lance", "lance")
    try:
        yield lance.dataset(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    """Without the place in Lance's own sources that its messages end with."""
    return re.sub(r", \S+\.rs:\d+.*", "", str(error).partition("\n")[0]).rstrip(".")


def lance_metadata(path: Path) -> dict[str, str]:
    """The metadata of a table's schema.

    Raises:
        ValueError: It cannot be read.
        MissingExtraError: pylance is not installed.
    """
    with _opened(path) as dataset:
        stored: Mapping[bytes, bytes] = dataset.schema.metadata or {}
    return {key.decode(): value.decode() for key, value in stored.items()}


def lance_batches(path: Path, chunk_rows: int) -> Iterator[Any]:
    """The columns id, kind and embedding in record batches, in order.

    Raises:
        ValueError: It cannot be read.
    """
    with _opened(path) as dataset:
        yield from dataset.to_batches(columns=["id", "kind", "embedding"], batch_size=chunk_rows)


def lance_candidates(path: Path, query: np.ndarray, k: int, kinds: Collection[str] | None) -> list[tuple[int, Any]]:
    """The rows that the index finds, with their whole vectors, to be ranked.

    Args:
        path: A table with an index.
        query: float32 [D].
        k: How many are wanted.
        kinds: Only rows of these; None: all.

    Returns:
        Row numbers, each with its row as a dictionary: id, kind, embedding.

    Raises:
        ValueError: It cannot be read.
    """
    with _opened(path) as dataset:
        wanted = " or ".join(f"kind = '{kind}'" for kind in sorted(kinds or ()))
        total = dataset.count_rows()
        found = dataset.to_table(
            columns=["id", "kind", "embedding", "_distance"],
            nearest={
                "column": "embedding",
                "q": query,
                "k": min(k, total),
                "nprobes": probes(clusters(total)),
                "refine_factor": _REFINE,
            },
            filter=wanted or None,
            prefilter=True,
            with_row_id=True,
        )
        starts, start = {}, 0
        for fragment in dataset.get_fragments():
            starts[fragment.fragment_id] = start
            start += fragment.count_rows()
    # A row's id is its fragment's number and, in the lower half, its place in it.
    return [(starts[row["_rowid"] >> 32] + (row["_rowid"] & 0xFFFFFFFF), row) for row in found.to_pylist()]
