"""From a request's inputs to vectors: let in, tokenized or decoded in worker threads, then batched."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from longclip_rt.backends.base import Float32
from longclip_rt.backends.batching import TEXTS_PER_IMAGE
from longclip_rt.errors import InputError
from longclip_rt.model.tokenizer import Tokens, pad_tokens
from longclip_rt.runtime import Embedder
from longclip_rt.serving.batcher import Batcher, Policy
from longclip_rt.serving.bounds import Bounds, Refusal
from longclip_rt.serving.metrics import Metrics

Input = str | list[int] | bytes
"""A text, token ids, or the content of an image file."""

Result = TypeVar("Result")

# Texts that a worker tokenizes at a time: enough to make the task's own cost small.
_TEXTS_A_TASK = 64


@dataclass(frozen=True)
class Encoded:
    """Vectors of a request.

    Attributes:
        vectors: float32 [n, D], L2-normalised, in the order of the inputs.
        kinds: `text` or `image` of each.
        lengths: Tokens of each before it was cut, start and end included; 0 for an image.
        read: Tokens of each that the model read.
    """

    vectors: Float32
    kinds: tuple[str, ...]
    lengths: tuple[int, ...]
    read: tuple[int, ...]

    @property
    def truncated(self) -> list[int]:
        """Positions of the texts that were cut."""
        return [index for index, (whole, read) in enumerate(zip(self.lengths, self.read, strict=True)) if whole > read]


class Encoding:
    """An embedder behind queues, one of texts and one of images. Belongs to one event loop.

    Args:
        embedder: What encodes; it stays the caller's to close.
        bounds: What is let in.
        metrics: What is told of it.
    """

    def __init__(self, embedder: Embedder, bounds: Bounds, metrics: Metrics) -> None:
        self.embedder, self.bounds, self.metrics = embedder, bounds, metrics
        self._transform = replace(embedder.transform, max_pixels=min(bounds.pixels, embedder.transform.max_pixels))
        self.workers = max(2, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self.workers, "longclip-prepare")
        slots = embedder.concurrency + 1  # one batch is stacked while the others are in the encoder
        self._encoders = ThreadPoolExecutor(2 * slots, "longclip-serve")
        size, context = embedder.batch_size, embedder.context_length
        texts = Policy(size * context, TEXTS_PER_IMAGE * size, embedder.pad_multiple, context, embedder.buckets)
        runs: dict[str, tuple[Callable[[Sequence[Any], int], Float32], Policy]] = {
            "text": (lambda ids, length: embedder.encode_tokens(pad_tokens(ids, length)), texts),
            "image": (lambda crops, _: embedder.encode_crops(np.stack(crops)), Policy(size, size)),
        }
        self.queues = {
            kind: Batcher(run, policy, embedder.dim, self._encoders, slots, bounds.wait_seconds, metrics.ran(kind))
            for kind, (run, policy) in runs.items()
        }
        self._admitted = 0
        self._seconds_an_input = 0.0

    async def warm_up(self) -> None:
        """Encodes one input of each kind, which compiles what is compiled at first use."""
        size = self.embedder.image_size
        ids = self.embedder.tokenizer.encode(["a"])[0].ids
        await self.queues["text"].submit([ids], [len(ids)])
        await self.queues["image"].submit([np.zeros((size, size, 3), np.uint8)], [1])

    def check_room(self, inputs: int = 1) -> None:
        """Refuses inputs that the queue has no room for.

        Raises:
            Refusal: It has none.
        """
        if self._admitted + inputs > self.bounds.queue:
            wait = min(60, max(1, round(self._admitted * self._seconds_an_input)))
            message = f"{self._admitted} inputs wait already, and the queue takes {self.bounds.queue}. Try again later."
            raise Refusal(429, message, "queue_full", retry_after=wait)

    async def encode(self, inputs: Sequence[Input], param: str = "input") -> Encoded:
        """Embeds inputs of any mix.

        Args:
            inputs: Texts, token ids, images.
            param: The request's field that they came from, for messages.

        Raises:
            Refusal: There are too many, the queue is full, or one cannot be embedded.
        """
        if len(inputs) > self.bounds.inputs:
            message = f"The request has {len(inputs)} inputs; at most {self.bounds.inputs} are taken. Send several."
            raise Refusal(400, message, "too_many_inputs", param)
        self.check_room(len(inputs))
        with self._let_in(len(inputs)):
            started = time.monotonic()
            texts = [index for index, one in enumerate(inputs) if not isinstance(one, bytes)]
            images = [index for index, one in enumerate(inputs) if isinstance(one, bytes)]
            (tokens, text_vectors), image_vectors = await _together(
                self._texts([(index, inputs[index]) for index in texts], param),
                self._images([(index, inputs[index]) for index in images], param),
            )
            self._seconds_an_input += 0.1 * ((time.monotonic() - started) / self._admitted - self._seconds_an_input)
        vectors = np.empty((len(inputs), self.embedder.dim), np.float32)
        vectors[texts], vectors[images] = text_vectors, image_vectors
        lengths, read = [0] * len(inputs), [0] * len(inputs)
        for index, one in zip(texts, tokens, strict=True):
            lengths[index], read[index] = one.length, len(one.ids)
        self.metrics.tokens.inc(sum(read))
        self.metrics.truncated.inc(sum(one.truncated for one in tokens))
        kinds = tuple("image" if isinstance(one, bytes) else "text" for one in inputs)
        return Encoded(vectors, kinds, tuple(lengths), tuple(read))

    async def in_worker(self, task: Callable[[], Result]) -> Result:
        """What a function gives that would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, task)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)
        self._encoders.shutdown(cancel_futures=True)

    @contextlib.contextmanager
    def _let_in(self, inputs: int) -> Iterator[None]:
        self._admitted += inputs
        self.metrics.admitted.set(self._admitted)
        try:
            yield
        finally:
            self._admitted -= inputs
            self.metrics.admitted.set(self._admitted)

    async def _texts(self, inputs: list[tuple[int, Any]], param: str) -> tuple[list[Tokens], Float32]:
        def tokenize(part: list[tuple[int, Any]]) -> list[Tokens]:
            try:
                found = iter(self.embedder.tokenizer.encode([one for _, one in part if isinstance(one, str)]))
            except (InputError, UnicodeEncodeError):
                return [self._tokens(one, f"{param}[{index}]") for index, one in part]  # which finds the one at fault
            return [
                next(found) if isinstance(one, str) else self._tokens(one, f"{param}[{index}]") for index, one in part
            ]

        parts = [inputs[start : start + _TEXTS_A_TASK] for start in range(0, len(inputs), _TEXTS_A_TASK)]
        with self._prepared("text"):
            tokens = [one for part in await self._each(tokenize, parts) for one in part]
        lengths = [len(one.ids) for one in tokens]
        return tokens, await self.queues["text"].submit([one.ids for one in tokens], lengths)

    async def _images(self, inputs: list[tuple[int, Any]], param: str) -> Float32:
        def crop(one: tuple[int, bytes]) -> npt.NDArray[np.uint8]:
            try:
                return self._transform.crop(one[1])
            except InputError as error:
                raise Refusal(422, str(error), "unreadable_image", f"{param}[{one[0]}]") from error

        with self._prepared("image"):
            crops = await self._each(crop, inputs)
        return await self.queues["image"].submit(crops, [1] * len(crops))

    def _tokens(self, given: str | list[int], param: str) -> Tokens:
        tokenizer = self.embedder.tokenizer
        if isinstance(given, str):
            try:
                given.encode()
                return tokenizer.encode([given])[0]
            except (InputError, UnicodeEncodeError) as error:
                raise Refusal(422, f"The text cannot be tokenized: {error}", "unreadable_text", param) from error
        if not given or min(given) < 0 or max(given) >= tokenizer.vocab_size:
            message = f"Token ids must be from 0 to {tokenizer.vocab_size - 1}, of the model's own tokenizer."
            raise Refusal(422, message, "bad_token_ids", param)
        inner = given[given[0] == tokenizer.sot : len(given) - (given[-1] == tokenizer.eot)]
        kept = inner[: tokenizer.context_length - 2]
        return Tokens(np.array([tokenizer.sot, *kept, tokenizer.eot], np.int32), len(inner) + 2)

    async def _each(self, task: Callable[[Any], Result], parts: Sequence[Any]) -> list[Result]:
        """Runs a task a part in the workers; of one request no more at a time than there are, so that all advance."""
        room = asyncio.Semaphore(self.workers)

        async def one(part: Any) -> Result:
            async with room:
                return await self.in_worker(lambda: task(part))

        return list(await _together(*map(one, parts)))

    @contextlib.contextmanager
    def _prepared(self, kind: str) -> Iterator[None]:
        with self.metrics.stages.labels("prepare", kind).time():
            yield


async def _together(*awaited: Awaitable[Any]) -> list[Any]:
    """Results of all; the first failure cancels the others and is raised as it is."""
    tasks = [asyncio.ensure_future(each) for each in awaited]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
