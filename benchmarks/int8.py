"""What does int8 gain on this CPU, and what does it lose?

    python benchmarks/int8.py --bundle demo/vit-b-16

Two tables. Speed, of the bundle: a copy of it is quantised as `export --int8` does, on the sample that ships;
fp32, bf16 and int8 then take turns on batches of 8 photographs and of texts of 16 and 248 tokens, with the fidelity
that the report of the export would hold. Loss, of the built-in model, whose vectors mean something: R@1 on drawn scenes
that it never saw, in each precision. Writes results/int8.csv and results/int8_recall.csv.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import median_ratio, rates_in_turns, save_table
from scene_tests import HELD_OUT

from longclip_rt import Embedder
from longclip_rt.backends.base import Backend
from longclip_rt.bundle.bundle import BUILT_IN, Bundle, load_bundle, write_manifest
from longclip_rt.export.int8 import write_int8
from longclip_rt.metrics import retrieval
from longclip_rt.opening import availability, open_backend
from longclip_rt.train.scenes import long_caption, render, scene

SCENES = 500


def with_int8(source: Path, target: Path) -> Bundle:
    """A copy of a bundle, with int8."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("engines", "*.fp16.*"))
    fields = json.loads((target / "bundle.json").read_text(encoding="utf-8"))
    fields["precisions"] = ["fp32"]
    bundle = Bundle(target, {**fields, "files": {}})
    fields["int8"], _ = write_int8(bundle, None, lambda stage: print(stage, flush=True))
    write_manifest(target, {key: value for key, value in fields.items() if key not in ("files", "content", "format")})
    return load_bundle(target)


def speeds(bundle: Bundle, precisions: list[str], rounds: int) -> list[dict[str, object]]:
    """A row each of tower, shape and precision."""
    rng = np.random.default_rng(0)
    architecture = bundle.architecture
    size = architecture.image_size
    inputs: dict[str, tuple[str, list[Any]]] = {
        "8 photographs": ("image", [rng.standard_normal((8, 3, size, size), np.float32) for _ in range(4)])
    }
    for length in (16, architecture.context_length):
        ids = rng.integers(1, architecture.eot_id - 1, (4, 8, length), dtype=np.int32)
        ids[..., -1] = architecture.eot_id
        inputs[f"8 texts of {length} tokens"] = ("text", list(ids))
    backends = {precision: open_backend(bundle, "openvino", precision) for precision in precisions}
    fidelity = bundle.manifest["int8"]["fidelity"]
    rows: list[dict[str, object]] = []

    def run(backend: Backend, tower: str, batches: list[Any]) -> None:
        with ThreadPoolExecutor(backend.concurrency) as pool:
            list(pool.map(lambda batch: backend.run(tower, batch), batches))

    for what, (tower, batches) in inputs.items():
        runs = {
            precision: (partial(run, backend, tower, batches), sum(map(len, batches)))
            for precision, backend in backends.items()
        }
        rates = rates_in_turns(runs, rounds)
        for precision in precisions:
            of_int8 = fidelity[tower] if precision == "int8" else {}
            rows.append(
                {
                    "model": bundle.name,
                    "what": what,
                    "precision": precision,
                    "rate by fp32's": f"{median_ratio(rates[precision], rates['fp32']):.2f}",
                    "alpha": bundle.manifest["int8"]["alphas"][tower] if of_int8 else "",
                    "mean cosine": of_int8.get("mean", ""),
                    "worst cosine": of_int8.get("worst", ""),
                    "same neighbour": of_int8.get("same_neighbour", ""),
                    "same first answer": of_int8.get("same_first", ""),
                }
            )
    for backend in backends.values():
        backend.close()
    return rows


def recalls(bundle: Bundle, precisions: list[str]) -> list[dict[str, object]]:
    """A row a precision: R@1 of drawn scenes and their long captions."""
    scenes = [scene(HELD_OUT, index) for index in range(SCENES)]
    captions = [long_caption(one) for one in scenes]
    rows: list[dict[str, object]] = []
    for precision in precisions:
        with Embedder(bundle, open_backend(bundle, "openvino", precision)) as embedder:
            images = embedder.embed_images([render(one, embedder.image_size) for one in scenes])
            found = retrieval(images, embedder.embed_texts(captions), k=(1,))
        figures = {name: f"{value:.3f}" for name, value in found.items()}
        rows.append({"model": bundle.name, "scenes": SCENES, "precision": precision, **figures})
    return rows


def main() -> None:
    """Measures and saves the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    precisions = ["fp32", *(each for each in availability("openvino").precisions if each == "bf16"), "int8"]
    with tempfile.TemporaryDirectory() as folder:
        save_table("int8_recall", recalls(with_int8(BUILT_IN, Path(folder) / "built-in"), precisions))
        save_table("int8", speeds(with_int8(arguments.bundle, Path(folder) / "bundle"), precisions, arguments.rounds))


if __name__ == "__main__":
    main()
