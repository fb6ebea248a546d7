"""Trains the built-in model from nothing, in phases: each is a run of the trainer that begins where the last one ended.

    python benchmarks/train_tiny.py        # what is missing of tiny/; goes on where it was stopped

First kinds: single things, eight in a row that differ in their kind alone, and captions that name it alone. The text
tower is frozen, as it came from the dice: beside pictures that do not tell kinds apart as yet it learns that all kinds
are one (measured: cosine similarities of 0.9999), and then nothing teaches the image tower. Then scenes in CLIP's 77
tokens, and in Long-CLIP's 248; at last every scene beside a twin that differs from it in one detail, without label
smoothing, which keeps two captions apart from each other no more than from any other.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longclip_rt.system import machine
from longclip_rt.system.files import write_text_atomically
from longclip_rt.train.config import TrainConfig, preset_config
from longclip_rt.train.loop import train
from longclip_rt.train.run.results import WEIGHTS

RUN_FILE = "run.json"
"""What was trained: of each phase its name, configuration, steps, seconds and hardware."""


@dataclass(frozen=True)
class Phase:
    """One run of the trainer.

    Attributes:
        name: Its folder.
        preset: Of `longclip_rt.train.config.PRESETS`.
        data: Its scenes.
        steps: How many.
        changes: To the preset.
    """

    name: str
    preset: str
    data: str
    steps: int
    changes: dict[str, Any] = field(default_factory=dict)


PHASES = (
    Phase(
        "kinds",
        "tiny",
        "scenes:1000000@4?things=1&alike=8&captions=short&prompts=1",
        800,
        {"frozen": "text", "logit_scale": 4.6, "warmup_steps": 50},
    ),
    Phase("clip", "tiny", "scenes:1000000@1?things=1-7&alike=4&captions=prefix&prompts=0.25", 3000),
    Phase("long", "tiny-long", "scenes:1000000@2?things=4-9&twins=0.5&prompts=0.25", 1000),
    Phase(
        "details",
        "tiny-long",
        "scenes:1000000@6?things=2-6&alike=4&by=detail&prompts=0.25",
        1500,
        {"positions": "none", "label_smoothing": 0.0, "logit_scale": 4.0, "lr": 1e-3, "warmup_steps": 100},
    ),
)


def config_of(place: int, out: Path, workers: int | None) -> TrainConfig:
    """The run of a phase."""
    phase = PHASES[place]
    weights = str(out / PHASES[place - 1].name / WEIGHTS) if place else None
    changes = {"validate_every": 1000, "val_rows": 64, "checkpoint_every": 50} | phase.changes
    return preset_config(phase.preset, phase.data, weights=weights, workers=workers, steps=phase.steps, **changes)


def main() -> None:
    """Runs what is missing, and prints how long all of it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny"), metavar="DIR")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, help="processes that draw scenes")
    options = parser.parse_args()
    file = options.out / RUN_FILE
    done: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    for place in range(len(done), len(PHASES)):
        phase = PHASES[place]
        print(f"{phase.name}: {phase.steps} steps", flush=True)
        config = config_of(place, options.out, options.workers)
        report = train(config, options.out / phase.name, resume=True, device=options.device)
        on_gpu = options.device != "cpu" and torch.cuda.is_available()
        done.append(
            {
                "name": phase.name,
                "config": config.to_dict(),
                "steps": report.steps,
                "seconds": round(report.seconds, 1),
                "hardware": torch.cuda.get_device_name() if on_gpu else machine.cpu_name(),
                "torch": torch.__version__,
            }
        )
        write_text_atomically(file, json.dumps(done, indent=1) + "\n")
    for one in done:
        pairs = one["steps"] * one["config"]["batch_size"]
        print(f"{one['name']}: {one['steps']} steps, {pairs:,} pairs, {one['seconds'] / 60:.1f} min, {one['hardware']}")
    print(f"{sum(one['seconds'] for one in done) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
