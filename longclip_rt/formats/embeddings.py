"""Reads embeddings back, in one piece or in chunks, from any of the formats that `embed` writes."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longclip_rt.errors import InputError, OutputError
from longclip_rt.system.files import path_from_argument

_MARK = "longclip_rt.fingerprint"


@dataclass(frozen=True)
class Embeddings:
    """Rows of an embeddings file.

    Attributes:
        ids: The input lines.
        kinds: "image" or "text" for each row.
        vectors: float32 or float16 [n, D], L2-normalised.
        metadata: The file's metadata, keys as stored (`longclip_rt.bundle`...).
    """

    ids: list[str]
    kinds: list[str]
    vectors: np.ndarray
    metadata: dict[str, str]


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of an embeddings file, without its rows.

    Raises:
        OutputError: When the file is absent, damaged, or was not written by `longclip-rt embed`.
    """
    path = _path(path)
    try:
        path.stat()  # Arrow's message on an absent file is long.
        if path.suffix == ".parquet":
            metadata = _metadata_from_parquet(path)
        elif path.suffix == ".lance":
            metadata = _metadata_from_lance(path)
        elif path.suffix in (".npy", ".jsonl", ".faiss"):
            metadata = _metadata_beside(path)
        else:
            raise _refusal(path, f"its name should end with {', '.join(list(_READERS)[:-1])} or {list(_READERS)[-1]}")
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise _refusal(path, f"its metadata are not UTF-8 ({error})") from error
    if _MARK not in metadata:
        raise _refusal(path, "it does not carry the metadata of one")
    return metadata


def iter_embeddings(path: str | Path, chunk_rows: int = 8192) -> Iterator[Embeddings]:
    """Reads an embeddings file in pieces, in order and in memory that does not grow with the file.

    Args:
        path: `.parquet`, `.lance`, `.npy` or `.faiss` (with `.ids.jsonl` and `.meta.json`), or `.jsonl` (with its
            `.meta.json`).
        chunk_rows: Most rows in a piece.

    Raises:
        OutputError: When the file is absent, damaged, or was not written by `longclip-rt embed`.
        InputError: When `chunk_rows` is below 1.
    """
    if chunk_rows < 1:
        raise InputError(f"chunk_rows must be at least 1; got {chunk_rows}.")
    path = _path(path)
    metadata = read_metadata(path)
    reader = _READERS[path.suffix]
    found = 0
    try:
        rows, dim = int(metadata["longclip_rt.rows"]), int(metadata["longclip_rt.dim"])
        for ids, kinds, vectors in reader(path, chunk_rows, dim, metadata):
            found += len(ids)
            if not all(type(each) is str for each in itertools.chain(ids, kinds)):
                raise ValueError("a row's id or kind is no text")
            yield Embeddings(ids, kinds, _checked(vectors, len(ids), metadata), metadata)
        if found != rows:
            raise ValueError(f"there are {found} rows in place of {rows}")
    except _damage() as error:
        if isinstance(error, OSError) and error.errno is not None:  # Arrow's have none: a page without its checksum
            raise OutputError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
        raise OutputError(f"{str(path)!r} is damaged: {error}. Make it again with: longclip-rt embed") from error


def load_embeddings(path: str | Path) -> Embeddings:
    """Reads a whole embeddings file.

    Raises:
        OutputError: When the file is absent, damaged, or was not written by `longclip-rt embed`.
    """
    metadata = read_metadata(path)
    try:
        rows, dim = int(metadata["longclip_rt.rows"]), int(metadata["longclip_rt.dim"])
        vectors = np.empty((rows, dim), dtype=metadata["longclip_rt.dtype"])
    except (KeyError, ValueError, TypeError) as error:
        raise _refusal(Path(path), f"its metadata is incomplete ({error})") from error
    except MemoryError as error:
        raise OutputError(f"{str(path)!r} has {rows} rows of {dim} numbers, more than the memory can hold.") from error
    ids: list[str] = []
    kinds: list[str] = []
    for chunk in iter_embeddings(path):
        if len(ids) + len(chunk.ids) > rows:
            raise _refusal(Path(path), f"it holds more rows than the {rows} it should")
        vectors[len(ids) : len(ids) + len(chunk.ids)] = chunk.vectors
        ids += chunk.ids
        kinds += chunk.kinds
    return Embeddings(ids, kinds, vectors, metadata)


def _path(given: str | Path) -> Path:
    return path_from_argument(given, "An embeddings file", OutputError)


def _damage() -> tuple[type[Exception], ...]:
    """What readers raise at a damaged file; Arrow's own errors without importing Arrow where nothing else did."""
    arrow = sys.modules.get("pyarrow")
    own = () if arrow is None else (arrow.ArrowException,)
    return (OSError, KeyError, ValueError, TypeError, RecursionError, *own)


def _refusal(path: Path, reason: str) -> OutputError:
    return OutputError(
        f"{str(path)!r} is no embeddings file of this package: {reason}. Make one with: longclip-rt embed"
    )


def _metadata_from_parquet(path: Path) -> dict[str, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        stored = pq.read_metadata(path).metadata or {}
    except pa.ArrowException as error:
        raise _refusal(path, f"it cannot be read as Parquet ({error})") from error
    # Arrow's own key, the schema, is of no use here.
    return {key.decode(): value.decode() for key, value in stored.items() if key.startswith(b"longclip_rt.")}


def _metadata_from_lance(path: Path) -> dict[str, str]:
    from longclip_rt.formats.lance import lance_metadata

    try:
        return lance_metadata(path)
    except ValueError as error:
        raise _refusal(path, f"it cannot be read as a Lance table ({error})") from error


def _metadata_beside(path: Path) -> dict[str, str]:
    meta = path.with_suffix(".meta.json")
    try:
        stored = json.loads(meta.read_bytes())
    except FileNotFoundError as error:
        raise _refusal(path, f"{meta.name!r} is not beside it") from error
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"{meta.name!r} is not JSON ({error})") from error
    if not isinstance(stored, dict) or stored.get("longclip_rt.format") != path.suffix:
        raise _refusal(path, f"{meta.name!r} beside it belongs to another file")
    return {str(key): str(value) for key, value in stored.items()}


def _checked(vectors: np.ndarray, rows: int, metadata: dict[str, str]) -> np.ndarray:
    """The vectors of some rows, if they are what the metadata say."""
    expected = (rows, int(metadata["longclip_rt.dim"]))
    if vectors.shape != expected or vectors.dtype != np.dtype(metadata["longclip_rt.dtype"]):
        wanted = f"{list(expected)} {metadata['longclip_rt.dtype']}"
        raise ValueError(f"there are vectors {list(vectors.shape)} {vectors.dtype} in place of {wanted}")
    return vectors


_Chunks = Iterator[tuple[list[str], list[str], np.ndarray]]


def _chunks_from_parquet(path: Path, chunk_rows: int, dim: int, metadata: dict[str, str]) -> _Chunks:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as table:
        for batch in table.iter_batches(batch_size=chunk_rows, columns=["id", "kind", "embedding"]):
            yield _rows_of(batch, dim)


def _rows_of(batch: Any, dim: int) -> tuple[list[str], list[str], np.ndarray]:
    import pyarrow as pa

    vectors = batch.column("embedding")
    # flatten() leaves nulls out, and so would shift the rows after one; and not .values: a batch may be a slice of its
    # row group.
    kind = vectors.type
    if not (pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise ValueError(f"the column 'embedding' holds {kind}")
    flat = vectors.flatten()
    widths = [kind.list_size] if hasattr(kind, "list_size") else vectors.value_lengths().to_pylist()
    if vectors.null_count or flat.null_count or any(width != dim for width in widths):
        raise ValueError(f"a row has no vector of {dim} numbers")
    matrix = flat.to_numpy(zero_copy_only=False).reshape(len(vectors), dim)
    return batch.column("id").to_pylist(), batch.column("kind").to_pylist(), matrix


def _chunks_from_lance(path: Path, chunk_rows: int, dim: int, metadata: dict[str, str]) -> _Chunks:
    from longclip_rt.formats.lance import lance_batches

    for batch in lance_batches(path, chunk_rows):
        for start in range(0, batch.num_rows, chunk_rows):
            yield _rows_of(batch.slice(start, chunk_rows), dim)


def _chunks_from_npy(path: Path, chunk_rows: int, dim: int, metadata: dict[str, str]) -> _Chunks:
    vectors, header = _mapped(path, int(metadata["longclip_rt.rows"]), dim, metadata["longclip_rt.dtype"])
    ids = path.with_suffix(".ids.jsonl")
    numbers, words = hashlib.sha256(header), hashlib.sha256()
    with ids.open("rb") as lines:
        for start in range(0, len(vectors), chunk_rows):
            piece = np.array(vectors[start : start + chunk_rows])
            numbers.update(piece.data)
            rows = [json.loads(line) for line in _hashed(itertools.islice(lines, len(piece)), words)]
            if len(rows) != len(piece):
                raise ValueError(f"there are {start + len(rows)} ids for {len(vectors)} vectors")
            yield [row["id"] for row in rows], [row["kind"] for row in rows], piece
        if lines.read(1):
            raise ValueError(f"there are more ids than the {len(vectors)} vectors")
    _hold(numbers, metadata, "sha256", path)
    _hold(words, metadata, "ids_sha256", ids)


def _chunks_from_faiss(path: Path, chunk_rows: int, dim: int, metadata: dict[str, str]) -> _Chunks:
    from longclip_rt.formats.faiss import faiss_vectors

    if metadata["longclip_rt.index"] == "ivf-pq":
        raise OutputError(
            f"{str(path)!r} is an IVF-PQ index, which holds codes and not the vectors: it can only be searched. Embed "
            "to .parquet for the vectors."
        )
    rows = int(metadata["longclip_rt.rows"])
    _hold_file(path, metadata)
    words, start = hashlib.sha256(), 0
    ids = path.with_suffix(".ids.jsonl")
    with ids.open("rb") as lines:
        for piece in faiss_vectors(path, chunk_rows, rows, dim, metadata["longclip_rt.dtype"]):
            found = [json.loads(line) for line in _hashed(itertools.islice(lines, len(piece)), words)]
            start += len(found)
            if len(found) != len(piece):
                raise ValueError(f"there are {start} ids for {rows} vectors")
            yield [row["id"] for row in found], [row["kind"] for row in found], piece
        if lines.read(1):
            raise ValueError(f"there are more ids than the {rows} vectors")
    _hold(words, metadata, "ids_sha256", ids)


def _hold_file(path: Path, metadata: dict[str, str]) -> None:
    with path.open("rb") as stream:
        _hold(hashlib.file_digest(stream, "sha256"), metadata, "sha256", path)


def _hashed(lines: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    """The lines, which join the digest as they pass."""
    for line in lines:
        digest.update(line)
        yield line


def _hold(digest: Any, metadata: dict[str, str], name: str, path: Path) -> None:
    """A file that was read against its hash, which files of older versions do not have."""
    expected = metadata.get("longclip_rt." + name)
    if expected is not None and digest.hexdigest() != expected:
        raise ValueError(f"{path.name!r} was changed after it was written")


def _mapped(path: Path, rows: int, dim: int, dtype: str) -> tuple[np.ndarray, bytes]:
    """The vectors [rows, dim] of a .npy file, and its header, which must be the one that was written, byte for byte:
    another would place the numbers elsewhere."""
    kind = np.dtype(dtype).newbyteorder("<")
    expected = io.BytesIO()
    header = {"descr": kind.str, "fortran_order": False, "shape": (rows, dim)}
    np.lib.format.write_array_header_1_0(expected, header)
    start = len(expected.getvalue())
    with path.open("rb") as stream:
        found = stream.read(start)
    if found != expected.getvalue() or path.stat().st_size != start + rows * dim * kind.itemsize:
        raise ValueError(f"it is not the array of {rows} vectors of {dim} numbers that was written")
    return np.memmap(path, kind, "r", start, (rows, dim)) if rows else np.empty((0, dim), dtype), found


def _chunks_from_jsonl(path: Path, chunk_rows: int, dim: int, metadata: dict[str, str]) -> _Chunks:
    rows: list[dict[str, Any]] = []
    dtype = metadata["longclip_rt.dtype"]

    def chunk() -> tuple[list[str], list[str], np.ndarray]:
        vectors = [row["embedding"] for row in rows]
        if any(not set(map(type, vector)) <= {float, int} for vector in vectors):  # numpy reads strings and `true` too
            raise ValueError("a row's vector does not hold numbers alone")
        return [row["id"] for row in rows], [row["kind"] for row in rows], np.array(vectors, dtype)

    digest = hashlib.sha256()
    with path.open("rb") as lines:
        for line in _hashed(lines, digest):
            rows.append(json.loads(line))
            if len(rows) == chunk_rows:
                yield chunk()
                rows = []
    if rows:
        yield chunk()
    _hold(digest, metadata, "sha256", path)


_READERS = {
    ".parquet": _chunks_from_parquet,
    ".npy": _chunks_from_npy,
    ".jsonl": _chunks_from_jsonl,
    ".lance": _chunks_from_lance,
    ".faiss": _chunks_from_faiss,
}
