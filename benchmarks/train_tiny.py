"""Trains the built-in model from nothing: single things, then scenes in CLIP's 77 tokens, then long captions.

    python benchmarks/train_tiny.py                            # what is missing of tiny/; goes on where it was stopped
    python benchmarks/train_tiny.py --workers 15 --seconds 200  # about so long in all, on a fast machine

A tower that sees scenes at once learns their colours and no shape: colour alone tells nearly all of them apart. So the
first phase shows one thing at a time, eight in a row that differ in their kind and nothing else, and in the second
every scene stands beside one that differs in its main thing's kind.
"""

from __future__ import annotations

import argparse
import json
import time
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

BATCH = 256
_SET_UP = 10.0  # Seconds that a phase takes beside its steps.


@dataclass(frozen=True)
class Phase:
    """One run of the trainer.

    Attributes:
        name: Its folder.
        preset: Of `longclip_rt.train.config.PRESETS`.
        data: Its scenes.
        steps: How many where no time is given.
        share: The part of the time left that its steps may take where one is given.
        slower: What a step costs, as a multiple of what one cost in the phase before.
        changes: To the preset.
    """

    name: str
    preset: str
    data: str
    steps: int
    share: float
    slower: float
    changes: dict[str, Any] = field(default_factory=dict)


PHASES = (
    Phase("kinds", "tiny", "scenes:1000000@0?things=1&alike=8&captions=short&prompts=0.3", 600, 0.2, 1.0),
    Phase(
        "clip",
        "tiny",
        "scenes:1000000@1?things=1-6&alike=4&captions=prefix&prompts=0.3",
        1000,
        0.3,
        1.0,
    ),
    Phase(
        "long",
        "tiny-long",
        "scenes:1000000@2?things=2-9&twins=1&prompts=0.3",
        1500,
        1.0,
        1.3,
        {"label_smoothing": 0.0},
    ),
)


def config_of(place: int, out: Path, workers: int | None, steps: int) -> TrainConfig:
    """The run of a phase; each begins with the weights of the one before."""
    phase = PHASES[place]
    weights = str(out / PHASES[place - 1].name / WEIGHTS) if place else None
    changes = {
        "batch_size": BATCH,
        "warmup_steps": 50,
        "val_rows": 256,
        "validate_every": 500,
        "checkpoint_every": 100,
    } | phase.changes
    return preset_config(phase.preset, phase.data, weights=weights, workers=workers, steps=steps, **changes)


def fitting_steps(phase: Phase, last: dict[str, Any], left: float) -> int:
    """Steps that the phase's share of some seconds allows, by what a step cost in the phase before."""
    a_step = phase.slower * last["seconds"] / last["steps"]
    return max(50, int((left * phase.share - _SET_UP) / a_step))


def main() -> None:
    """Runs what is missing, and prints how long all of it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny"), metavar="DIR")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, help="processes that draw scenes")
    parser.add_argument("--seconds", type=float, help="choose the steps of the later phases so that all take so long")
    options = parser.parse_args()
    began = time.monotonic()
    file = options.out / RUN_FILE
    done: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    for place in range(len(done), len(PHASES)):
        phase, steps = PHASES[place], PHASES[place].steps
        folder = options.out / phase.name
        if options.seconds is not None and place:
            steps = fitting_steps(phase, done[-1], options.seconds - (time.monotonic() - began))
        print(f"{phase.name}: {steps} steps", flush=True)
        config = config_of(place, options.out, options.workers, steps)
        report = train(config, folder, resume=True, device=options.device)
        on_gpu = options.device != "cpu" and torch.cuda.is_available()
        hardware = torch.cuda.get_device_name() if on_gpu else machine.cpu_name()
        done.append(
            {
                "name": phase.name,
                "config": config.to_dict(),
                "steps": report.steps,
                "seconds": round(report.seconds, 1),
                "hardware": hardware,
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
