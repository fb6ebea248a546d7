"""An embedder without a model, whose vectors depend on the whole batch: only equal batches give equal bytes."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from longclip_rt.errors import InputError


@dataclass(frozen=True)
class FakeTokens:
    ids: np.ndarray
    length: int

    @property
    def truncated(self) -> bool:
        return self.length > len(self.ids)


class FakeTokenizer:
    """One token a word."""

    context_length = 16

    def encode_cleaned(self, texts):
        return [self._encode(text.split()) for text in texts]

    def _encode(self, words):
        ids = [1 + int.from_bytes(hashlib.sha256(word.encode()).digest()[:2], "little") for word in words]
        return FakeTokens(np.array([99998, *ids[: self.context_length - 2], 99999], np.int32), len(ids) + 2)


class FakeTransform:
    """Decodes with Pillow. A file with "slow" in its name waits for the event `slow`, one with "crash" raises."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.slow = threading.Event()
        self.decoded: list[str] = []
        self.most_waiting = self.waiting = 0

    def crop(self, source):
        name = Path(source).name
        if "slow" in name:
            self.slow.wait(20)
        if "crash" in name:
            raise RuntimeError("a fault of the program")
        try:
            with Image.open(source) as image:
                crop = np.asarray(image.convert("RGB").resize((4, 4)))
        except OSError as error:
            raise InputError(f"{name!r} is not an image.") from error
        with self.lock:
            self.decoded.append(name)
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
        return crop


class FakeEmbedder:
    dim = 8
    context_length = 16
    image_size = 4
    concurrency = 2
    batch_size = 4
    pad_multiple = 4
    buckets: tuple[int, ...] = ()

    def __init__(self, delay: float = 0.0, **description: str) -> None:
        self.tokenizer = FakeTokenizer()
        self.transform = FakeTransform()
        self.delay = delay
        self.closed = False
        self.description = {"bundle": "0" * 64, "model": "fake", "backend": "none", "precision": "fp32", **description}
        self.shapes: list[tuple[int, ...]] = []

    def close(self) -> None:
        self.closed = True

    def describe(self) -> dict[str, str]:
        return dict(self.description)

    def encode_tokens(self, ids):
        return self._vectors(ids)

    def encode_crops(self, crops):
        vectors = self._vectors(crops)
        with self.transform.lock:
            self.transform.waiting -= len(crops)
        return vectors

    def _vectors(self, batch: np.ndarray) -> np.ndarray:
        time.sleep(self.delay)
        self.shapes.append(batch.shape)
        rows = np.stack([_noise(row.tobytes()) for row in batch])
        vectors = rows + 1e-3 * _noise(batch.tobytes() + repr(batch.shape).encode())
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _noise(data: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(data).digest()[:16], np.uint16).astype(np.float64) / 65535 - 0.4999
