"""What changed since an earlier run, beyond what both runs scatter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip_rt.errors import BackendError


@dataclass(frozen=True)
class Change:
    """One figure of both runs; more is slower.

    Attributes:
        what: Way, precision, case, and which figure.
        before: Milliseconds of a call, the median; or, of runs on different machines, our time by the reference's.
        after: The same now.
        noise: The spread of both runs together, as a share.
    """

    what: str
    before: float
    after: float
    noise: float

    @property
    def share(self) -> float:
        """Growth of the time; negative: faster."""
        return self.after / self.before - 1

    @property
    def real(self) -> bool:
        """Whether it is beyond the noise."""
        return abs(self.share) > self.noise

    def regressed(self, bound: float) -> bool:
        """Whether it is a slowdown beyond the noise and the bound, a share."""
        return self.real and self.share > bound


def load_results(path: Path) -> dict[str, Any]:
    """Reads what `--json` wrote.

    Raises:
        BackendError: It is not such a file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackendError(f"{path} cannot be read as a benchmark: {error}. Give what --json wrote.") from error
    if not isinstance(found, dict) or found.get("format") != 1 or not isinstance(found.get("cases"), list):
        raise BackendError(f"{path} is no benchmark of this version. Give what `longclip-rt bench --json` wrote.")
    return found


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Compares what both runs measured.

    Times of runs on one kind of machine are compared as they are; of different machines, only the ratios to the same
    reference are.

    Raises:
        BackendError: They are of different models, or have nothing in common.
    """
    if old["bundle"]["name"] != new["bundle"]["name"]:
        raise BackendError(
            f"The runs are of different models, {old['bundle']['name']} and {new['bundle']['name']}. Name the same one."
        )
    same = all(old["machine"][key] == new["machine"][key] for key in ("cpu", "cores", "gpus"))
    before, after = (dict((_times if same else _ratios)(each)) for each in (old, new))
    found = [
        Change(what, before[what][0], value, before[what][1] + noise)
        for what, (value, noise) in after.items()
        if what in before
    ]
    if not found:
        raise BackendError("The runs have no case in common that can be compared" + ("." if same else _OTHER_MACHINE))
    return found


_OTHER_MACHINE = "; on different machines these are the ratios to a reference. Measure both with --against reference."


def _times(results: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, float]]]:
    for case in results["cases"]:
        for row in case["rows"]:
            if not row["reference"]:
                yield f"{row['way']} {row['precision']}, {case['label']}, ms", (row["ms"]["p50"], row["spread"])


def _ratios(results: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, float]]]:
    for case in results["cases"]:
        for row in case["rows"]:
            for other, ratio in row.get("ratios", {}).items():
                value = 1 / ratio["latency"]
                spread = (ratio["highest"] - ratio["lowest"]) / 2 / ratio["latency"]
                yield f"{row['way']} {row['precision']}, {case['label']}, time by that of {other}", (value, spread)


def lines(found: list[Change], bound: float) -> Iterator[str]:
    """What changed, the worst first; and how many did not."""
    for each in sorted(found, key=lambda change: -change.share):
        if each.real:
            word = "REGRESSION" if each.regressed(bound) else "slower" if each.share > 0 else "faster"
            yield (
                f"{word}: {each.what}: {each.before:.4g} -> {each.after:.4g} "
                f"({each.share:+.0%}, noise {each.noise:.0%})"
            )
    yield f"{sum(not each.real for each in found)} of {len(found)} figures did not change beyond the noise."
