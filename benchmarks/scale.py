"""How long 10 million and 1 billion images take, and what they fill: computed from the measured rates of one actor.

    python benchmarks/scale.py        # writes the tables into docs/scale.md

Nothing is measured here. The rate of a CPU actor is that of `embed` in results/end_to_end.csv (2 cores; reading,
decoding and writing included); that of a GPU actor is the encoder's alone in results/gpu_latency_ViT-B-16.csv, so that
its figures hold only where enough cores decode for it.
"""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- computed by benchmarks/scale.py -->\n", "<!-- end -->\n"
SIZES = {"10 million": 10**7, "1 billion": 10**9}
DIM = 512  # of ViT-B/16
PART = 2048


def rates() -> dict[str, float]:
    """Images a second of one actor."""
    cpu = next(row for row in _rows("end_to_end.csv") if row["way"] == "embed")
    gpu = next(
        row
        for row in _rows("gpu_latency_ViT-B-16.csv")
        if (row["precision"], row["tower"], row["batch"]) == ("fp16", "image", "64")
    )
    return {
        "CPU, 2 cores, bf16": float(cpu["photographs per second"]),
        "H100, fp16, the encoder alone": float(gpu["ours per second"]),
    }


def _rows(name: str) -> list[dict[str, str]]:
    lines = (ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def tables() -> str:
    """The tables as Markdown."""
    lines = [
        "| one actor, ViT-B/16 | images a second | " + " | ".join(f"{size}, hours of one" for size in SIZES) + " |"
    ]
    lines.append("|---|---|" + "---|" * len(SIZES))
    for name, rate in rates().items():
        hours = (f"{count / rate / 3600:,.1f}" for count in SIZES.values())
        lines.append(f"| {name} | {rate:,.1f} | {' | '.join(hours)} |")
    lines += ["", "| | " + " | ".join(SIZES) + " |", "|---|" + "---|" * len(SIZES)]
    for dtype, width in (("float32", 4), ("float16", 2)):
        sizes = (f"{count * DIM * width / 10**9:,.0f} GB" for count in SIZES.values())
        lines.append(f"| vectors of {DIM} numbers, {dtype} | {' | '.join(sizes)} |")
    lines.append(f"| parts of {PART:,} entries | {' | '.join(f'{-(-count // PART):,}' for count in SIZES.values())} |")
    codes = (f"{count * DIM // 4 / 10**9:,.0f} GB" for count in SIZES.values())
    lines.append(f"| IVF-PQ codes, a byte for four numbers | {' | '.join(codes)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Puts the tables into the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}{tables()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
