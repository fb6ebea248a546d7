"""The embeddings file: `.parquet`, `.npy` with ids, `.jsonl`, `.lance` or `.faiss`, assembled from shards.

But for `.faiss`, they are never held all at once. But for `.lance`, equal shards and metadata give equal bytes: nothing
here writes a time, a host or a random number.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from longclip_rt.errors import OutputError
from longclip_rt.formats.embeddings import Embeddings, iter_embeddings, load_embeddings, read_metadata
from longclip_rt.formats.faiss import write_faiss
from longclip_rt.formats.ivf import MIN_PQ_ROWS, index_of
from longclip_rt.formats.lance import write_lance
from longclip_rt.system.files import sync_file

__all__ = [
    "DTYPES",
    "FORMATS",
    "INDEXES",
    "PREFIX",
    "Embeddings",
    "OutputFiles",
    "iter_embeddings",
    "json_line",
    "load_embeddings",
    "read_metadata",
    "table_from_rows",
    "write_output",
    "write_table",
]

logger = logging.getLogger("longclip_rt")

FORMATS = (".parquet", ".npy", ".jsonl", ".lance", ".faiss")
INDEXES = {".lance": ("flat", "ivf-pq"), ".faiss": ("flat", "hnsw", "ivf-pq")}
"""What `.lance` and `.faiss` can be searched with; `flat` compares with every vector."""

NAMES = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
DTYPES = ("float32", "float16")
PREFIX = "longclip_rt."
# Digits that bring every value of the type back exactly.
_DIGITS = {"float32": 9, "float16": 5}


@dataclass(frozen=True)
class OutputFiles:
    """Names of the files that make up one output.

    Attributes:
        main: The file that was asked for; `.lance` is a folder.
        ids: `<stem>.ids.jsonl`, beside `.npy` and `.faiss`.
        meta: `<stem>.meta.json`, beside `.npy`, `.jsonl` and `.faiss`.
        rejects: `<main>.rejects.jsonl`, when there are any.
    """

    main: Path
    ids: Path | None
    meta: Path | None
    rejects: Path

    @staticmethod
    def from_path(main: Path) -> OutputFiles:
        """The files that belong to `main`.

        Raises:
            OutputError: When its suffix names none of `FORMATS`.
        """
        suffix = main.suffix
        if suffix not in FORMATS:
            raise OutputError(f"{str(main)!r} ends with {suffix!r}. The output is {NAMES}.")
        return OutputFiles(
            main,
            main.with_suffix(".ids.jsonl") if suffix in (".npy", ".faiss") else None,
            main.with_suffix(".meta.json") if suffix not in (".parquet", ".lance") else None,
            main.with_name(main.name + ".rejects.jsonl"),
        )

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file, the main one last: once it has its name, so have the others."""
        return tuple(path for path in (self.ids, self.meta, self.rejects, self.main) if path is not None)


def json_line(value: Mapping[str, Any]) -> bytes:
    """One line of JSON Lines in UTF-8; what UTF-8 cannot hold (file names in other encodings) is escaped."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def schema(dim: int, dtype: str) -> Any:
    """The columns of an output: id, kind, embedding (fixed-size list of `dim`), tokens, truncated."""
    import pyarrow as pa

    element = pa.field("element", pa.float16() if dtype == "float16" else pa.float32())
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("kind", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(element, dim)),
            pa.field("tokens", pa.int32()),
            pa.field("truncated", pa.bool_()),
        ]
    )


def table_from_rows(
    ids: list[str], kinds: list[str], vectors: np.ndarray, tokens: np.ndarray, truncated: np.ndarray
) -> Any:
    """The Arrow table of some rows.

    Args:
        ids: One for each row.
        kinds: "image" or "text".
        vectors: float32 or float16 [n, D].
        tokens: int32 [n], before truncation; ignored for images.
        truncated: bool [n]; ignored for images.
    """
    import pyarrow as pa

    columns = schema(vectors.shape[1], str(vectors.dtype))
    image = np.array([kind == "image" for kind in kinds], dtype=bool)
    flat = pa.array(vectors.reshape(-1), type=columns.field("embedding").type.value_type)
    return pa.Table.from_arrays(
        [
            pa.array(ids, pa.string()),
            pa.array(kinds, pa.string()),
            pa.FixedSizeListArray.from_arrays(flat, type=columns.field("embedding").type),
            pa.array(tokens, pa.int32(), mask=image),
            pa.array(truncated, pa.bool_(), mask=image),
        ],
        schema=columns,
    )


def _parquet_writer(stream: BinaryIO, columns: Any) -> Any:
    """A Parquet writer for `columns`; floats are stored plain, since they do not compress and readers can map them.
    Every page carries its checksum."""
    import pyarrow.parquet as pq

    return pq.ParquetWriter(
        stream,
        columns,
        use_dictionary=["kind"],
        compression={"id": "zstd", "kind": "zstd", "tokens": "zstd", "truncated": "zstd"},
        write_statistics=["kind", "tokens", "truncated"],
        write_page_checksum=True,
    )


def write_table(stream: BinaryIO, table: Any) -> None:
    """Writes one table as Parquet with one row group."""
    with _parquet_writer(stream, table.schema) as writer:
        writer.write_table(table, row_group_size=max(1, table.num_rows))


def write_output(
    folder: Path,
    files: OutputFiles,
    tables: Iterable[Any],
    *,
    rows: int,
    dim: int,
    dtype: str,
    metadata: Mapping[str, str],
    index: str = "flat",
) -> None:
    """Writes the files of an output, without the rejects, under their own names into `folder`, synced.

    Args:
        folder: An existing folder.
        files: Names to write; only the last component is used.
        tables: Shards in order, each like `table_from_rows`; read twice for an IVF-PQ index of FAISS.
        rows: Rows of all tables together.
        dim: Length of a vector.
        dtype: "float32" or "float16".
        metadata: Keys without `PREFIX`.
        index: One of `INDEXES`, for `.lance` and `.faiss`; the metadata name the one that was built.

    Raises:
        OSError: When the disk refuses.
        OutputError: A library that writes says so.
        MissingExtraError: It is not installed.
    """
    stored = {PREFIX + key: value for key, value in metadata.items()}
    if files.main.suffix in INDEXES:
        built = index_of(index, rows)
        if built != index:
            logger.warning("%d rows are too few for %s, which takes %d: written as %s", rows, index, MIN_PQ_ROWS, built)
        stored |= {PREFIX + "index": built}
        _write_store(folder, files, tables, rows, dim, dtype, stored)
    else:
        _write_file(folder, files, tables, rows, dim, dtype, stored)
    if files.meta is None:
        return
    stored |= {PREFIX + "sha256": _hash(folder / files.main.name)}
    if files.ids is not None:
        stored |= {PREFIX + "ids_sha256": _hash(folder / files.ids.name)}
    with (folder / files.meta.name).open("wb") as stream:
        stream.write(json.dumps(stored, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        sync_file(stream)


def _write_store(
    folder: Path,
    files: OutputFiles,
    tables: Iterable[Any],
    rows: int,
    dim: int,
    dtype: str,
    stored: Mapping[str, str],
) -> None:
    """A Lance table, or a FAISS index with its ids."""
    target, index = folder / files.main.name, stored[PREFIX + "index"]
    if files.ids is None:
        columns = schema(dim, dtype).with_metadata(_encoded(stored))
        write_lance(target, tables, columns, rows=rows, dim=dim, index=index)
        return

    def vectors() -> Iterable[np.ndarray]:
        return (_vectors(table, dtype, dim) for table in tables)

    write_faiss(target, vectors, rows=rows, dim=dim, dtype=dtype, index=index)
    with target.open("rb") as stream:
        sync_file(stream)
    with (folder / files.ids.name).open("wb") as ids:
        for table in tables:
            _write_ids(ids, table)
        sync_file(ids)


def _write_file(
    folder: Path,
    files: OutputFiles,
    tables: Iterable[Any],
    rows: int,
    dim: int,
    dtype: str,
    stored: Mapping[str, str],
) -> None:
    with (folder / files.main.name).open("wb") as stream:
        if files.main.suffix == ".parquet":
            _write_parquet(stream, tables, dim, dtype, stored)
        elif files.main.suffix == ".jsonl":
            for table in tables:
                _write_json_rows(stream, table, dtype, dim)
        else:
            assert files.ids is not None
            with (folder / files.ids.name).open("wb") as ids:
                _write_npy(stream, ids, tables, rows, dim, dtype)
                sync_file(ids)
        sync_file(stream)


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _encoded(metadata: Mapping[str, str]) -> dict[bytes, bytes]:
    return {key.encode(): value.encode("utf-8", "backslashreplace") for key, value in metadata.items()}


def _write_parquet(stream: BinaryIO, tables: Iterable[Any], dim: int, dtype: str, metadata: Mapping[str, str]) -> None:
    """One row group a shard."""
    with _parquet_writer(stream, schema(dim, dtype).with_metadata(_encoded(metadata))) as writer:
        for table in tables:
            if table.num_rows:
                writer.write_table(table, row_group_size=table.num_rows)


def _vectors(table: Any, dtype: str, dim: int) -> np.ndarray:
    """The embedding column as an array [n, D]."""
    flat = table.column("embedding").combine_chunks().flatten()
    return np.asarray(flat.to_numpy(zero_copy_only=False), dtype=dtype).reshape(-1, dim)


def _write_json_rows(stream: BinaryIO, table: Any, dtype: str, dim: int) -> None:
    """One object a row; numbers have as many digits as bring the vector back exactly."""
    layout = "[" + ", ".join([f"%.{_DIGITS[dtype]}g"] * dim) + "]"
    rows = table.drop_columns(["embedding"]).to_pylist()
    for row, vector in zip(rows, _vectors(table, dtype, dim).tolist(), strict=True):
        head = json.dumps({"id": row["id"], "kind": row["kind"]}, ensure_ascii=False)
        tail = json.dumps({"tokens": row["tokens"], "truncated": row["truncated"]})
        stream.write(f'{head[:-1]}, "embedding": {layout % tuple(vector)}, {tail[1:]}\n'.encode())


def _write_npy(stream: BinaryIO, ids: BinaryIO, tables: Iterable[Any], rows: int, dim: int, dtype: str) -> None:
    """NumPy's format, whose header needs the number of rows first; the other columns go to `ids`."""
    little_endian = np.dtype(dtype).newbyteorder("<")
    header = {"descr": little_endian.str, "fortran_order": False, "shape": (rows, dim)}
    np.lib.format.write_array_header_1_0(stream, header)
    for table in tables:
        stream.write(np.ascontiguousarray(_vectors(table, dtype, dim), dtype=little_endian).tobytes())
        _write_ids(ids, table)


def _write_ids(ids: BinaryIO, table: Any) -> None:
    for row in table.drop_columns(["embedding"]).to_pylist():
        ids.write(json_line(row))
