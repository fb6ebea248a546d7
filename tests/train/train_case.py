"""A model and runs small enough for tests of training."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_case import SIZE
from PIL import Image
from tiny_models import token_ids

from longclip_rt.model.architecture import CLIP_CONTEXT_LENGTH, Architecture
from longclip_rt.train.config import TrainConfig
from longclip_rt.train.data.training_data import Batch
from longclip_rt.train.loop import TrainReport, train
from longclip_rt.train.model import Stretch, TrainableClip
from longclip_rt.train.run.results import WEIGHTS
from longclip_rt.weights.checkpoint import Checkpoint
from longclip_rt.weights.convert import write_weights
from longclip_rt.weights.files import read_weights
from longclip_rt.weights.random import random_state_dict

VOCABULARY = 600
# The embedding is wider than a test's batch has components, so that PCM is no identity.
SMALL = Architecture(
    image_size=SIZE,
    patch_size=4,
    vision_width=32,
    vision_layers=1,
    text_width=32,
    text_layers=2,
    embed_dim=48,
    vocab_size=VOCABULARY,
    context_length=CLIP_CONTEXT_LENGTH,
    vision_head_width=16,
    text_head_width=16,
)


def small_model(stretch: Stretch = "kps", seed: int = 0, **options: Any) -> TrainableClip:
    return TrainableClip(SMALL, random_state_dict(SMALL, seed), stretch=stretch, **options)


def clip_weights(path: Path, seed: int = 0, **changes: Any) -> Path:
    """A file of weights of the small model, as CLIP with 77 tokens unless it is changed."""
    architecture = dataclasses.replace(SMALL, **changes)
    weights = random_state_dict(architecture, seed)
    write_weights(Checkpoint(weights, architecture, "small", None, trained=True), weights, path)
    return path


def batch_of(long_lengths: list[int], short_lengths: list[int] | None = None, seed: int = 0) -> Batch:
    """Random pixels and tokens; texts of the given lengths, padded to a multiple of 8."""
    short_lengths = short_lengths or [5 + place % 9 for place in range(len(long_lengths))]
    generator = torch.Generator().manual_seed(seed)

    def texts(lengths: list[int], seed: int) -> torch.Tensor:
        width = -(-max(lengths) // 8) * 8
        return token_ids(lengths, width, seed=seed, vocab_size=VOCABULARY)

    pixels = torch.randn(len(long_lengths), 3, SIZE, SIZE, generator=generator)
    return Batch(pixels, texts(long_lengths, seed + 1), texts(short_lengths, seed + 2))


def small_config(data: Path | str, weights: Path, **changes: Any) -> TrainConfig:
    """A run of 24 steps, 8 pairs each, with all of Long-CLIP's parts at work."""
    settings: dict[str, Any] = {
        "components": 4,
        "batch_size": 8,
        "steps": 24,
        "lr": 1e-3,
        "warmup_steps": 3,
        "precision": "fp32",
        "workers": 0,
        "val_rows": 8,
        "validate_every": 5,
        "checkpoint_every": 7,
    }
    return TrainConfig(data=str(data), weights=str(weights), **(settings | changes))


def program_path() -> str:
    """PYTHONPATH for a program of this folder, which needs the folders that pytest adds itself."""
    here = Path(__file__).parent
    return os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def write_patterns(folder: Path, count: int) -> Path:
    """A .jsonl of pairs that are easy to learn: pictures of noise, each with words of its own."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    lines = []
    for number in range(count):
        pixels = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        words = ["".join(generator.choice(list("abcdefgh"), 3)) for _ in range(12)]
        caption = f"{' '.join(words[:3])}. {' '.join(words)}."
        lines.append(json.dumps({"image": f"{number}.png", "caption": caption}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "pairs.jsonl"


def run(material: Path, folder: Path, *, resume: bool = False, **changes: Any) -> TrainReport:
    config = small_config(material / "pairs/pairs.jsonl", material / "clip.safetensors", **changes)
    return train(config, folder, resume=resume, device="cpu", quiet=True)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    content: dict[str, torch.Tensor] = read_weights(folder / WEIGHTS).content
    return content


def assert_same_weights(folder: Path, other: Path) -> None:
    found, expected = tensors(folder), tensors(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
