"""Pairs on disk whose pictures tell their number, for tests of training data."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from PIL import Image

from longclip_rt.model.preprocess import ImageTransform
from longclip_rt.model.tokenizer import Tokenizer
from longclip_rt.model.vocabulary import tokenizer_json
from longclip_rt.train.data.training_data import Batch, DataOptions, TrainingData, open_data

SIZE = 8


@lru_cache
def clip_tokenizer(context_length: int = 248) -> Tokenizer:
    return Tokenizer(_clip_vocabulary(), context_length)


@lru_cache
def _clip_vocabulary() -> tokenizers.Tokenizer:
    description = json.loads(tokenizer_json())
    description |= dict.fromkeys(("normalizer", "post_processor", "truncation", "padding"))
    description["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def picture(number: int) -> bytes:
    """A picture whose red tells its number, below 256, as PNG."""
    stream = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def cut_jpeg() -> bytes:
    """The first half of a photograph."""
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()[: len(stream.getvalue()) // 2]


def numbers_of(batch: Batch) -> list[int]:
    """What the pictures of a batch tell."""
    transform = ImageTransform(SIZE)
    red = batch.pixels[:, 0].mean(dim=(1, 2)).numpy() * transform.std[0] + transform.mean[0]
    return np.rint(red * 255).astype(int).tolist()


def caption(number: int) -> str:
    return f"Picture {number}. It is all red, of a red that no other one has."


def write_pairs(folder: Path, count: int, **changes: Any) -> Path:
    """A .jsonl of pairs with their pictures; a key "row_N" replaces the fields of row N, from 0."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(count):
        (folder / f"images/{number}.png").write_bytes(picture(number))
        row = {"image": f"images/{number}.png", "caption": caption(number)} | changes.get(f"row_{number}", {})
        lines.append(json.dumps(row))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, counts: Sequence[int]) -> Path:
    """Shards 000.tar, 001.tar ... of so many rows each; rows are numbered through."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        rows = range(number, number + count)
        members = [(f"{row:05}.png", picture(row)) for row in rows] + [(f"{row:05}.txt", _text(row)) for row in rows]
        write_tar(folder / f"{shard:03}.tar", sorted(members))
        number += count
    return folder


def _text(number: int) -> bytes:
    return caption(number).encode()


def opened(
    data: str | Path, batch_size: int = 8, *, rank: int = 0, world: int = 1, context: int = 248, **changes: Any
) -> TrainingData:
    size = 32 if str(data).startswith("scenes:") else SIZE
    options = DataOptions(str(data), batch_size, **{"workers": 0, **changes})
    return open_data(options, clip_tokenizer(context), ImageTransform(size), rank, world)


def assert_same(batches: list[Batch], others: list[Batch]) -> None:
    assert [batch.ids for batch in batches] == [batch.ids for batch in others]
    for batch, other in zip(batches, others, strict=True):
        torch.testing.assert_close(batch.pixels, other.pixels, rtol=0, atol=0)
        torch.testing.assert_close(batch.long_ids, other.long_ids, rtol=0, atol=0)
        torch.testing.assert_close(batch.short_ids, other.short_ids, rtol=0, atol=0)
