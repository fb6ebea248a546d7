"""How fast is `--backend torch` on this GPU, against open_clip's own model with every text at 248 tokens?

    python benchmarks/gpu_latency.py [--model ViT-B-16] [--seconds 0.3] [--onnxruntime DIR]

Needs an NVIDIA GPU. Weights come from a seed: their values do not matter to time. Ours: trimmed texts, CUDA graphs,
and the copies in and out of each batch counted, of images as uint8 crops. The other: open_clip in the same precision,
an operator at a time, with normalised inputs that are on the GPU already, and embeddings left there. Each case is
warmed up, then all ways take turns over new inputs; the table has ratios first, then median, 90th and 99th percentile
of a batch in milliseconds, and rates. With --onnxruntime the backend onnxruntime-cuda takes part, on graphs exported
for it, with the copies of its batches counted too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import save_table

from longclip_rt.backends.torch import TorchBackend
from longclip_rt.model.preprocess import ImageTransform
from longclip_rt.model.towers import open_clip_model
from longclip_rt.weights.checkpoint import Checkpoint, load_checkpoint

CASES = (("image", 1, 0), ("image", 64, 0), ("text", 1, 20), ("text", 64, 20), ("text", 64, 77), ("text", 64, 248))
"""Tower, rows, tokens of a text."""

INPUTS = 8  # that take turns


class Seeded(TorchBackend):
    """The backend around weights from a seed, without a bundle on the disk."""

    def __init__(self, checkpoint: Checkpoint, precision: str) -> None:
        manifest = {"source": {"weights": checkpoint.source, "sha256": checkpoint.sha256, "activation": None}}
        names = {"text": ("text_embeds",), "image": ("image_embeds",)}
        bundle: Any = SimpleNamespace(
            manifest=manifest,
            architecture=checkpoint.architecture,
            pca=None,
            outputs=names.__getitem__,
            transform=ImageTransform(checkpoint.architecture.image_size),
        )
        super().__init__(bundle, precision, 0)


class SeededGraphs:
    """The backend onnxruntime-cuda around graphs exported from weights from a seed."""

    def __init__(self, checkpoint: Checkpoint, precision: str, folder: Path) -> None:
        from longclip_rt.backends.onnxruntime import OnnxRuntimeCudaBackend
        from longclip_rt.export.onnx import export_tower
        from longclip_rt.export.precision import half_tower
        from longclip_rt.weights.checkpoint import towers_from_checkpoint

        paths = {kind: folder / f"{kind}.{precision}.onnx" for kind in ("text", "image")}
        for tower in towers_from_checkpoint(checkpoint):
            if not paths[tower.kind].is_file():
                export_tower(half_tower(tower) if precision == "fp16" else tower, paths[tower.kind])
        bundle: Any = SimpleNamespace(
            architecture=checkpoint.architecture,
            path=folder,
            outputs={"text": ("text_embeds",), "image": ("image_embeds",)}.__getitem__,
            onnx=lambda kind, _: paths[kind],
            transform=ImageTransform(checkpoint.architecture.image_size),
        )
        self.backend = OnnxRuntimeCudaBackend(bundle, precision, 0)

    def run(self, tower: str, inputs: np.ndarray) -> object:
        """From ids or crops to embeddings, as an Embedder does it."""
        return self.backend.run(tower, inputs if tower == "text" else self.backend.images(inputs))


def inputs_of(checkpoint: Checkpoint, tower: str, rows: int, tokens: int, seed: int) -> np.ndarray:
    """Random ids that end with EOT, or noise in the place of a cropped photograph, uint8."""
    rng = np.random.default_rng(seed)
    arch = checkpoint.architecture
    if tower == "image":
        return rng.integers(0, 256, (rows, arch.image_size, arch.image_size, 3), dtype=np.uint8)
    ids = rng.integers(1, arch.eot_id - 1, (rows, tokens)).astype(np.int32)
    ids[:, -1] = arch.eot_id
    return ids


def reference(checkpoint: Checkpoint, precision: str) -> Callable[[str, np.ndarray], Callable[[], object]]:
    """open_clip's model on the GPU, in eager mode; texts padded to the context."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    model = open_clip_model(checkpoint.architecture, checkpoint.state_dict)
    length = checkpoint.architecture.context_length
    mask = torch.full((length, length), float("-inf")).triu_(1)
    model.attn_mask = mask  # the model was built without data for it
    model = model.to("cuda", dtype)

    def prepared(tower: str, inputs: np.ndarray) -> Callable[[], object]:
        if tower == "image":
            pixels = torch.from_numpy(ImageTransform(inputs.shape[1]).normalize(inputs)).to("cuda", dtype)
            return lambda: model.encode_image(pixels, normalize=True)
        ids = torch.zeros(len(inputs), length, dtype=torch.int64, device="cuda")
        ids[:, : inputs.shape[1]] = torch.from_numpy(inputs).to("cuda")
        return lambda: model.encode_text(ids, normalize=True)

    return prepared


def milliseconds(ways: list[list[Callable[[], object]]], seconds: float) -> list[np.ndarray]:
    """The time of each batch, way by way in turns, on the wall between two synchronisations."""
    for way in ways:
        for run in (*way, *way):
            run()
    torch.cuda.synchronize()
    times: list[list[float]] = [[] for _ in ways]
    end = time.perf_counter() + seconds * len(ways)
    turn = 0
    while time.perf_counter() < end or turn < 10:
        for index, way in enumerate(ways):
            start = time.perf_counter()
            way[turn % len(way)]()
            torch.cuda.synchronize()
            times[index].append(1e3 * (time.perf_counter() - start))
        turn += 1
    return [np.array(each) for each in times]


def main() -> None:
    """Times every case, and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--precisions", nargs="+", default=["fp16", "fp32"])
    parser.add_argument("--seconds", type=float, default=0.3, help="of each way of each case")
    parser.add_argument("--onnxruntime", type=Path, metavar="DIR", help="where graphs for onnxruntime-cuda are or go")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs an NVIDIA GPU, and PyTorch sees none here.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, for both
    checkpoint = load_checkpoint(f"random:{options.model}@0")
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.used"
    card = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    rows = []
    for precision in options.precisions:
        ours, theirs = Seeded(checkpoint, precision), reference(checkpoint, precision)
        graphs = SeededGraphs(checkpoint, precision, options.onnxruntime) if options.onnxruntime else None
        for tower, count, tokens in CASES:
            given = [inputs_of(checkpoint, tower, count, tokens, seed) for seed in range(INPUTS)]
            with torch.inference_mode():
                mine = [lambda one=one: ours.run(tower, one) for one in given]  # type: ignore[misc]  # noqa: B023
                ways = [mine, [theirs(tower, one) for one in given]]
                if graphs is not None:
                    ways.append([lambda one=one: graphs.run(tower, one) for one in given])  # type: ignore[misc]  # noqa: B023
                got, other, *third = milliseconds(ways, options.seconds)
            rows.append(
                {
                    "model": options.model, "precision": precision, "tower": tower, "batch": count, "tokens": tokens,
                    "ratio": f"{np.median(other) / np.median(got):.2f}",
                    **{f"ours p{q} ms": f"{np.percentile(got, q):.3f}" for q in (50, 90, 99)},
                    **{f"open_clip p{q} ms": f"{np.percentile(other, q):.3f}" for q in (50, 90, 99)},
                    "ours per second": f"{1e3 * count / np.median(got):.0f}",
                    "open_clip per second": f"{1e3 * count / np.median(other):.0f}",
                    **{f"onnxruntime p{q} ms": f"{np.percentile(each, q):.3f}" for each in third for q in (50, 90, 99)},
                    "batches": len(got), "card, driver, clocks, memory": card,
                }
            )  # fmt: skip
            print(*rows[-1].values(), sep="  ", file=sys.stderr, flush=True)
    save_table(f"gpu_latency{'_onnxruntime' if options.onnxruntime else ''}_{options.model}", rows)


if __name__ == "__main__":
    main()
