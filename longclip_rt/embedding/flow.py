"""From entries to vectors: decoding and tokenizing in workers, encoding beside them, in bounded memory.

Which entries share a batch depends on the shard's content and the options alone, never on which thread was quicker, so
that a resumed run computes the very same batches as an unbroken one.

Images flow in input order, in groups of the batch size; only a few groups are decoded ahead of the encoder. A group
that waits for one slow image does not hold up the groups after it. The texts of a shard are tokenized in chunks, then
sorted by length and batched. While one shard is encoded, the next one is decoded and tokenized.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from longclip_rt.backends.batching import TEXTS_PER_IMAGE, plan_batches
from longclip_rt.embedding.inputs.entries import Entry
from longclip_rt.embedding.tasks import Encoder, crop, encode_images, encode_texts, tokenize
from longclip_rt.errors import BackendError, InputError

if TYPE_CHECKING:
    from longclip_rt.model.tokenizer import Tokens

# Texts of one worker's task: enough to make the task's own cost small, few enough to spread a shard over the workers.
TEXTS_PER_TASK = 64


@dataclass(frozen=True)
class FlowOptions:
    """How entries become vectors.

    Attributes:
        workers: Threads that decode and tokenize.
        truncate: Whether texts longer than the context are cut; else they are rejects.
        dtype: "float32" or "float16", of the vectors kept.
        batch_size: Most inputs in a batch; None: the encoder's, and more for short texts.
    """

    workers: int
    truncate: bool = True
    dtype: str = "float32"
    batch_size: int | None = None


@dataclass(eq=False)
class EmbeddedShard:
    """A shard and its results, filled in as they come.

    Attributes:
        number: From 0.
        entries: Its n entries.
        vectors: float32 or float16 [n, D]; rows of rejected entries mean nothing.
        tokens: int32 [n], before truncation; 0 for images.
        truncated: bool [n].
        errors: Why entries were rejected, by their position in `entries`.
        unfinished: Chunks of texts, batches and groups that have yet to end.
        untokenized: Chunks of texts that have yet to be tokenized.
        ids: int32 [length] of each tokenized text, by position, until it is encoded.
    """

    number: int
    entries: Sequence[Entry]
    vectors: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    errors: dict[int, str] = field(default_factory=dict)
    unfinished: int = 0
    untokenized: int = 0
    ids: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass(eq=False)
class _Chunk:
    """Texts that one worker tokenizes, by position in the shard."""

    shard: EmbeddedShard
    positions: Sequence[int]


@dataclass(eq=False)
class _Group:
    """Images that will share a batch, by position in the shard, and their crops as they come."""

    shard: EmbeddedShard
    positions: Sequence[int]
    missing: int
    crops: dict[int, np.ndarray] = field(default_factory=dict)


class Flow:
    """One run over shards of entries.

    Args:
        encoder: The embedder.
        options: Workers, truncation, dtype, batch size.
        advance: Called with a number of entries whenever so many are done.
    """

    def __init__(self, encoder: Encoder, options: FlowOptions, advance: Callable[[int], None]) -> None:
        self._encoder = encoder
        self._options = options
        self._advance = advance
        self._batch_size = options.batch_size or encoder.batch_size
        # Groups between the first decoding and the end of encoding: those being encoded, as many ready to follow, what
        # the workers decode meanwhile, and one more for a group that waits for a slow image.
        self._groups_ahead = 2 * encoder.concurrency + -(-options.workers // self._batch_size) + 1
        self._groups = 0
        self._open: deque[EmbeddedShard] = deque()
        self._waiting: deque[_Chunk | _Group] = deque()
        self._results: queue.SimpleQueue[tuple[Future[Any], Callable[[Any], None]]] = queue.SimpleQueue()
        self._running = 0
        # Encoding has threads of its own: a batch that is ready must not queue behind a hundred decodings.
        self._workers = ThreadPoolExecutor(options.workers, "longclip-worker")
        self._encoders = ThreadPoolExecutor(encoder.concurrency, "longclip-encoder")

    def run(self, shards: Iterable[tuple[int, Sequence[Entry]]]) -> Generator[EmbeddedShard, None, None]:
        """Embeds numbered shards and yields them in order. To be closed when it is left early; can run once.

        Raises:
            BackendError: When a vector is not finite.
            Exception: Whatever a worker or the encoder raises, except `InputError`, which makes a reject.
        """
        source = iter(shards)
        try:
            while True:
                self._start_tasks(source)
                if self._open and self._open[0].unfinished == 0:
                    yield self._open.popleft()
                elif self._running:
                    future, handle = self._results.get()
                    self._running -= 1
                    handle(future.result())
                else:
                    return
        finally:
            for pool in (self._workers, self._encoders):
                pool.shutdown(wait=False, cancel_futures=True)
            # What already runs cannot be stopped, and must not outlive the caller's files and encoder.
            for pool in (self._workers, self._encoders):
                pool.shutdown(wait=True)

    def _start_tasks(self, source: Iterator[tuple[int, Sequence[Entry]]]) -> None:
        """Gives the workers all that may be begun now, and opens further shards when everything open has begun."""
        while True:
            if self._waiting:
                task = self._waiting[0]
                if isinstance(task, _Group) and self._groups == self._groups_ahead:
                    return
                self._waiting.popleft()
                self._start_group(task) if isinstance(task, _Group) else self._start_chunk(task)
            elif self._may_open() and (item := next(source, None)) is not None:
                self._open_shard(*item)
            else:
                return

    def _may_open(self) -> bool:
        """Whether another shard may be opened: the one after the oldest, or more where shards are small."""
        return len(self._open) < 2 or sum(len(shard.entries) for shard in self._open) < (
            self._groups_ahead * self._batch_size
        )

    def _open_shard(self, number: int, entries: Sequence[Entry]) -> None:
        """Cuts a shard into tasks."""
        count = len(entries)
        vectors = np.zeros((count, self._encoder.dim), self._options.dtype)
        shard = EmbeddedShard(number, entries, vectors, np.zeros(count, np.int32), np.zeros(count, bool))
        self._open.append(shard)
        texts: list[int] = []
        images: list[int] = []
        for position, entry in enumerate(entries):
            if entry.error is not None:
                self._reject(shard, position, entry.error)
            else:
                (texts if entry.kind == "text" else images).append(position)
        chunks = [_Chunk(shard, part) for part in _parts(texts, TEXTS_PER_TASK)]
        groups = [_Group(shard, part, len(part)) for part in _parts(images, self._batch_size)]
        shard.untokenized = len(chunks)
        shard.unfinished = len(chunks) + len(groups)
        self._waiting.extend(chunks)
        self._waiting.extend(groups)

    def _submit(self, pool: ThreadPoolExecutor, handle: Callable[[Any], None], task: Callable[[], Any]) -> None:
        """Runs `task` in a pool, and `handle` with its result in the thread that runs this flow."""
        future = pool.submit(task)
        self._running += 1
        future.add_done_callback(lambda done: self._results.put((done, handle)))

    def _reject(self, shard: EmbeddedShard, position: int, error: str) -> None:
        shard.errors[position] = error
        self._advance(1)

    def _start_chunk(self, chunk: _Chunk) -> None:
        entries = [chunk.shard.entries[position] for position in chunk.positions]
        task = partial(tokenize, self._encoder.tokenizer, entries)
        self._submit(self._workers, partial(self._tokenized, chunk), task)

    def _tokenized(self, chunk: _Chunk, results: list[Tokens | InputError]) -> None:
        """Takes the tokens of a chunk; after a shard's last chunk its texts are batched."""
        shard = chunk.shard
        for position, result in zip(chunk.positions, results, strict=True):
            if isinstance(result, InputError):
                self._reject(shard, position, str(result))
            elif result.truncated and not self._options.truncate:
                limit = self._encoder.context_length
                self._reject(
                    shard, position, f"It has {result.length} tokens, more than the model's {limit}. Shorten it."
                )
            else:
                shard.ids[position] = result.ids
                shard.tokens[position] = result.length
                shard.truncated[position] = result.truncated
        shard.unfinished -= 1
        shard.untokenized -= 1
        if shard.untokenized == 0:
            self._encode_texts(shard)

    def _encode_texts(self, shard: EmbeddedShard) -> None:
        # Chunks end in any order; positions bring the texts back into theirs.
        positions = sorted(shard.ids)
        context_length = self._encoder.context_length
        batches = plan_batches(
            [len(shard.ids[position]) for position in positions],
            pad_multiple=self._encoder.pad_multiple,
            token_budget=self._batch_size * context_length,
            max_batch=self._options.batch_size or TEXTS_PER_IMAGE * self._encoder.batch_size,
            max_length=context_length,
            buckets=self._encoder.buckets,
        )
        shard.unfinished += len(batches)
        for batch in batches:
            members = [positions[index] for index in batch.indices]
            ids = [shard.ids.pop(position) for position in members]
            encode = partial(encode_texts, self._encoder, ids, batch.length)
            self._submit(self._encoders, partial(self._encoded, shard, members), encode)

    def _start_group(self, group: _Group) -> None:
        self._groups += 1
        for position in group.positions:
            task = partial(crop, self._encoder.transform, group.shard.entries[position])
            self._submit(self._workers, partial(self._cropped, group, position), task)

    def _cropped(self, group: _Group, position: int, result: np.ndarray | InputError) -> None:
        """Takes one crop; a group with all its crops goes to the encoder."""
        group.missing -= 1
        if isinstance(result, InputError):
            self._reject(group.shard, position, str(result))
        else:
            group.crops[position] = result
        if group.missing == 0:
            members = sorted(group.crops)
            crops = [group.crops.pop(position) for position in members]
            if crops:
                encode = partial(encode_images, self._encoder, crops)
                self._submit(self._encoders, partial(self._encoded_group, group, members), encode)
            else:
                self._groups -= 1
                group.shard.unfinished -= 1

    def _encoded_group(self, group: _Group, positions: Sequence[int], vectors: np.ndarray) -> None:
        self._groups -= 1
        self._encoded(group.shard, positions, vectors)

    def _encoded(self, shard: EmbeddedShard, positions: Sequence[int], vectors: np.ndarray) -> None:
        """Keeps the vectors of a batch, float32 [B, D]."""
        if not np.isfinite(vectors).all():
            bad = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise BackendError(
                f"The encoder gave NaN or infinity for {shard.entries[positions[bad]].id!r}. Try --precision fp32, and "
                "export the bundle again: its parity report would show this."
            )
        shard.vectors[list(positions)] = vectors
        shard.unfinished -= 1
        self._advance(len(positions))


def _parts(positions: Sequence[int], size: int) -> list[Sequence[int]]:
    """Consecutive parts of at most `size`."""
    return [positions[start : start + size] for start in range(0, len(positions), size)]
