"""One of two processes that train together; run by test_distributed.py with torchrun's variables in the environment.

    python two_processes.py FOLDER PORT PORT PORT

What it found is left in FOLDER as found-RANK.pt.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import torch
from train_case import batch_of, small_config, small_model

from longclip_rt.train.data.training_data import Batch
from longclip_rt.train.distributed import processes
from longclip_rt.train.loop import train
from longclip_rt.train.loss import Objective
from longclip_rt.train.step import backward

ROWS = 12
LONG = [60, 30, 100, 22, 9, 14, 40, 21, 5, 80, 33, 12]
# The second half has no token in the rows of the position table that are trained.
SHORT_HALF = [60, 30, 100, 22, 9, 14, 20, 3, 5, 20, 12, 7]
CASES = {
    "global": (Objective("longclip", 4, pcm_scope="global"), LONG, None),
    "global, chunks": (Objective("longclip", 4, pcm_scope="global"), LONG, 2),
    "local": (Objective("longclip", 4, pcm_scope="local"), LONG, None),
    "short half": (Objective("long"), SHORT_HALF, None),
}


def half(batch: Batch, rank: int) -> Batch:
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    return Batch(batch.pixels[rows], batch.long_ids[rows], batch.short_ids[rows])


def main(folder: Path, ports: list[str]) -> None:
    torch.set_num_threads(1)
    found: dict[str, object] = {}
    os.environ["MASTER_PORT"] = ports[0]
    with processes("auto") as procs:
        found["place"] = (procs.rank, procs.world, procs.main, str(procs.device))
        found["collected"] = procs.collect(f"from {procs.rank}")
        for name, (objective, lengths, chunk) in CASES.items():
            model = small_model("kps")
            losses = backward(model, half(batch_of(lengths), procs.rank), objective, procs, chunk=chunk)
            gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
            found[name] = (gradients, losses.long, losses.short)
    config = small_config(folder / "pairs/pairs.jsonl", folder / "clip.safetensors", pcm_scope="global", max_bad=0.5)
    for number, name in ((1, "report"), (2, "report again")):
        os.environ["MASTER_PORT"] = ports[number]
        report = train(config, folder / "run", resume=True, device="cpu", quiet=True)
        found[name] = dataclasses.asdict(report) | {"folder": None, "weights": None}
    torch.save(found, folder / f"found-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
