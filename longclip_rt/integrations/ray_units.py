"""What an actor of `embed --ray` does: one unit of work, a piece of a list or a whole file, to one part of the output.

A part is there or not there, and holds the same whoever made it: a killed actor's units are done again by another one,
and a job that is started again leaves out what is there.
"""

from __future__ import annotations

import contextlib
import json
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longclip_rt.embedding.flow import Flow, FlowOptions
from longclip_rt.embedding.inputs.entries import Entry, Reading, Tally, is_url
from longclip_rt.embedding.inputs.tables import choose_column
from longclip_rt.embedding.pipeline import EmbedOptions, rows_from_shard, shards_from_entries, usable_cores
from longclip_rt.embedding.workspace import Totals
from longclip_rt.errors import InputError, LongClipError
from longclip_rt.formats.outputs import PREFIX, OutputFiles, write_output
from longclip_rt.system.files import has_image_suffix

_ID_COLUMNS = ("id", "key", "__key__", "path", "url")
_COPY = 1 << 20


@dataclass(frozen=True)
class Unit:
    """Work for one part.

    Attributes:
        number: From 0, in the order of the inputs.
        entries: Files or texts; empty for a file.
        source: Path or URI of a `.parquet` or `.tar` file; else "".
    """

    number: int
    entries: tuple[Entry, ...] = ()
    source: str = ""

    @property
    def name(self) -> str:
        """Of its part."""
        return f"part-{self.number:06}.parquet"


def filesystem_of(place: str) -> tuple[Any, str]:
    """The Arrow file system of a path or URI, and the path in it.

    Raises:
        InputError: The URI is of no kind that Arrow knows.
    """
    import pyarrow as pa
    from pyarrow import fs

    try:
        found: tuple[Any, str] = fs.FileSystem.from_uri(place if is_url(place) else str(Path(place).absolute()))
        return found
    except (pa.ArrowException, ValueError, OSError) as error:
        raise InputError(f"{place!r} cannot be opened: {error}.") from error


class UnitWorker:
    """Embeds units, one at a time. Failures come back as text, since an exception would end the whole job.

    Args:
        bundle: Folder of the model, at the same place on every machine.
        output: Folder or URI for the parts.
        options: As for one machine.
        metadata: For every part; `fingerprint` is that of the job.
        opening: Further arguments of `Embedder.from_bundle`.
    """

    def __init__(
        self,
        bundle: str,
        output: str,
        options: EmbedOptions,
        metadata: Mapping[str, str],
        opening: Mapping[str, Any],
    ) -> None:
        from longclip_rt.runtime import Embedder

        self._options, self._metadata = options, dict(metadata)
        self._failure = ""
        try:
            self._filesystem, self._root = filesystem_of(output)
            self._embedder = Embedder.from_bundle(bundle, **opening)
        except LongClipError as error:
            self._failure = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """A row for each unit: its number, and its counts as JSON, or what failed."""
        import pickle

        rows = [self._done(pickle.loads(unit)) for unit in batch["unit"]]
        return {name: [row[name] for row in rows] for name in ("number", "counts", "failure")}

    def _done(self, unit: Unit) -> dict[str, Any]:
        counts: dict[str, str] = {}
        failure = self._failure
        if not failure:
            try:
                counts = part_metadata(self._filesystem, self._root, unit.name) or self._embed(unit)
            except (LongClipError, OSError) as error:
                failure = f"{unit.source or unit.name}: {error}"
        return {"number": unit.number, "counts": json.dumps(counts), "failure": failure}

    def _embed(self, unit: Unit) -> dict[str, str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        options, embedder = self._options, self._embedder
        flow_options = FlowOptions(
            options.workers or usable_cores(), options.truncate, options.dtype, options.batch_size
        )
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tables, totals, rejects = [], Totals(), []
            flow = Flow(embedder, flow_options, lambda entries: None)
            entries, ids = _read(unit, folder, options)
            shards = enumerate(shards_from_entries(entries, options.shard_size))
            with contextlib.closing(flow.run(shards)) as embedded:
                for shard in embedded:
                    if ids is not None:
                        shard.entries = [replace(entry, id=ids[entry.line]) for entry in shard.entries]
                    table, counts, refused = rows_from_shard(shard)
                    tables.append(table)
                    totals += counts
                    rejects += [{"source": unit.source, **reject} for reject in refused]
            layout = {"format": ".parquet", "dtype": options.dtype, "dim": str(embedder.dim)}
            metadata = {**self._metadata, **embedder.describe(), **totals.to_metadata(), **layout}
            files = OutputFiles.from_path(Path(unit.name))
            rows, dtype = totals.rows, options.dtype
            write_output(folder, files, tables, rows=rows, dim=embedder.dim, dtype=dtype, metadata=metadata)
            if rejects:
                pq.write_table(pa.Table.from_pylist(rejects), folder / "rejects.parquet")
                self._put(folder / "rejects.parquet", f"rejects/{unit.name}")
            self._put(folder / unit.name, unit.name)  # the last one: it says that the unit is done
        return {PREFIX + key: value for key, value in metadata.items()}

    def _put(self, file: Path, name: str) -> None:
        """Gives a file its place; whole or absent."""
        from pyarrow import fs

        target = f"{self._root}/{name}"
        # An object shows when its stream is closed; a file on a disk is given its name then.
        local = isinstance(self._filesystem, fs.LocalFileSystem)
        written = f"{target}.{self._metadata['fingerprint'][:8]}.tmp" if local else target
        with file.open("rb") as source, self._filesystem.open_output_stream(written) as stream:
            while piece := source.read(_COPY):
                stream.write(piece)
        if local:
            self._filesystem.move(written, target)


def part_metadata(filesystem: Any, root: str, name: str) -> dict[str, str]:
    """The metadata of a part that is there; else empty."""
    import pyarrow.parquet as pq

    path = f"{root}/{name}"
    if not filesystem.get_file_info(path).is_file:
        return {}
    with filesystem.open_input_file(path) as stream:
        stored = pq.read_metadata(stream).metadata or {}
    return {key.decode(): value.decode() for key, value in stored.items() if key.startswith(PREFIX.encode())}


def _read(unit: Unit, folder: Path, options: EmbedOptions) -> tuple[Iterator[Entry], dict[int, str] | None]:
    """The entries of a unit; and, where a file is taken apart into `folder`, their ids by line."""
    if not unit.source:
        return iter(unit.entries), None
    ids: dict[int, str] = {}
    pieces = _from_tar if ".tar" in Path(unit.source).name else _from_parquet
    return pieces(unit.source, folder, options, ids), ids


def _from_tar(source: str, folder: Path, options: EmbedOptions, ids: dict[int, str]) -> Iterator[Entry]:
    """The images of a WebDataset shard, or with `texts` its `.txt` files."""
    filesystem, path = filesystem_of(source)
    try:
        with filesystem.open_input_stream(path) as stream, tarfile.open(fileobj=stream, mode="r|*") as archive:
            for member in archive:
                suffix = Path(member.name).suffix.lower()
                wanted = suffix == ".txt" if options.texts else has_image_suffix(Path(member.name))
                content = archive.extractfile(member) if member.isfile() and wanted else None
                if content is not None:
                    yield _entry(content.read(), suffix, folder, ids, member.name)
    except tarfile.TarError as error:
        raise InputError(f"{source!r} is a damaged tar file: {error}.") from error


def _from_parquet(source: str, folder: Path, options: EmbedOptions, ids: dict[int, str]) -> Iterator[Entry]:
    """A column of texts, of paths, or of encoded images (binary, or `datasets`' struct of bytes and path)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    filesystem, path = filesystem_of(source)
    base = str(Path(source).parent) if not is_url(source) else "."
    reading = Reading(source, "", base, options.texts, options.column, Tally())
    try:
        with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream) as table:
            names = table.schema_arrow.names
            column = choose_column(names, reading)
            named = next((name for name in _ID_COLUMNS if name in names and name != column), None)
            for batch in table.iter_batches(batch_size=256, columns=[column] + ([named] if named else [])):
                labels = batch.column(named).to_pylist() if named else [None] * batch.num_rows
                for value, label in zip(batch.column(column).to_pylist(), labels, strict=True):
                    value, label = _unwrapped(value, label)
                    line = len(ids) + 1
                    if isinstance(value, bytes) and not options.texts:
                        yield _entry(value, ".image", folder, ids, str(label or f"row {line}"))
                        continue
                    entry = (
                        reading.entry(value, line)
                        if isinstance(value, str)
                        else reading.reject("", line, f"The cell is {type(value).__name__}.")
                    )
                    ids[line] = str(label) if label is not None else entry.id
                    yield entry
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{source!r} cannot be read as Parquet: {error}.") from error


def _unwrapped(value: Any, label: Any) -> tuple[Any, Any]:
    if isinstance(value, dict) and "bytes" in value:
        return value["bytes"] or value.get("path"), label if label is not None else value.get("path")
    return value, label


def _entry(content: bytes, suffix: str, folder: Path, ids: dict[int, str], name: str) -> Entry:
    """The entry of a content, which is put into a file of its own."""
    line = len(ids) + 1
    ids[line] = name
    path = folder / f"{line}{suffix}"
    path.write_bytes(content)
    return Entry(line, str(path), "text" if suffix == ".txt" else "image")
