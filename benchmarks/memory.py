"""Does the memory of `embed` grow with the number of inputs?

    python benchmarks/memory.py --bundle demo/bundle

Runs `longclip-rt embed --texts` on 2,000 and on 200,000 different short texts, each in a process of its own, and takes
the largest resident set that the system reports for it. Writes results/memory.csv. Takes about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import save_table

TARGET = 1.1


def peak_mib(listing: Path, bundle: Path) -> float:
    """Peak resident memory of one `embed` of the texts in `listing`, in MiB."""
    command = [sys.executable, "-m", "longclip_rt", "embed", "--texts", str(listing), "-o", str(listing) + ".parquet"]
    process = subprocess.Popen([*command, "--bundle", str(bundle)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"embed ended with status {status}")
    return usage.ru_maxrss / 1024  # Linux counts in KiB


def main() -> None:
    """Measures and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs=2, default=(2_000, 200_000))
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        peaks = []
        for count in arguments.counts:
            listing = Path(folder) / f"{count}.txt"
            listing.write_text("".join(f"cup {number} of {count}\n" for number in range(count)), encoding="utf-8")
            peaks.append(peak_mib(listing, arguments.bundle))
            rows.append(
                {
                    "texts": count,
                    "peak MiB": f"{peaks[-1]:.0f}",
                    "times the first": f"{peaks[-1] / peaks[0]:.3f}",
                    "target": TARGET if len(peaks) > 1 else "",
                }
            )
    save_table("memory", rows)


if __name__ == "__main__":
    main()
