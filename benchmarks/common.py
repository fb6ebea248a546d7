"""What the benchmarks share: fair turns, and result files that say where they came from."""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from longclip_rt.system import machine

RESULTS = Path(__file__).parent / "results"


def rates_in_turns(runs: Mapping[str, tuple[Callable[[], object], int]], rounds: int) -> dict[str, list[float]]:
    """Times several ways of doing a thing in turn, so that a machine whose speed drifts treats them alike.

    Args:
        runs: Name -> (what to run, how many items one run handles).
        rounds: Turns that count; one more goes before them to warm up.

    Returns:
        Name -> items a second in each round.
    """
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, (run, items) in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                rates[name].append(items / (time.perf_counter() - started))
    return rates


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over rounds of one rate by the other of the same round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def save_table(name: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes results/NAME.csv, headed by comments: command, machine, versions, commit; prints it too."""
    memory = machine.memory_bytes()
    gib = f", {memory / 2**30:.0f} GiB" if memory else ""
    versions = ", ".join(f"{package} {found}" for package, found in machine.package_versions().items() if found)
    command = " ".join(["python", Path(sys.argv[0]).as_posix(), *sys.argv[1:]])
    lines = [
        f"command: {command}",
        f"machine: {machine.cpu_name()}, {machine.cores()} cores ({' '.join(machine.cpu_features())}){gib}",
        f"versions: Python {sys.version.split()[0]}, {versions}",
        f"commit: {COMMIT}",
    ]
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {line}\n" for line in lines)
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print("\n".join(lines))
    for row in rows:
        print("  ".join(f"{key}: {value}" for key, value in row.items()))


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LONGCLIP_RT_COMMIT", "unknown")  # a copy without its history may be told
    return commit + (" and uncommitted changes" if changed else "")


# What runs is what was there when the script began, whatever is committed meanwhile.
COMMIT = _commit()
