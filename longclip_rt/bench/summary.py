"""Of many times, the few numbers that say what one may rely on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from longclip_rt.bench.worker import Round

QUANTILES = (50, 90, 99)


def summary(rounds: Sequence[Round], batch: int) -> dict[str, Any]:
    """One contender on one case.

    Returns:
        `ms`: percentiles of a call over all rounds, and how many calls there were; `spread`: half the distance between
        the rounds' slowest and fastest median, as a share of the median; `per_second`: rows, the median over the
        rounds; `stages`: the median milliseconds of each; `medians`: each round's, in milliseconds.
    """
    medians = [statistics.median(each.calls) for each in rounds]
    times = np.concatenate([each.calls for each in rounds])
    stages: dict[str, list[float]] = {}
    for each in rounds:
        for stage, taken in each.stages.items():
            stages.setdefault(stage, []).extend(taken)
    return {
        "ms": {f"p{q}": 1e3 * float(np.percentile(times, q)) for q in QUANTILES},
        "calls": len(times),
        "spread": (max(medians) - min(medians)) / 2 / statistics.median(medians),
        "batch": batch,
        "per_second": statistics.median(each.per_second for each in rounds),
        "stages_ms": {stage: 1e3 * statistics.median(taken) for stage, taken in stages.items()},
        "medians_ms": [1e3 * each for each in medians],
        "rates": [each.per_second for each in rounds],
    }


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """How many times faster one is than the other, round by round.

    Args:
        ours: A `summary`.
        theirs: Another of the same rounds.

    Returns:
        `latency`: the median over the rounds of their median time by ours; `lowest` and `highest` of these; and
        `throughput`, the median of our rate by theirs.
    """
    each = [b / a for a, b in zip(ours["medians_ms"], theirs["medians_ms"], strict=True)]
    rates = [a / b for a, b in zip(ours["rates"], theirs["rates"], strict=True)]
    return {
        "latency": statistics.median(each),
        "lowest": min(each),
        "highest": max(each),
        "throughput": statistics.median(rates),
    }


def bound(flops: int, moved: int, gemm: float, copy: float) -> dict[str, float | str]:
    """The least time that the machine's own rates allow.

    Args:
        flops: Operations.
        moved: Bytes.
        gemm: Operations a second.
        copy: Bytes a second.

    Returns:
        `ms`, and what it is `of`: `products` or `memory`.
    """
    computing, moving = flops / gemm, moved / copy
    return {"ms": 1e3 * max(computing, moving), "of": "products" if computing >= moving else "memory"}
