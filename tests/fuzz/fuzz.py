"""Fuzzes what reads files: `python tests/fuzz/fuzz.py --seconds 600`. Every trial is one seed of one target.

Each target runs in a process of its own, which is killed where a trial hangs, and replaced where one crashes. A finding
is kept in fuzz-findings/ with its input and its traceback; its seed goes to seeds.txt, which every run tries first.
The counts are written into docs/robustness.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import platform
import random
import re
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SEEDS = HERE / "seeds.txt"
PAGE = ROOT / "docs" / "robustness.md"
BEGIN, END = "<!-- counts of the last run of make fuzz -->\n", "<!-- end of the counts -->\n"

HANG_SECONDS = 30
_MOST_MEMORY = 4 << 30
_LONGEST_MESSAGE = 2010
_START_SECONDS = 120


def trial(target: Any, seed: int, folder: Path) -> tuple[str, str]:
    """Tries one seed: `used`, `refused` or what was found, and the details."""
    from longclip_rt.errors import LongClipError

    before, place = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Path.cwd()
    try:
        target(random.Random(seed), folder)
        outcome, detail = "used", ""
    except LongClipError as error:
        outcome, detail = "refused", str(error)
        if len(detail) > _LONGEST_MESSAGE or not detail.replace("\n", " ").isprintable():
            outcome = "unreadable message"
    except AssertionError:
        outcome, detail = "wrong result", traceback.format_exc()
    except Exception:
        outcome, detail = "traceback", traceback.format_exc()
    finally:
        os.chdir(place)
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > _MOST_MEMORY:
        outcome, detail = "memory", detail
    return outcome, detail


def work(module: str, name: str) -> None:
    """The process of one target: seeds and folders in, outcomes out, a JSON a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    target = importlib.import_module(module).TARGETS[name]
    print("ready", file=answers, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(trial(target, request["seed"], Path(request["folder"]))), file=answers, flush=True)
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


class Worker:
    """A target's process, begun anew after a hang or a crash."""

    def __init__(self, module: str, name: str) -> None:
        self._command = [sys.executable, "-W", "ignore", __file__, "--worker", name, "--module", module]
        self._process: subprocess.Popen[bytes] | None = None

    def try_seed(self, seed: int, folder: Path) -> tuple[str, str]:
        """The outcome of a trial; `hang` and `crash` where the process gave none."""
        if self._process is None:
            path = os.pathsep.join([str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            )
            assert self._answer(_START_SECONDS) == b"ready\n", "the target cannot be imported"
        process = self._process
        assert process.stdin is not None
        process.stdin.write(json.dumps({"seed": seed, "folder": str(folder)}).encode() + b"\n")
        process.stdin.flush()
        line = self._answer(HANG_SECONDS)
        if line:
            outcome, detail = json.loads(line)
            return outcome, detail
        status = None if line is None else process.wait()
        self.close()
        if line is None:
            return "hang", f"no answer within {HANG_SECONDS} s"
        return "crash", f"the process ended with status {status}"

    def _answer(self, seconds: float) -> bytes | None:
        """The process's next line: empty where it has ended, None where it says nothing for so long."""
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if ready else None

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def kept_seeds(names: list[str]) -> list[tuple[str, int]]:
    """The seeds in seeds.txt, of the given targets."""
    lines = [line.partition("#")[0].split() for line in SEEDS.read_text(encoding="utf-8").splitlines()]
    return [(line[0], int(line[1])) for line in lines if line and line[0] in names]


def fuzz(names: list[str], seconds: float, seed: int, module: str, findings: Path) -> dict[str, Counter[str]]:
    """Tries the kept seeds and then new ones, the targets in turn for equal times; says what was found on stderr.

    All findings are counted; of those that end at one line of code the first is told and kept.
    """
    counts = {name: Counter[str]() for name in names}
    known: set[tuple[Any, ...]] = set()
    for place, name in enumerate(names):
        worker, began = Worker(module, name), time.monotonic()
        kept = [number for target, number in kept_seeds([name])]
        number = 0
        try:
            while number < max(len(kept), 1) or time.monotonic() - began < seconds / len(names):
                one = kept[number] if number < len(kept) else seed + number
                number += 1
                with tempfile.TemporaryDirectory() as folder:
                    outcome, detail = worker.try_seed(one, Path(folder))
                    counts[name][outcome] += 1
                    place_in_code = (name, outcome, *re.findall(r'File "(.+)", line (\d+)', detail)[-1:])
                    if outcome not in ("used", "refused") and place_in_code not in known:
                        known.add(place_in_code)
                        _keep(findings / f"{name}-{one}", name, one, outcome, detail, Path(folder))
        finally:
            worker.close()
        print(f"{name} ({place + 1} of {len(names)}): {dict(counts[name])}", file=sys.stderr)
    return counts


def _keep(place: Path, name: str, seed: int, outcome: str, detail: str, folder: Path) -> None:
    last = (detail.strip().splitlines() or [""])[-1][:200]
    print(f"FOUND {name} {seed}: {outcome}: {last}", file=sys.stderr)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place, symlinks=True)
    (place / "finding.txt").write_text(f"{outcome}\n{detail}\n", encoding="utf-8", errors="replace")
    if (name, seed) not in kept_seeds([name]):
        with SEEDS.open("a", encoding="utf-8") as file:
            file.write(f"{name} {seed}  # {outcome}: {last}\n")


def write_counts(page: Path, counts: dict[str, Counter[str]], seconds: float, seed: int) -> None:
    """Puts the counts between the two marks of a page."""
    lines = [
        f"{datetime.date.today():%Y-%m-%d}, {seconds:.0f} s, first seed {seed}, Python {platform.python_version()} on "
        f"{platform.system()} {platform.machine()}.",
        "",
        "| target | trials | used | refused in a sentence | findings |",
        "|---|---|---|---|---|",
    ]
    for name, found in counts.items():
        rest = {outcome: count for outcome, count in found.items() if outcome not in ("used", "refused")}
        told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(rest.items())) or "0"
        lines.append(f"| {name} | {found.total():,} | {found['used']:,} | {found['refused']:,} | {told} |")
    head, _, rest_of_page = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest_of_page.partition(END)
    page.write_text(head + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + tail, encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None, help="first new seed; drawn, and told, unless it is given")
    parser.add_argument("--target", action="append", help="only this one; may be repeated")
    parser.add_argument("--module", default="targets", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--findings", type=Path, default=ROOT / "fuzz-findings")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the counts go")
    options = parser.parse_args()
    if options.worker is not None:
        return work(options.module, options.worker)
    sys.path.insert(0, str(HERE))
    names = options.target or list(importlib.import_module(options.module).TARGETS)
    seed = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    print(f"first seed {seed}", file=sys.stderr)
    counts = fuzz(names, options.seconds, seed, options.module, options.findings)
    write_counts(options.page, counts, options.seconds, seed)
    found = sum(
        count for one in counts.values() for outcome, count in one.items() if outcome not in ("used", "refused")
    )
    if found:
        print(f"{found} findings; inputs and tracebacks are in {options.findings}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
