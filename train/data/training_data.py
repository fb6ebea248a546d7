"""Training data: batches of pixels and tokens from tables, shards or scenes.

    options = DataOptions("pairs.jsonl", batch_size=256, images=Path("photos"))
    data = open_data(options, tokenizer, transform)
    for batch in data.batches(epoch=0):
        ...

The order is drawn from the seed and the epoch alone. A row of which nothing can be made gives its place to another one,
so that batches keep their size; it is listed in `TrainingData.bad`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longclip_rt.backends.batching import padded_length
from longclip_rt.errors import TrainingError
from longclip_rt.model.preprocess import ImageTransform
from longclip_rt.model.tokenizer import Tokenizer, pad_tokens
from longclip_rt.train.data.decoding import CHUNK_ROWS, Chunk, Decoder, Loader
from longclip_rt.train.data.feeds import Feed, Share
from longclip_rt.train.data.rows import Allowance, BadRow, BadRows, Row
from longclip_rt.train.data.sources import Naming, Part, open_sources
from longclip_rt.train.data.table_files import Columns
from longclip_rt.train.scenes.rows import Scenes

__all__ = ["BadRow", "BadRows", "Batch", "DataOptions", "TrainingData", "open_data"]

_PAD_MULTIPLE = 8
# What stands in for a bad row may be bad itself; after so many in a row something else is wrong.
_MOST_SPARES = 1000


@dataclass(frozen=True)
class DataOptions:
    """What to train on.

    Attributes:
        data: A .json (ShareGPT4V), .jsonl, .parquet or .tar file, a glob or folder of files of one kind, numbered
            shards such as `shards/{000..010}.tar`, or scenes such as `scenes:200000@0?twins=0.5&captions=prefix`.
        batch_size: Rows of a step over all processes.
        val: Likewise, to validate on; None: the first `val_rows` of `data`, or scenes that are never trained on.
        images: Folder that image paths are relative to; None: that of the table.
        image_column: Column of image paths or contents; None finds it by the usual names.
        long_column: Column, or field of the JSON in shards, of the long caption.
        short_column: That of the short caption; where there is none, it is the long one's text before the first ". ".
        val_rows: Rows that validate where `val` names none; at most a tenth of all.
        workers: Processes that decode; 0 decodes in the training process.
        seed: Chooses the order.
        max_bad: Largest share of an epoch's rows that may be bad.
        shuffle_buffer: Rows that are held in memory to shuffle shards.
    """

    data: str
    batch_size: int
    val: str | None = None
    images: Path | None = None
    image_column: str | None = None
    long_column: str | None = None
    short_column: str | None = None
    val_rows: int = 1000
    workers: int = 4
    seed: int = 0
    max_bad: float = 0.05
    shuffle_buffer: int = 1000

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("val_rows", 0), ("workers", 0), ("seed", 0), ("shuffle_buffer", 1)):
            if getattr(self, name) < least:
                raise TrainingError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if not 0 <= self.max_bad <= 1:
            raise TrainingError(f"max_bad is {self.max_bad}; it is a share, from 0 to 1.")


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one step, or of validation.

    Attributes:
        pixels: float32 [b, 3, H, W], normalised.
        long_ids: int32 [b, S], padded with 0 to the batch's longest text, rounded up to 8 where the context allows.
        short_ids: int32 [b, S'], likewise.
        ids: What the b rows are called.
        bad: Rows that were to be here and cannot be used.
    """

    pixels: Tensor
    long_ids: Tensor
    short_ids: Tensor
    ids: tuple[str, ...] = ()
    bad: tuple[BadRow, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on a device."""
        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=True),
            long_ids=self.long_ids.to(device, non_blocking=True),
            short_ids=self.short_ids.to(device, non_blocking=True),
        )


class TrainingData:
    """Batches of one process. Made by `open_data`.

    Attributes:
        kind: What the rows are: json, jsonl, parquet, webdataset or scenes.
        rows: Rows of an epoch over all processes, good or bad.
        validation_rows: Rows to validate on.
        steps_per_epoch: Whole batches of an epoch; the rows that are left over come in other epochs.
        bad: Rows that could not be used so far, in validation too.
        drawn: Rows that were trained on so far, since the data were opened.
        long_truncated: Long captions among them that were longer than the context.
        short_truncated: Short captions that were.
    """

    def __init__(
        self,
        training: Part,
        validation: Part,
        decoder: Decoder,
        context_length: int,
        options: DataOptions,
        share: Share,
    ) -> None:
        self.kind = training.kind
        self.rows = training.count
        self.validation_rows = validation.count
        self.steps_per_epoch = training.count // share.batch_size
        self.bad = BadRows()
        self.drawn = self.long_truncated = self.short_truncated = 0
        self._training, self._validation = training, validation
        self._decoder, self._context_length = decoder, context_length
        self._options, self._share = options, share
        self._chunks_a_batch = -(-share.rows // CHUNK_ROWS)
        self._loader: Loader | None = None

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's share of an epoch. A pass that is not read to its end must be over before another begins.

        Args:
            epoch: Number of the epoch, from 0.
            start: Step of the epoch to begin with; what is before it is not decoded.

        Yields:
            `batch_size / world` rows a step.

        Raises:
            TrainingError: Too many rows are bad, or a worker died.
        """
        feed = self._training.feed(self._options.seed, epoch, self._share)
        allowance = Allowance(self._options.max_bad, "this epoch")
        if self._loader is None:
            self._loader = Loader(self._decoder, self._options.workers, self._chunks_a_batch, lasting=True)
        chunks = self._loader.run(_chunks(feed.rows(start), self._share.rows))
        for step in range(start, self.steps_per_epoch):
            parts = list(itertools.islice(chunks, self._chunks_a_batch))
            yield self._filled(parts, feed, step, allowance)
        allowance.end()

    def validation(self) -> Iterator[Batch]:
        """All validation rows in order, a few dozen at a time; bad ones are left out.

        Raises:
            TrainingError: Too many of them are bad.
        """
        allowance = Allowance(self._options.max_bad, "the validation rows")
        loader = Loader(self._decoder, min(self._options.workers, -(-self.validation_rows // CHUNK_ROWS)))
        for chunk in loader.run(_chunks(self._validation.in_order(), CHUNK_ROWS)):
            self._note(chunk, allowance)
            good = [place for place in range(len(chunk.ids)) if place not in chunk.bad]
            if good:
                yield Batch(
                    chunk.pixels if len(good) == len(chunk.ids) else chunk.pixels[good],
                    self._padded([chunk.long[place] for place in good]),
                    self._padded([chunk.short[place] for place in good]),
                    tuple(chunk.ids[place] for place in good),
                    tuple(chunk.bad.values()),
                )
        allowance.end()

    def _filled(self, parts: list[Chunk], feed: Feed, step: int, allowance: Allowance) -> Batch:
        """One batch of decoded chunks, with good rows in the place of bad ones."""
        pixels = parts[0].pixels if len(parts) == 1 else torch.cat([part.pixels for part in parts])
        ids = [name for part in parts for name in part.ids]
        long = [tokens for part in parts for tokens in part.long]
        short = [tokens for part in parts for tokens in part.short]
        bad: list[BadRow] = []
        holes: list[int] = []
        for number, part in enumerate(parts):
            self._note(part, allowance)
            self._count(part)
            bad += part.bad.values()
            holes += [number * CHUNK_ROWS + place for place in part.bad]
        used = set(ids)
        for place in holes:
            spare = self._spare(feed.spares(step, place), used, bad, allowance)
            self._count(spare)
            pixels[place], ids[place] = spare.pixels[0], spare.ids[0]
            long[place], short[place] = spare.long[0], spare.short[0]
            used.add(spare.ids[0])
        return Batch(pixels, self._padded(long), self._padded(short), tuple(ids), tuple(bad))

    def _spare(self, rows: Iterator[Row], used: set[str], bad: list[BadRow], allowance: Allowance) -> Chunk:
        """The first of some rows that is good and not in the batch; if all that are good are in it, one of these."""
        again: list[Row] = []
        for row in itertools.islice(rows, _MOST_SPARES):
            if row.id in self.bad:
                continue
            if row.id in used:
                again.append(row)
                continue
            chunk = self._decoder[[row]]
            self._note(chunk, allowance)
            bad += chunk.bad.values()
            if not chunk.bad:
                return chunk
        for row in again:
            if not (chunk := self._decoder[[row]]).bad:
                return chunk
        raise allowance.refusal()

    def _note(self, chunk: Chunk, allowance: Allowance) -> None:
        for row in chunk.bad.values():
            self.bad.add(row)
        allowance.note(len(chunk.ids), list(chunk.bad.values()))

    def _count(self, chunk: Chunk) -> None:
        self.drawn += len(chunk.ids) - len(chunk.bad)
        self.long_truncated += chunk.long_truncated
        self.short_truncated += chunk.short_truncated

    def _padded(self, tokens: list[npt.NDArray[np.int32]]) -> Tensor:
        """int32 [b, S] of b texts."""
        longest = padded_length(max(map(len, tokens)), _PAD_MULTIPLE, self._context_length)
        return torch.from_numpy(pad_tokens(tokens, longest))


def open_data(
    options: DataOptions, tokenizer: Tokenizer, transform: ImageTransform, rank: int = 0, world: int = 1
) -> TrainingData:
    """Opens what to train on, for one of several processes.

    Args:
        options: What to train on. Every process is given the same.
        tokenizer: Cuts texts at its context length.
        transform: Gives the images their size.
        rank: Number of this process.
        world: Processes.

    Raises:
        TrainingError: The data cannot be read, are too few for one batch, or many of their rows are broken.
        MissingExtraError: A package is not installed.
    """
    if options.batch_size % world:
        raise TrainingError(
            f"A batch of {options.batch_size} cannot be shared by {world} processes; choose a multiple of that."
        )
    share = Share(options.batch_size, rank, world)
    columns = Columns(options.image_column, options.long_column, options.short_column)
    naming = Naming(options.images, columns, options.val_rows, options.shuffle_buffer)
    sources = open_sources(options.data, options.val, naming)
    for part in (sources.training, sources.validation):
        if isinstance(part, Scenes):
            part.check_size(transform.size)
    data = TrainingData(
        sources.training, sources.validation, Decoder(tokenizer, transform), tokenizer.context_length, options, share
    )
    for row in sources.dropped:
        data.bad.add(row)
    allowance = Allowance(options.max_bad, repr(options.data))
    allowance.note(sources.read, list(sources.dropped))
    allowance.end()
    if not data.steps_per_epoch:
        raise TrainingError(
            f"{options.data!r} has {data.rows} rows to train on, besides {data.validation_rows} to validate on: too "
            f"few for one batch of {options.batch_size}. Lower --batch-size, or give more rows."
        )
    sources.training.feed(options.seed, 0, share)  # says at once what cannot be shared
    return data


def _chunks(rows: Iterator[Row], rows_a_batch: int) -> Iterator[list[Row]]:
    """Parts rows into chunks of which none reaches over the end of a batch."""
    sizes = [CHUNK_ROWS] * (rows_a_batch // CHUNK_ROWS)
    sizes += [rows_a_batch % CHUNK_ROWS] if rows_a_batch % CHUNK_ROWS else []
    for size in itertools.cycle(sizes):
        chunk = list(itertools.islice(rows, size))
        if not chunk:
            return
        yield chunk
