"""Embeddings of a data set's images and texts, by the resumable job of `longclip-rt embed`, and taken again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longclip_rt.embedding.inputs.content import FilesDigest
from longclip_rt.embedding.inputs.entries import entry_from_value
from longclip_rt.embedding.pipeline import EmbedOptions, EmbedReport, Progress, Silence, embed_files
from longclip_rt.embedding.tasks import Encoder
from longclip_rt.evaluation.cache import Entry
from longclip_rt.formats.outputs import json_line, load_embeddings
from longclip_rt.system.files import output_errors, sha256_of_json, whole_file
from longclip_rt.version import __version__

Bars = Callable[[], AbstractContextManager[Progress]]
"""Makes what shows how far one job is."""


class NoBar(Silence):
    """Shows nothing."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is to be ended."""


@dataclass(frozen=True)
class Embedded:
    """Embeddings of N images and M texts.

    Attributes:
        images: float32 [N, D], L2-normalised; the rows of images that could not be embedded are 0.
        texts: float32 [M, D], likewise.
        tokens: int32 [M], of the whole texts, before any was cut.
        truncated: bool [M], whether a text was cut to the context length.
        bad_images: Why an image could not be embedded, by its row.
        bad_texts: Likewise of texts.
        computed: Images and texts that were embedded in this run; 0 where all were kept from an earlier one.
    """

    images: NDArray[np.float32]
    texts: NDArray[np.float32]
    tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    bad_images: dict[int, str]
    bad_texts: dict[int, str]
    computed: int


def embedded(
    entry: Entry,
    encoder: Encoder,
    images: Sequence[Path],
    texts: Sequence[str],
    batch_size: int | None = None,
    bars: Bars = NoBar,
) -> Embedded:
    """Embeds images and texts, or takes what an earlier run of the same model, files and texts kept.

    Args:
        entry: Where it is kept.
        encoder: The embedder.
        images: N files.
        texts: M texts, none empty.
        batch_size: Most inputs in a batch; None: the embedder's.
        bars: Shows how far it is.

    Raises:
        OutputError: The disk refuses.
        BackendError: The encoder fails or gives NaN.
    """
    places = [str(path.absolute()) for path in images]
    folder = entry.folder / _content_key(places, texts)
    made_by = [encoder.describe(), encoder.dim, encoder.context_length, batch_size, str(folder), __version__]
    model = sha256_of_json(made_by)[:16]
    with output_errors(folder):
        folder.mkdir(exist_ok=True)
    common = EmbedOptions(batch_size=batch_size)
    vectors, _, _, bad_images, done = _job(folder, model, encoder, "image", places, common, bars)
    text_vectors, tokens, truncated, bad_texts, more = _job(folder, model, encoder, "text", texts, common, bars)
    return Embedded(vectors, text_vectors, tokens, truncated, bad_images, bad_texts, done + more)


def _content_key(places: Sequence[str], texts: Sequence[str]) -> str:
    """What tells the files, in the state that they are in, and the texts from others."""
    files = FilesDigest()
    for line, place in enumerate(places, 1):
        files.add(entry_from_value(place, line, texts=False, base=".", source=""))
    return sha256_of_json([places, files.states, list(texts)])[:16]


_Rows = tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.bool_], dict[int, str], int]


def _job(
    folder: Path, model: str, encoder: Encoder, kind: str, values: Sequence[str], common: EmbedOptions, bars: Bars
) -> _Rows:
    import pyarrow.parquet as pq

    count = len(values)
    vectors, tokens = np.zeros((count, encoder.dim), np.float32), np.zeros(count, np.int32)
    truncated = np.zeros(count, bool)
    if not count:
        return vectors, tokens, truncated, {}, 0
    listing = folder / f"{kind}s.jsonl"
    with output_errors(listing), whole_file(listing) as stream:
        stream.writelines(json_line({kind: value}) for value in values)
    options = EmbedOptions(texts=kind == "text", column=kind, batch_size=common.batch_size)
    with bars() as bar:
        report = embed_files([str(listing)], folder / f"{model}-{kind}s.parquet", encoder, options, bar)
    bad = _rejects(report)
    rows = [row for row in range(count) if row not in bad]
    if rows:
        vectors[rows] = load_embeddings(report.output).vectors
        table = pq.read_table(report.output, columns=["tokens", "truncated"])
        if kind == "text":
            tokens[rows] = table["tokens"].to_numpy()
            truncated[rows] = table["truncated"].to_numpy(zero_copy_only=False)
    return vectors, tokens, truncated, bad, report.embedded


def _rejects(report: EmbedReport) -> dict[int, str]:
    """Why inputs have no row, by their number from 0."""
    if report.rejects is None:
        return {}
    with report.rejects.open(encoding="utf-8", newline="\n") as lines:
        return {one["line"] - 1: one["error"] for one in map(json.loads, lines)}
