"""Where a benchmark ran: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from longclip_rt.system import machine


def description() -> dict[str, Any]:
    """`machine`, `versions` and `commit`, as the results hold them."""
    memory = machine.memory_bytes()
    return {
        "machine": {
            "cpu": machine.cpu_name(),
            "cores": machine.cores(),
            "features": machine.cpu_features(),
            "memory_gib": round(memory / 2**30, 1) if memory else None,
            "gpus": machine.gpus(),
            "gpu_clocks": gpu_state(),
            "system": platform.platform(terse=True),
            "load": load(),
        },
        "versions": {"python": platform.python_version(), **{k: v for k, v in machine.package_versions().items() if v}},
        "commit": commit(),
    }


def load() -> float | None:
    """Processes that wanted a core in the last minute, on average; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def gpu_state() -> str:
    """Clocks and memory of the first card as `nvidia-smi` tells them; empty without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    fields = "clocks.sm,clocks.max.sm,clocks.mem,memory.used,power.limit,persistence_mode"
    query = [program, f"--query-gpu={fields}", "--format=csv"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(line.strip() for line in lines[:2])


def commit() -> str:
    """The commit of the source that runs, and whether it was changed; `unknown` outside a repository.

    A copy without its history may be told by LONGCLIP_RT_COMMIT.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LONGCLIP_RT_COMMIT", "unknown")
    return head + (" and uncommitted changes" if changed else "")
