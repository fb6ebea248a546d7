"""What the threads of the embedding flow do, each call on its own: decode, clean and tokenize, encode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from longclip_rt.embedding.inputs.content import locate, read_text
from longclip_rt.embedding.inputs.entries import Entry
from longclip_rt.errors import InputError
from longclip_rt.model.cleaning import needs_repair, repair_text
from longclip_rt.model.tokenizer import pad_tokens

if TYPE_CHECKING:
    from longclip_rt.model.preprocess import ImageTransform
    from longclip_rt.model.tokenizer import Tokenizer, Tokens


class Encoder(Protocol):
    """What embedding needs of `longclip_rt.runtime.Embedder`."""

    @property
    def dim(self) -> int:
        """Length D of a vector."""

    @property
    def context_length(self) -> int:
        """Most tokens of a text."""

    @property
    def concurrency(self) -> int:
        """How many calls of `encode_tokens` and `encode_crops` run usefully at once."""

    @property
    def batch_size(self) -> int:
        """Images in a batch."""

    @property
    def pad_multiple(self) -> int:
        """Text batches are padded to a multiple of this."""

    @property
    def buckets(self) -> tuple[int, ...]:
        """The lengths that text batches are padded to; empty where `pad_multiple` says it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids."""

    @property
    def transform(self) -> ImageTransform:
        """Image file to crop."""

    def encode_tokens(self, ids: np.ndarray) -> np.ndarray:
        """Ids int32 [B, S] to vectors float32 [B, D]."""

    def encode_crops(self, crops: np.ndarray) -> np.ndarray:
        """Crops uint8 [B, n, n, 3] to vectors float32 [B, D]."""

    def describe(self) -> dict[str, str]:
        """What made the vectors, for the output's metadata."""


def crop(transform: ImageTransform, entry: Entry) -> np.ndarray | InputError:
    """The crop uint8 [n, n, 3] of an image, or why there is none."""
    try:
        return transform.crop(locate(entry))
    except InputError as error:
        return error


def tokenize(tokenizer: Tokenizer, entries: Sequence[Entry]) -> list[Tokens | InputError]:
    """The tokens of each text, or why there are none."""
    texts = [_cleaned(entry) for entry in entries]
    tokens = iter(tokenizer.encode_cleaned([text for text in texts if isinstance(text, str)]))
    return [next(tokens) if isinstance(text, str) else text for text in texts]


def _cleaned(entry: Entry) -> str | InputError:
    try:
        text = read_text(entry)
        return repair_text(text) if needs_repair(text) else text
    except InputError as error:
        return error


def encode_texts(encoder: Encoder, ids: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Vectors float32 [B, D] of B id sequences, padded to `length`."""
    return encoder.encode_tokens(pad_tokens(ids, length))


def encode_images(encoder: Encoder, crops: Sequence[np.ndarray]) -> np.ndarray:
    """Vectors float32 [B, D] of B crops uint8 [n, n, 3]."""
    return encoder.encode_crops(np.stack(crops))
