"""Rows to pixels and tokens, in worker processes.

The main process decides which row comes when and sends rows, in order and a few dozen at a time, to the workers: paths
or what was read of a shard, never the tables. So the order does not depend on the number of workers, and what is
skipped is not decoded.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from longclip_rt.errors import InputError, TrainingError
from longclip_rt.model.preprocess import ImageTransform
from longclip_rt.model.tokenizer import Tokenizer, Tokens
from longclip_rt.train.data.rows import BadRow, Row

CHUNK_ROWS = 32
"""Rows that a worker decodes at a time. A batch of 2048 is thus the work of all workers, not the next of one."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Decoded rows.

    Attributes:
        ids: What the n rows are called.
        pixels: float32 [n, 3, H, W]; what stands there for a bad row means nothing.
        long: int32 [tokens] each, not padded; empty for a bad row. So for `short`.
        short: The short captions.
        long_truncated: How many long captions were cut to the context length.
        short_truncated: How many short ones were.
        bad: Those of which nothing can be made, by their place.
    """

    ids: list[str]
    pixels: Tensor
    long: list[npt.NDArray[np.int32]]
    short: list[npt.NDArray[np.int32]]
    long_truncated: int
    short_truncated: int
    bad: dict[int, BadRow] = field(default_factory=dict)


class Decoder(Dataset[Chunk]):
    """Decodes chunks of rows; as a dataset, its "index" is the list of rows itself."""

    def __init__(self, tokenizer: Tokenizer, transform: ImageTransform) -> None:
        self._tokenizer = tokenizer
        self._transform = transform

    def __getitem__(self, rows: list[Row]) -> Chunk:
        """Opens, crops and tokenizes rows."""
        size = self._transform.size
        crops = np.zeros((len(rows), size, size, 3), np.uint8)
        nothing = Tokens(np.zeros(0, np.int32), 0)
        captions = [(nothing, nothing)] * len(rows)
        bad = {}
        for place, row in enumerate(rows):
            try:
                pair = row.pair(size, self._tokenizer)
                crops[place] = self._transform.crop(pair.image)
                long, short = self._tokenizer.encode([pair.long, pair.short])
                captions[place] = long, short
            except InputError as error:
                bad[place] = BadRow(row.id, str(error))
        long_tokens, short_tokens = zip(*captions, strict=True)
        return Chunk(
            [row.id for row in rows],
            torch.from_numpy(self._transform.normalize(crops)),
            [tokens.ids for tokens in long_tokens],
            [tokens.ids for tokens in short_tokens],
            sum(tokens.truncated for tokens in long_tokens),
            sum(tokens.truncated for tokens in short_tokens),
            bad,
        )


class _Plan(Sampler[list[Row]]):
    """What the loader asks for the next chunk; filled anew for each pass, while its workers live on."""

    def __init__(self) -> None:
        self.chunks: Iterator[list[Row]] = iter(())

    def __iter__(self) -> Iterator[list[Row]]:
        return self.chunks


class Loader:
    """Decodes chunks in the background and gives them in order. One pass at a time.

    Args:
        decoder: What the workers do.
        workers: Processes; 0 decodes in the caller's.
        ahead: Chunks of one batch, so that the next batch is decoded while one is trained on.
        lasting: Whether the workers stay for further passes.
    """

    def __init__(self, decoder: Decoder, workers: int, ahead: int = 1, lasting: bool = False) -> None:
        self._plan = _Plan()
        self._loader = DataLoader(
            decoder,
            batch_size=None,
            sampler=self._plan,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_begin_worker,
            # The loader draws a seed for each pass; taking it from the global generator would change what a resumed
            # run draws from that.
            generator=torch.Generator(),
            prefetch_factor=max(2, -(-ahead // workers) + 1) if workers else None,
            persistent_workers=lasting and workers > 0,
        )

    def run(self, chunks: Iterator[list[Row]]) -> Iterator[Chunk]:
        """Decodes chunks.

        Raises:
            TrainingError: A worker died.
        """
        self._plan.chunks = chunks
        decoded = iter(self._loader)
        while True:
            try:
                chunk = next(decoded)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise TrainingError(
                    f"A process that decodes images was killed: {error}. Mostly there is too little memory: lower "
                    "--workers, or give a container more shared memory (docker run --shm-size=8g)."
                ) from error
            yield chunk


def _as_it_is(chunk: Any) -> Any:
    return chunk


def _begin_worker(_number: int) -> None:
    """Keeps a worker to one thread, and leaves it to the main process what Ctrl-C means."""
    import pyarrow as pa

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _say_nothing_of_a_lost_connection
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pa.set_cpu_count(1)


def _say_nothing_of_a_lost_connection(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """The thread that hands batches over reports here when the main process was stopped while it took one."""
    if not isinstance(error, (EOFError, OSError, multiprocessing.AuthenticationError)):
        sys.__excepthook__(kind, error, traceback)
