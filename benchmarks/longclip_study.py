"""Is Long-CLIP's claim true on procedural scenes? Six arms, three seeds, held-out scenes.

    python benchmarks/longclip_study.py                    # runs what is missing, then writes table, CSVs and plot
    python benchmarks/longclip_study.py --arm kps-long --seed 1
    python benchmarks/longclip_study.py --report           # only the table, CSVs and plot of what is there

All arms begin with one CLIP of 77 tokens, the first phase of `make tiny`, and are fine-tuned on the same scenes in the
same order; a seed chooses other scenes and another order. Every arm and seed is a training run of its own, which goes
on where it was stopped; its figures are kept as JSON in results/longclip_study/ when it ends, and a run that has
figures is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, save_table
from scene_tests import BIN, HELD_OUT, SCENES, TowerEncoders, measure

from longclip_rt.system.files import write_text_atomically
from longclip_rt.train.config import TrainConfig, preset_config
from longclip_rt.train.loop import train
from longclip_rt.train.run.results import WEIGHTS
from longclip_rt.train.scenes import scene

NAME = "longclip_study"
SEEDS = (0, 1, 2)
CLIP = "clip-77"
ARMS: dict[str, dict[str, Any]] = {
    CLIP: {},
    "direct-long": {"positions": "interpolate", "objective": "long"},
    "kps-long": {"positions": "kps", "objective": "long"},
    "kps-long-short": {"positions": "kps", "objective": "long+short"},
    "long-clip": {"positions": "kps", "objective": "longclip"},
    # 32 components hold 99.8% of the variance of a batch of this CLIP's image features, so that PCM leaves them as they
    # are; 8 hold 74%.
    "long-clip-8": {"positions": "kps", "objective": "longclip", "components": 8},
}
"""Name -> how it is fine-tuned: CLIP as it is; the paper's direct fine-tuning; KPS alone; without PCM; Long-CLIP; and
Long-CLIP with fewer components."""


STEPS = 100
"""Of 128 pairs, half of the scenes with a twin in the batch; `make tiny` fine-tunes six times as long."""


def config_of(arm: str, seed: int, clip: Path) -> TrainConfig:
    """The fine-tuning run of an arm."""
    return preset_config(
        "tiny-long",
        f"scenes:1000000@{100 + seed}?twins=0.5",
        weights=str(clip),
        seed=seed,
        steps=STEPS,
        validate_every=STEPS,
        checkpoint_every=50,
        keep_checkpoints=1,
        **ARMS[arm],
    )


def run_arm(arm: str, seed: int, clip: Path, runs: Path) -> None:
    """Trains an arm and keeps its figures; what is done is not repeated. The CLIP that all begin with is only measured.

    Args:
        arm: One of `ARMS`.
        seed: Of the scenes and their order.
        clip: Weights of the CLIP.
        runs: Folder of the runs.
    """
    target = RESULTS / NAME / (f"{arm}.json" if arm == CLIP else f"{arm}-{seed}.json")
    if target.is_file():
        return
    weights, seconds = clip, 0.0
    if arm != CLIP:
        print(f"{arm}, seed {seed}", flush=True)
        report = train(config_of(arm, seed, clip), runs / f"{arm}-{seed}", resume=True, device="cpu")
        weights, seconds = report.weights, report.seconds
    encoders = TowerEncoders(weights)
    figures, positions = measure(encoders)
    content = {
        "arm": arm,
        "seed": None if arm == CLIP else seed,
        "steps": 0 if arm == CLIP else STEPS,
        "minutes": round(seconds / 60, 1),
        "figures": figures,
        "positions": positions,
        "variance_kept": kept_variance(encoders),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(target, json.dumps(content, indent=1) + "\n")


def kept_variance(encoders: TowerEncoders) -> dict[str, float]:
    """The share of the variance of a batch's image features that the first components hold: what PCM keeps."""
    images = encoders.images([scene(HELD_OUT, index) for index in range(128)])
    variances = torch.linalg.svdvals(images - images.mean(dim=0)).square()
    return {str(k): round(float(variances[:k].sum() / variances.sum()), 4) for k in (2, 4, 8, 16, 32)}


def kept_results() -> list[dict[str, Any]]:
    """What has been measured so far."""
    files = sorted((RESULTS / NAME).glob("*.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return sorted(found, key=lambda one: (list(ARMS).index(one["arm"]), one["seed"] or 0))


def report(results: list[dict[str, Any]]) -> None:
    """Writes the CSVs and the plot, and prints the table."""
    rows = [
        {"arm": one["arm"], "seed": one["seed"], "minutes": one["minutes"]}
        | {name: round(value, 4) for name, value in one["figures"].items()}
        for one in results
    ]
    save_table(NAME, rows)
    save_table(
        f"{NAME}_positions",
        [
            {"arm": one["arm"], "seed": one["seed"]}
            | {
                "position": int(point["position"]),
                "accuracy": round(point["accuracy"], 4),
                "tests": int(point["tests"]),
            }
            for one in results
            for point in one["positions"]
        ],
    )
    print("\n".join(table_lines(results)))
    plot(results)


def table_lines(results: list[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table: the mean over seeds in percent, and the smallest and largest in brackets."""
    names = list(results[0]["figures"])
    yield f"| arm | seeds | {' | '.join(names)} |"
    yield f"|---|---|{'---|' * len(names)}"
    for arm in dict.fromkeys(one["arm"] for one in results):
        of_arm = [one for one in results if one["arm"] == arm]
        cells = [_spread([one["figures"][name] for one in of_arm]) for name in names]
        yield f"| {arm} | {len(of_arm)} | {' | '.join(cells)} |"


def _spread(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f}-{100 * max(values):.1f})"


def plot(results: list[dict[str, Any]]) -> None:
    """Draws results/longclip_study.png: the figures of each arm, and accuracy against a detail's position."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    names = list(results[0]["figures"])
    arms = list(dict.fromkeys(one["arm"] for one in results))
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        of_arm = [one for one in results if one["arm"] == arm]
        values = np.array([[one["figures"][name] for name in names] for one in of_arm]) * 100  # [seeds, figures]
        mean = values.mean(axis=0)
        error = np.stack([mean - values.min(axis=0), values.max(axis=0) - mean])
        at = np.arange(len(names)) + (number - (len(arms) - 1) / 2) * width
        bars.bar(at, mean, width, yerr=error, capsize=2, label=arm, color=f"C{number}")
        curve = _mean_curve(of_arm)
        centres = [position + BIN / 2 for position in curve]
        points = np.array(list(curve.values())) * 100  # [bins, 3]: mean, least, most
        curves.plot(centres, points[:, 0], marker="o", label=arm, color=f"C{number}")
        curves.fill_between(centres, points[:, 1], points[:, 2], alpha=0.15, color=f"C{number}")
    bars.set_xticks(np.arange(len(names)), [name.replace("_", "\n") for name in names], fontsize=8)
    bars.set_ylabel("% (mean of seeds; whiskers: least and most)")
    bars.set_title(f"{SCENES} held-out scenes")
    bars.legend(fontsize=8)
    for limit in (20, 77):
        curves.axvline(limit, color="0.7", linestyle=":")
    curves.axhline(50, color="0.7", linestyle="--")
    curves.set_xlabel("token position of the detail that tells twins apart (dotted: 20 and 77)")
    curves.set_ylabel("% of twins told apart (chance: 50)")
    curves.set_title("Effective length")
    figure.savefig(RESULTS / f"{NAME}.png", dpi=110)


def _mean_curve(of_arm: list[Mapping[str, Any]]) -> dict[float, tuple[float, float, float]]:
    """Bin -> mean, least and largest accuracy over seeds, for bins that every seed has with 50 tests or more."""
    found: dict[float, list[float]] = {}
    for one in of_arm:
        for point in one["positions"]:
            if point["tests"] >= 50:
                found.setdefault(point["position"], []).append(point["accuracy"])
    whole = {position: values for position, values in sorted(found.items()) if len(values) == len(of_arm)}
    return {position: (statistics.mean(values), min(values), max(values)) for position, values in whole.items()}


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS, action="append", help="only this arm; may be given several times")
    parser.add_argument("--seed", type=int, action="append", help="only this seed; may be given several times")
    parser.add_argument(
        "--clip", type=Path, default=Path("tiny/clip") / WEIGHTS, help="weights of the CLIP of 77 tokens"
    )
    parser.add_argument("--runs", type=Path, default=Path("tiny/study"), help="folder of the training runs")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.report:
        if not options.clip.is_file():
            parser.error(f"{options.clip} is not there. It is made by: make tiny")
        for seed in options.seed or SEEDS:
            for arm in options.arm or ARMS:
                run_arm(arm, seed, options.clip, options.runs)
    report(kept_results())


if __name__ == "__main__":
    main()
