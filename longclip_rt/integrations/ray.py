"""Embedding on many machines with Ray Data: `embed_job` for files, `embed` for a dataset that is in Ray already."""

from __future__ import annotations

import json
import logging
import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from longclip_rt.bundle.bundle import default_bundle, load_bundle
from longclip_rt.embedding.inputs.entries import Entry, EntryDigest, is_url
from longclip_rt.embedding.inputs.sources import Inputs, sources_from_arguments
from longclip_rt.embedding.pipeline import EmbedOptions, Progress, Silence, shards_from_entries
from longclip_rt.embedding.resume import fingerprint_of
from longclip_rt.embedding.workspace import Totals
from longclip_rt.errors import InputError, LongClipError, OutputError, ResumeError
from longclip_rt.formats.outputs import PREFIX
from longclip_rt.integrations.ray_units import Unit, UnitWorker, filesystem_of, part_metadata
from longclip_rt.system.extras import require
from longclip_rt.version import __version__

if TYPE_CHECKING:
    from longclip_rt.runtime import Embedder

logger = logging.getLogger("longclip_rt")

_FILES = (".parquet", ".tar", ".tar.gz", ".tgz")
_JOB = "job.json"


@dataclass(frozen=True)
class RayReport:
    """What `embed_job` did.

    Attributes:
        output: Folder or URI of the parts.
        parts: How many there are.
        skipped: How many of them were there before.
        totals: Counts over all parts.
    """

    output: str
    parts: int
    skipped: int
    totals: Totals


def embed_job(
    files: Sequence[str],
    output: str,
    bundle: str | Path | None = None,
    options: EmbedOptions | None = None,
    *,
    address: str | None = None,
    actors: int | None = None,
    progress: Progress | None = None,
    backend: str = "auto",
    precision: str = "auto",
    pca: str | None = None,
    pca_mode: str = "project",
) -> RayReport:
    """Embeds files on a cluster into a folder of parts, leaving out the parts that are there already.

    Args:
        files: As for `embed`, on a file system that all machines share; and `.parquet` and `.tar` files (WebDataset),
            folders of them, or globs, also as URIs such as `s3://bucket/shards/`. Each of these makes one part; of
            other inputs, `options.shard_size` entries make one. Parts are numbered in the order of the inputs.
        output: Folder or URI. Beside the parts lie `job.json` and `rejects/`, a part for each with rejects.
        bundle: The model, at the same path on all machines; None: as for `embed`.
        options: As for `embed`; `overwrite`, `restart`, `index` and `max_stream` are not used.
        address: Of the cluster; None: the one that this machine belongs to, else one of this machine alone.
        actors: How many; None: one for each GPU, and without GPUs one for each machine.
        progress: Is told how far it is.
        backend: As for `Embedder.from_bundle`, and so the rest.
        precision: Of the matrix products.
        pca: To reduce vectors with.
        pca_mode: How.

    Raises:
        InputError: The inputs cannot be read.
        ResumeError: The folder holds parts of another job.
        OutputError: Parts could not be made; the others are there, and the same command makes the rest.
        MissingExtraError: Ray is not installed.
    """
    ray = require("ray", "ray")
    require("ray.data", "ray")
    options = options or EmbedOptions()
    model = default_bundle() if bundle is None else load_bundle(bundle)
    units = list(units_from_files(files, options))
    state = {
        "tool": f"longclip-rt {__version__}",
        "bundle": model.sha256,
        "asked": f"{backend} {precision}",
        "pca": f"{pca} {pca_mode}" if pca else "none",
        "lines_are": "texts" if options.texts else "files",
        "column": options.column or "by name",
        "truncate": str(options.truncate).lower(),
        "dtype": options.dtype,
        "shard_size": str(options.shard_size),
        "batch_size": str(options.batch_size or "the model's"),
        "inputs": _digest(units),
    }
    filesystem, root = filesystem_of(output)
    _take_up(filesystem, root, output, state)
    there = [part_metadata(filesystem, root, unit.name) for unit in units]
    missing = [unit for unit, metadata in zip(units, there, strict=True) if not metadata]
    metadata = {"fingerprint": fingerprint_of(state)}
    opening = {"backend": backend, "precision": precision, "pca": pca, "pca_mode": pca_mode}
    arguments = {
        "bundle": str(model.path),
        "output": output if is_url(output) else str(Path(output).absolute()),
        "options": options,
        "metadata": metadata,
        "opening": opening,
    }
    counts = [metadata for metadata in there if metadata]
    progress = progress or Silence()
    progress.begin(len(units), len(counts), {})
    failures = []
    if missing:
        _connect(ray, address)
        for row in _run(ray, missing, arguments, actors):
            progress.advance(1)
            if row["failure"]:
                failures.append(row["failure"])
            else:
                counts.append(json.loads(row["counts"]))
    if failures:
        raise OutputError(
            f"{len(failures)} of {len(units)} parts could not be made; the others are there, and the same command "
            f"makes the rest. The first error: {failures[0]}"
        )
    _tell_of_mixture(counts)
    totals = sum((Totals.from_metadata(each, PREFIX) for each in counts), Totals())
    return RayReport(output, len(units), len(units) - len(missing), totals)


def units_from_files(files: Sequence[str], options: EmbedOptions) -> Iterator[Unit]:
    """The units of work, in the order of the inputs."""
    number = 0
    for given in files:
        found = _whole_files(given)
        if found is not None:
            for source in found:
                yield Unit(number, source=source)
                number += 1
            continue
        column = options.column if given.lower().endswith((".jsonl", ".ndjson")) or given == "-" else None
        sources = sources_from_arguments([given], texts=options.texts, column=column)
        if sources[0].path is None:
            raise InputError(f"{given!r} can be read only once. With --ray give files that all machines can read.")
        inputs = Inputs(sources, options.texts, column)
        for entries in shards_from_entries(map(_absolute, inputs.entries()), options.shard_size):
            yield Unit(number, tuple(entries))
            number += 1
    if not number:
        raise InputError(f"There is nothing to embed in {', '.join(files)}.")


def _absolute(entry: Entry) -> Entry:
    """An entry that is found from any working directory: the base is, and ids are looked up there too."""
    import dataclasses

    here = Path.cwd()
    if entry.inline or (here / entry.id).exists():
        return dataclasses.replace(entry, base=str(here))
    return dataclasses.replace(entry, base=str((here / entry.base).absolute()))


def _whole_files(given: str) -> list[str] | None:
    """The `.parquet` and `.tar` files that an argument names, also in a folder or by a glob; None: it names others."""
    from pyarrow import fs

    if is_url(given):
        if given.lower().endswith(_FILES):
            return [given]
        filesystem, root = filesystem_of(given)
        try:
            infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        except OSError as error:
            raise InputError(f"{given!r} cannot be listed: {error}.") from error
        scheme = given.partition("://")[0]
        found = sorted(info.path for info in infos if info.is_file and info.path.lower().endswith(_FILES))
        if not found:
            raise InputError(f"{given!r} holds no {' or '.join(_FILES[:2])} files.")
        return [f"{scheme}://{path}" for path in found]
    path = Path(given)
    if given.lower().endswith(_FILES):
        if path.is_file():
            return [str(path.absolute())]
        import glob

        if found := sorted(glob.glob(given, recursive=True)):  # noqa: PTH207 a pattern may be absolute
            return [str(Path(each).absolute()) for each in found]
        raise InputError(f"{given!r} does not exist.")
    return None


def _digest(units: Sequence[Unit]) -> str:
    digest = EntryDigest()
    for unit in units:
        for entry in unit.entries or (Entry(0, unit.source, "image"),):
            digest.add(entry)
    return digest.hexdigest()


def _take_up(filesystem: Any, root: str, output: str, state: dict[str, str]) -> None:
    """Notes the job in its folder, or makes sure that what is there is the same one.

    Raises:
        ResumeError: It is another.
        OutputError: The folder cannot be written.
    """
    path = f"{root}/{_JOB}"
    try:
        filesystem.create_dir(f"{root}/rejects", recursive=True)
        if filesystem.get_file_info(path).is_file:
            with filesystem.open_input_stream(path) as stream:
                begun = json.loads(stream.read())
            differing = [key for key in state if begun.get(key) != state[key]]
            if differing:
                what = "; ".join(f"{key} was {begun.get(key)} and now is {state[key]}" for key in differing)
                raise ResumeError(f"{output!r} holds another job: {what}. Repeat that command, or name another folder.")
            return
        with filesystem.open_output_stream(path) as stream:
            stream.write(json.dumps(state, indent=2).encode())
    except (OSError, ValueError) as error:
        raise OutputError(f"{output!r} cannot be written: {error}.") from error


def _connect(ray: Any, address: str | None) -> None:
    if ray.is_initialized():
        return
    # Its reports of every step would go between the progress bar's lines.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=None)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"There is no Ray cluster at {address!r}: {error}.") from error


def pool_size(ray: Any, actors: int | None) -> tuple[int, dict[str, float]]:
    """How many actors, and what each takes of the cluster.

    On CPUs all actors together take half of what there is at most, so that Ray's own tasks find room.
    """
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), float(resources.get("CPU", 1))
    count = actors or gpus or max(1, len(ray.nodes()))
    if gpus:
        return count, {"num_gpus": min(1.0, gpus / count), "num_cpus": min(1.0, cpus / (2 * count))}
    return count, {"num_cpus": min(1.0, math.floor(50 * cpus / count) / 100)}


def _run(ray: Any, units: Sequence[Unit], arguments: dict[str, Any], actors: int | None) -> Iterator[dict[str, Any]]:
    """Rows of `UnitWorker`, as they come."""
    count, needs = pool_size(ray, actors)
    context = ray.data.DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        rows = [{"unit": pickle.dumps(unit)} for unit in units]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            UnitWorker,
            fn_constructor_kwargs=arguments,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(count, len(units))),
            **needs,
        )
        yield from done.iter_rows()
    finally:
        context.enable_progress_bars = bars


def _tell_of_mixture(counts: Sequence[dict[str, str]]) -> None:
    """Warns where machines of several kinds made the parts, whose vectors differ in the last digits."""
    made = {f"{each.get(PREFIX + 'backend')} in {each.get(PREFIX + 'precision')}" for each in counts}
    if len(made) > 1:
        logger.warning("parts were made by different backends: %s; name one with --backend", " and ".join(sorted(made)))


class RowEmbedder:
    """Adds vectors to the rows of a batch; rows that cannot be embedded get an error in their place."""

    def __init__(self, bundle: str, column: str, kind: str, opening: dict[str, Any]) -> None:
        from longclip_rt.runtime import Embedder

        self._column, self._kind = column, kind
        self._embedder: Embedder = Embedder.from_bundle(bundle, **opening)

    def __call__(self, table: Any) -> Any:
        """An Arrow table with the further columns `embedding` (fixed-size list) and `error`."""
        import pyarrow as pa

        values = table.column(self._column).to_pylist()
        vectors = np.zeros((len(values), self._embedder.dim), np.float32)
        errors: list[str | None] = [None] * len(values)
        items = [value["bytes"] if isinstance(value, dict) else value for value in values]
        try:
            if items:
                vectors[:] = self._vectors(items)
        except InputError:  # one by one then, to find out which
            for row, item in enumerate(items):
                try:
                    vectors[row] = self._vectors([item])[0]
                except InputError as error:
                    errors[row] = str(error)
        element = pa.field("element", pa.float32())
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.reshape(-1)),
            type=pa.list_(element, vectors.shape[1]),
            mask=pa.array([error is not None for error in errors], pa.bool_()),
        )
        table = table.append_column("embedding", column)
        return table.append_column("error", pa.array(errors, pa.string()))

    def _vectors(self, items: list[Any]) -> Any:
        if self._kind == "text":
            if wrong := [item for item in items if not isinstance(item, str)]:
                raise InputError(f"A text is a string; got {type(wrong[0]).__name__}.")
            return self._embedder.embed_texts(items)
        return self._embedder.embed_images(items)


def embed(
    dataset: Any,
    bundle: str | Path | None = None,
    *,
    column: str,
    kind: Literal["image", "text"] = "image",
    actors: int | None = None,
    batch_size: int = 256,
    backend: str = "auto",
    precision: str = "auto",
    pca: str | None = None,
    pca_mode: str = "project",
) -> Any:
    """Adds the columns `embedding` and `error` to a dataset of Ray Data, on a pool of actors.

    Rows keep their order where `DataContext.get_current().execution_options.preserve_order` is True.

    Args:
        dataset: A `ray.data.Dataset`, whatever it was read from.
        bundle: The model, at the same path on all machines; None: as for `embed`.
        column: Texts; or images as paths, encoded bytes, or `datasets`' struct of bytes and path.
        kind: Which of both.
        actors: As for `embed_job`.
        batch_size: Rows that an actor gets at a time.
        backend: As for `Embedder.from_bundle`, and so the rest.
        precision: Of the matrix products.
        pca: To reduce vectors with.
        pca_mode: How.

    Returns:
        The dataset with `embedding`, float32 [D] or null, and `error`, null or why there is no vector.

    Raises:
        LongClipError: There is no such bundle or column.
    """
    ray = require("ray", "ray")
    require("ray.data", "ray")
    model = default_bundle() if bundle is None else load_bundle(bundle)
    if column not in (names := dataset.columns() or []):
        raise LongClipError(f"The dataset has no column {column!r}; it has {', '.join(names)}.")
    count, needs = pool_size(ray, actors)
    opening = {"backend": backend, "precision": precision, "pca": pca, "pca_mode": pca_mode}
    return dataset.map_batches(
        RowEmbedder,
        fn_constructor_kwargs={"bundle": str(model.path), "column": column, "kind": kind, "opening": opening},
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=count),
        **needs,
    )
