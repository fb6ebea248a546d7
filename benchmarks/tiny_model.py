"""The built-in model: exports what `make tiny` trained to longclip_rt/assets/tiny/, measures it, and writes its card.

python benchmarks/tiny_model.py                       # measures the built-in bundle and prints the table
python benchmarks/tiny_model.py --from-run tiny       # exports what train_tiny.py made first, in place of that
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from common import RESULTS, save_table
from scene_tests import BIN, LATE, SCENES, BundleEncoders, measure
from train_tiny import PHASES, RUN_FILE

from longclip_rt.bundle.bundle import BUILT_IN, rename_weights
from longclip_rt.bundle.samples import example_captions
from longclip_rt.export.exporter import ExportOptions, export_bundle
from longclip_rt.metrics import retrieval
from longclip_rt.runtime import Embedder
from longclip_rt.train.run.card import CARD_FILE, ModelCard, TrainingFacts, write_model_card
from longclip_rt.train.run.results import WEIGHTS

NAME = "tiny_model"
WEIGHTS_NAME = "tiny.safetensors"

_SUMMARY = (
    "A small Long-CLIP that comes with longclip-rt, so that everything can be tried without a download. It knows "
    "procedural scenes and nothing else: 24 kinds of things in 10 colours, 5 textures and 3 sizes before 8 backgrounds "
    "(`longclip_rt.train.scenes`). It was trained from random weights, first as a CLIP of 77 tokens, then as a "
    "Long-CLIP of 248, by `make tiny`. Its vocabulary is CLIP's, cut to its first 7,678 merges."
)
_LIMITS = (
    "**It knows nothing about photographs: it never saw one.** The table says how many of the package's 11 real "
    "photographs their captions find all the same; what carries over is a colour here and there. It knows colours, "
    "textures and places of drawn things, and what a caption says first better than what it says last; it has hardly "
    "learnt shapes (the kinds of things). Use it to try the tools, in tests and in examples; for anything else export "
    "real weights, such as `BeichenZhang/LongCLIP-B`."
)

_USAGE = """It is a bundle, and the default where no other was exported:

```
pip install .    # in a checkout of longclip-rt
longclip-rt embed images.txt -o images.parquet
longclip-rt search images.parquet "a long description of what to find"
```"""


def export(run: Path) -> None:
    """Puts a run's weights, exported in fp32 and fp16, in the place of the built-in bundle."""
    staging = BUILT_IN.with_name(".tiny.new")
    shutil.rmtree(staging, ignore_errors=True)
    export_bundle(ExportOptions(str(run / PHASES[-1].name / WEIGHTS), staging, fp16=True), progress=print)
    rename_weights(staging, WEIGHTS_NAME)
    shutil.rmtree(BUILT_IN, ignore_errors=True)
    staging.rename(BUILT_IN)


def photographs(embedder: Embedder) -> float:
    """Share of the real photographs that their long captions find among all of them."""
    captions = example_captions()
    images = embedder.embed_images([caption.photo for caption in captions])
    texts = embedder.embed_texts([caption.long for caption in captions])
    return retrieval(images, texts, k=(1,))["t2i_r1"]


def card(run: Path, rows: list[dict[str, object]]) -> ModelCard:
    """The model card of what `train_tiny.py` trained, and what was measured of its bundle."""
    phases = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    last = phases[-1]["config"]
    facts = TrainingFacts(
        data=", then ".join(f"`{one['config']['data']}`" for one in phases) + ": new scenes at every step",
        rows=sum(one["steps"] * one["config"]["batch_size"] for one in phases),
        seed=last["seed"],
        steps=sum(one["steps"] for one in phases),
        batch_size=last["batch_size"],
        precision=last["precision"],
        hardware=", then ".join(dict.fromkeys(one["hardware"] for one in phases)),
        seconds=sum(one["seconds"] for one in phases),
        versions={"torch": phases[-1]["torch"]},
    )
    return ModelCard(
        "Long-CLIP tiny, longclip-rt's built-in model",
        _SUMMARY,
        facts,
        _LIMITS,
        config={one["name"]: one["config"] for one in phases},
        figures=[(str(row["what"]), f"{100 * float(str(row['value'])):.1f}%") for row in rows],
        usage=_USAGE,
    )


def measured(embedder: Embedder) -> list[dict[str, object]]:
    """What is measured, its value as a fraction, and on how many tests."""
    figures, positions = measure(BundleEncoders(embedder))
    names = {
        "long_i2t_r1": "long captions: image to text, R@1 of 1,000 held-out scenes",
        "long_t2i_r1": "long captions: text to image, R@1",
        "short_i2t_r1": "short captions: image to text, R@1",
        "short_t2i_r1": "short captions: text to image, R@1",
        "zero_shot": "kind of the main thing among 24, zero-shot (chance: 4%)",
        "zero_shot_colour": "colour of the main thing among 10, zero-shot (chance: 10%)",
        "detail": "twins that differ in one colour or texture told apart (chance: 50%)",
        "detail_kind": "twins that differ in the kind of the last thing told apart (chance: 50%)",
    }
    rows: list[dict[str, object]] = [
        {"what": names[name], "value": round(value, 4), "tests": SCENES} for name, value in figures.items()
    ]
    early = sum(point["tests"] for point in positions if point["position"] < LATE)
    next(row for row in rows if row["what"] == names["detail"])["tests"] = int(early)
    for point in positions:
        if point["tests"] >= 50:
            first = int(point["position"])
            what = f"  detail at tokens {first} to {first + BIN - 1}"
            rows.append({"what": what, "value": round(point["accuracy"], 4), "tests": int(point["tests"])})
    rows.append(
        {
            "what": "real photographs: long caption to image, R@1 of 11 (chance: 9%)",
            "value": round(photographs(embedder), 4),
            "tests": 11,
        }
    )
    return rows


def main() -> None:
    """Exports where that was asked for; measures; writes results/tiny_model.csv and, after an export, the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from-run", type=Path, metavar="DIR", help="folder of train_tiny.py to export from")
    options = parser.parse_args()
    if options.from_run is not None:
        export(options.from_run)
    embedder = Embedder.from_bundle(BUILT_IN)
    rows = measured(embedder)
    save_table(NAME, [{**row, **{key: embedder.describe()[key] for key in ("backend", "precision")}} for row in rows])
    if options.from_run is not None:
        write_model_card(BUILT_IN / CARD_FILE, card(options.from_run, rows))
        size = sum(file.stat().st_size for file in BUILT_IN.iterdir())
        print(json.dumps({"bytes": size, "results": str(RESULTS / f"{NAME}.csv")}))


if __name__ == "__main__":
    main()
