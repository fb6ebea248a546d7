"""Inputs on the disk, and calls that embed them with the fake embedder."""

from __future__ import annotations

import json
import random
from pathlib import Path

from fake_embedder import FakeEmbedder
from PIL import Image

from longclip_rt.embedding.pipeline import EmbedOptions, embed_files

WORDS = ["a", "red", "cup", "of", "black", "coffee", "stands", "beside", "the", "window"]


def make_inputs() -> None:
    """Fills the working directory: a list of 30 images and texts, two of which cannot be embedded, and another list."""
    generator = random.Random(5)
    lines = ["# a comment", ""]
    Path("data").mkdir()
    for index in range(14):
        Image.new("RGB", (6, 5), (index * 9, 30, 200 - index)).save(f"data/{index}.png")
        Path(f"data/{index}.txt").write_text(" ".join(generator.choices(WORDS, k=generator.randint(1, 20))))
        lines += [f"data/{index}.png", f"data/{index}.txt"]
    Path("data/broken.jpg").write_bytes(b"\xff\xd8\xff and nothing more")
    lines[9:9] = ["data/broken.jpg"]
    lines[20:20] = ["data/absent.txt"]
    Path("files.txt").write_text("\n".join(lines) + "\n")
    Path("other.txt").write_text("data/3.png\ndata/3.txt\ndata/absent.txt\n")


def embed(output="out.parquet", embedder=None, sources=("files.txt",), progress=None, **options):
    options = {"shard_size": 9, "workers": 2, **options}
    return embed_files(list(sources), output, embedder or FakeEmbedder(), EmbedOptions(**options), progress)


def rejects(name="out.parquet.rejects.jsonl"):
    return [json.loads(line) for line in Path(name).read_bytes().splitlines()]


class Stop:
    """Progress that stops the run after some entries."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.after = after
        self.error = error
        self.begun: tuple[int, int] | None = None

    def begin(self, total, done, columns):
        self.begun = (total, done)

    def advance(self, entries):
        self.after -= entries
        if self.after <= 0:
            raise self.error
