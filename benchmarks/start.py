"""How long does `longclip-rt embed` of one photograph take, from the second time on?

    python benchmarks/start.py --bundle demo/vit-b-16 [--before CHECKOUT]

Each command is a fresh process, from its start to its end; the first of each way, which hashes the bundle, does not
count. The ways take turns: the bundle as it is, with its graphs' weights beside them; a copy with the weights inside;
and, with --before, that copy with the code of another checkout of this project. Processor time is what all threads
used together: on a machine with other work it says more than the seconds on the clock. Writes results/start.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import save_table

from longclip_rt.bundle.bundle import load_bundle, write_manifest
from longclip_rt.bundle.samples import example_photos

CODE = Path(__file__).parents[1]


def copy_with_weights_inside(bundle: Path, target: Path) -> Path:
    """A copy of a bundle whose graphs hold their weights themselves."""
    import onnx

    shutil.copytree(bundle, target, ignore=shutil.ignore_patterns("*.data", "engines"))
    for graph in target.glob("*.onnx"):
        onnx.save(onnx.load(bundle / graph.name), graph)
    fields = json.loads((target / "bundle.json").read_text(encoding="utf-8"))
    write_manifest(target, {key: value for key, value in fields.items() if key not in ("files", "content", "format")})
    return target


def embed_once(code: Path, bundle: Path, folder: Path) -> tuple[float, float, float]:
    """Embeds one photograph in a fresh process; returns seconds, processor seconds, and peak memory in MiB."""
    out = folder / "out.parquet"
    command = [sys.executable, "-m", "longclip_rt", "embed", str(example_photos()[0]), "-o", str(out), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(code), "XDG_CACHE_HOME": str(folder / "cache")}
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--bundle", str(bundle)], cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    assert process.stderr is not None
    if status:
        raise SystemExit(process.stderr.read().decode())
    out.unlink()
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024  # Linux counts in KiB


def main() -> None:
    """Measures and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="Another checkout, to compare with.")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    name = load_bundle(arguments.bundle).name
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inside = copy_with_weights_inside(arguments.bundle, folder / "inside")
        ways = {"weights inside": (CODE, inside), "weights beside": (CODE, arguments.bundle.resolve())}
        if arguments.before:
            ways = {"before": (arguments.before.resolve(), inside), **ways}
        runs: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
        for turn in range(arguments.rounds + 1):
            for way, (code, bundle) in ways.items():
                measured = embed_once(code, bundle, folder)
                if turn:
                    runs[way].append(measured)
    first = next(iter(runs))
    rows = []
    for way, measured in runs.items():
        seconds, busy, memory = (statistics.median(column) for column in zip(*measured, strict=True))
        ratios = [ours[1] / theirs[1] for ours, theirs in zip(measured, runs[first], strict=True)]
        rows.append(
            {
                "model": name,
                "way": way,
                "seconds": f"{seconds:.2f}",
                "least seconds": f"{min(each[0] for each in measured):.2f}",
                "processor seconds": f"{busy:.2f}",
                f"processor time by that of {first}": f"{statistics.median(ratios):.2f}",
                "peak MiB": f"{memory:.0f}",
            }
        )
    save_table("start", rows)


if __name__ == "__main__":
    main()
