"""Embeds files: inputs -> decode and tokenize -> batches -> encoder -> shards -> one output, resumable."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from longclip_rt.embedding.flow import EmbeddedShard, Flow, FlowOptions
from longclip_rt.embedding.inputs.content import FilesDigest
from longclip_rt.embedding.inputs.entries import Entry, EntryDigest, Tally
from longclip_rt.embedding.inputs.sources import (
    Inputs,
    InputSummary,
    Source,
    scan,
    sources_from_arguments,
    spool_streams,
)
from longclip_rt.embedding.resume import check_neighbours, fingerprint_of, take_up
from longclip_rt.embedding.tasks import Encoder
from longclip_rt.embedding.workspace import Totals, Workspace
from longclip_rt.errors import InputError, OutputError
from longclip_rt.formats.lance import is_lance
from longclip_rt.formats.outputs import DTYPES, INDEXES, OutputFiles, table_from_rows
from longclip_rt.system.extras import require
from longclip_rt.system.files import behind_links, output_errors
from longclip_rt.version import __version__

logger = logging.getLogger("longclip_rt")

# Inputs whose ids are whole texts of up to 1 MiB each must not fill the memory 2,048 at a time.
MAX_SHARD_BYTES = 64 << 20


@dataclass(frozen=True)
class EmbedOptions:
    """How files are embedded.

    Attributes:
        texts: Whether each line is itself a text; else it names an image or a `.txt` file.
        column: Column of `.jsonl` and `.parquet` inputs; None: `text` or `caption` with `texts`, else `image` or
            `path`.
        truncate: Whether texts longer than the context are cut; else they are rejects.
        dtype: "float32" or "float16", of the vectors written.
        index: What `.lance` (`flat`, `ivf-pq`) and `.faiss` (also `hnsw`) are searched with; `flat` is exact.
        batch_size: Most inputs in a batch; None: the embedder's, and more for short texts.
        workers: Threads that decode and tokenize; None: one for each core this process may use.
        shard_size: Inputs that are committed together.
        overwrite: Whether an existing output may be replaced.
        restart: Whether work begun earlier is discarded.
        max_stream: Most bytes that standard input or a pipe may hold: they are copied beside the output.
    """

    texts: bool = False
    column: str | None = None
    truncate: bool = True
    dtype: str = "float32"
    index: str = "flat"
    batch_size: int | None = None
    workers: int | None = None
    shard_size: int = 2048
    overwrite: bool = False
    restart: bool = False
    max_stream: int = 4 << 30

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise OutputError(f"The dtype {self.dtype!r} is unknown. Choose one of {', '.join(DTYPES)}.")
        for name in ("batch_size", "workers", "shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1; got {value}.")


@dataclass(frozen=True)
class EmbedReport:
    """What `embed_files` did.

    Attributes:
        output: The file written.
        rejects: The file that lists the rejects; None when there are none.
        totals: Counts over the whole output, earlier runs included.
        skipped: Lines and files left out, and the columns read.
        embedded: Entries dealt with in this run; fewer than `totals.entries` when it resumed.
        seconds: Time spent on them, assembling the output included.
    """

    output: Path
    rejects: Path | None
    totals: Totals
    skipped: Tally
    embedded: int
    seconds: float


class Progress(Protocol):
    """Is told how far `embed_files` is."""

    def begin(self, total: int, done: int, columns: Mapping[str, str]) -> None:
        """The inputs were counted: `total` entries, of which `done` were embedded by an earlier run."""

    def advance(self, entries: int) -> None:
        """So many more entries were embedded or rejected."""


class Silence:
    """Progress that nobody watches."""

    def begin(self, total: int, done: int, columns: Mapping[str, str]) -> None:
        """Does nothing."""

    def advance(self, entries: int) -> None:
        """Does nothing."""


def embed_files(
    sources: Sequence[str],
    output: str | Path | None,
    embedder: Encoder,
    options: EmbedOptions = EmbedOptions(),
    progress: Progress | None = None,
) -> EmbedReport:
    """Embeds what `sources` name and writes one file, going on where an earlier run of the same work was stopped.

    The output is the same, byte for byte, however often the work was stopped in between.

    Args:
        sources: Lists, folders, globs, images, `.jsonl` or `.parquet` files, or "-" for standard input.
        output: `.parquet`, `.npy`, `.jsonl`, `.lance` or `.faiss`; None: see `plan_embedding`.
        embedder: What turns inputs into vectors.
        options: How.
        progress: Is told how far it is, from the calling thread.

    Raises:
        InputError: When the sources cannot be read, hold nothing, or change meanwhile. Single bad inputs are rejects.
        OutputError: When the output exists with other content or cannot be written, or another run writes it.
        ResumeError: When the begun work has other inputs or options.
        BackendError: When the encoder fails or gives NaN.
    """
    recognised, files = plan_embedding(sources, output, options)
    progress = progress or Silence()
    with Workspace(files) as workspace:
        with output_errors(files.main):
            spooled = spool_streams(recognised, workspace.folder, options.max_stream)
        inputs = Inputs(spooled, options.texts, options.column)
        summary = scan(inputs)
        state = _state(inputs, summary, files, embedder, options)
        finished = take_up(workspace, state, overwrite=options.overwrite, restart=options.restart)
        if finished is None:
            return _embed(workspace, inputs, summary, state, embedder, options, progress)
        return EmbedReport(files.main, _rejects_path(files, finished), finished, summary.tally, 0, 0.0)


def plan_embedding(
    sources: Sequence[str], output: str | Path | None, options: EmbedOptions
) -> tuple[tuple[Source, ...], OutputFiles]:
    """Recognises the sources and the output, without reading inputs or writing: a check before a model is loaded.

    Args:
        sources: As for `embed_files`.
        output: As for `embed_files`; None: `<stem>.parquet` in the working directory for one list or folder
            (`<stem>.embeddings.parquet` for a Parquet file), else `embeddings.parquet`.
        options: As for `embed_files`.

    Raises:
        InputError: When a source cannot be read.
        OutputError: When the output has an unknown suffix, has no such index, is a folder but no Lance table, or is one
            of the sources.
        MissingExtraError: When what writes it is not installed.
    """
    recognised = sources_from_arguments(sources, texts=options.texts, column=options.column)
    files = OutputFiles.from_path(_default_output(recognised) if output is None else Path(output))
    _check_index(files.main, options.index)
    with output_errors(files.main):
        if files.main.is_dir() and not (files.main.suffix == ".lance" and is_lance(files.main)):
            raise OutputError(f"{str(files.main)!r} is a folder. Name a file with -o.")
        for source in recognised:
            for path in files.all:
                if source.path is not None and path.exists() and source.path.exists() and path.samefile(source.path):
                    raise OutputError(f"The output would overwrite the input {source.name!r}. Name another with -o.")
        files = OutputFiles.from_path(behind_links(files.main))
    return recognised, files


def _check_index(main: Path, index: str) -> None:
    known = INDEXES.get(main.suffix, ("flat",))
    if index not in known:
        others = " or ".join(suffix for suffix, indexes in INDEXES.items() if index in indexes)
        advice = f"Name one that ends with {others}." if others else f"Choose one of {', '.join(known)}."
        raise OutputError(f"{str(main)!r} takes no index {index!r}. {advice}")
    if main.suffix in INDEXES:  # before anything is embedded
        require(main.suffix[1:], main.suffix[1:])


def _default_output(sources: Sequence[Source]) -> Path:
    """The output's name where none was given."""
    if len(sources) > 1 or sources[0].path is None or sources[0].form == "glob":
        return Path("embeddings.parquet")
    path = sources[0].path
    if sources[0].form == "parquet":
        return Path(path.stem + ".embeddings.parquet")
    name = path.resolve().name if sources[0].form == "folder" else path.stem
    return Path((name or "embeddings") + ".parquet")


def _state(
    inputs: Inputs, summary: InputSummary, files: OutputFiles, embedder: Encoder, options: EmbedOptions
) -> dict[str, str]:
    """All that the output's bytes depend on, in words: begun work goes on only where every field is the same."""
    values = {
        "tool": f"longclip-rt {__version__}",
        "format": files.main.suffix,
        "inputs": summary.digest,
        "entries": summary.entries,
        "base": inputs.base,
        "lines_are": "texts" if options.texts else "files",
        "truncate": str(options.truncate).lower(),
        "dtype": options.dtype,
        "dim": embedder.dim,
        "context_length": embedder.context_length,
        "pad_multiple": embedder.pad_multiple,
        "batch_size": options.batch_size or embedder.batch_size,
        # With an explicit batch size short texts get no larger batches.
        "text_batches": "as given" if options.batch_size else "by length",
        "shard_size": options.shard_size,
    }
    values |= {name: value for name, value in (("places", summary.places), ("files", summary.files)) if value}
    if files.main.suffix in INDEXES:
        values["index"] = options.index
    if embedder.buckets:
        values["buckets"] = " ".join(map(str, embedder.buckets))
    return {**embedder.describe(), **{key: str(value) for key, value in values.items()}}


def _rejects_path(files: OutputFiles, totals: Totals) -> Path | None:
    return files.rejects if totals.rejects else None


def shards_from_entries(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    """Cuts a stream into shards of `size` entries, or fewer where their ids fill `MAX_SHARD_BYTES`."""
    shard: list[Entry] = []
    room = MAX_SHARD_BYTES
    for entry in entries:
        shard.append(entry)
        room -= len(entry.id)
        if len(shard) == size or room <= 0:
            yield shard
            shard, room = [], MAX_SHARD_BYTES
    if shard:
        yield shard


def _embed(
    workspace: Workspace,
    inputs: Inputs,
    summary: InputSummary,
    state: dict[str, str],
    embedder: Encoder,
    options: EmbedOptions,
    progress: Progress,
) -> EmbedReport:
    """Embeds the shards that are not there yet, and assembles the output."""
    start = time.monotonic()
    whole = workspace.whole_shards()
    done = sum(record.totals.entries for record in whole.values())
    progress.begin(summary.entries, done, summary.tally.columns)
    seen, files = EntryDigest(), FilesDigest()
    digests: dict[int, str] = {}
    count = embedded = 0

    def missing() -> Iterator[tuple[int, list[Entry]]]:
        nonlocal count, embedded
        for number, entries in enumerate(shards_from_entries(inputs.entries(), options.shard_size)):
            count = number + 1
            # With the states that the files have now, before they are read: what changes later shows the next time.
            digest = EntryDigest()
            for entry in entries:
                seen.add(entry)
                digest.add(entry, files.add(entry))
            if number in whole and whole[number].inputs != digest.hexdigest():
                logger.warning("shard %d is made anew, for inputs in it have changed", number)
                progress.advance(-whole[number].totals.entries)
            elif number in whole:
                continue
            digests[number] = digest.hexdigest()
            embedded += len(entries)
            yield number, entries

    flow_options = FlowOptions(options.workers or usable_cores(), options.truncate, options.dtype, options.batch_size)
    flow = Flow(embedder, flow_options, progress.advance)
    with contextlib.closing(flow.run(missing())) as shards:
        for shard in shards:
            _commit(workspace, shard, digests.pop(shard.number))
    if seen.hexdigest() != summary.digest:
        raise InputError("The input changed while it was being read. Run the command again with --restart.")
    if files.states != summary.files:
        raise InputError("Files changed while they were being embedded. Run the command again: it embeds them anew.")
    metadata = {**state, "fingerprint": fingerprint_of(state)}
    totals = workspace.assemble(count, embedder.dim, options.dtype, metadata, options.index)
    check_neighbours(workspace.files, overwrite=options.overwrite)  # another run may have ended since
    workspace.publish()
    seconds = time.monotonic() - start
    rejects = _rejects_path(workspace.files, totals)
    return EmbedReport(workspace.files.main, rejects, totals, summary.tally, embedded, seconds)


def _commit(workspace: Workspace, shard: EmbeddedShard, inputs: str) -> None:
    """Writes the rows of a shard, without its rejects, and the rejects."""
    table, totals, rejects = rows_from_shard(shard)
    workspace.commit(shard.number, inputs, table, totals, rejects)


def rows_from_shard(shard: EmbeddedShard) -> tuple[Any, Totals, list[dict[str, Any]]]:
    """The Arrow table of a shard's rows, its counts, and its rejects, each a line of `<out>.rejects.jsonl`."""
    kept = [position for position in range(len(shard.entries)) if position not in shard.errors]
    kinds = [shard.entries[position].kind for position in kept]
    table = table_from_rows(
        [shard.entries[position].id for position in kept],
        list(kinds),
        shard.vectors[kept],
        shard.tokens[kept],
        shard.truncated[kept],
    )
    rejects: list[dict[str, Any]] = []
    for position in sorted(shard.errors):
        entry = shard.entries[position]
        source = {"source": entry.source} if entry.source else {}
        rejects.append({**source, "line": entry.line, "id": entry.id, "error": shard.errors[position]})
    truncated = int(shard.truncated[kept].sum())
    totals = Totals(len(shard.entries), kinds.count("image"), kinds.count("text"), truncated, len(rejects))
    return table, totals, rejects


def usable_cores() -> int:
    """Cores that this process may use."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
