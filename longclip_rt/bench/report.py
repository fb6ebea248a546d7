"""A benchmark's results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def table(results: Mapping[str, Any]) -> Iterator[str]:
    """The lines: where it ran, then a block a case, ratios first."""
    machine = results["machine"]
    yield f"{results['bundle']['name']}, bundle {results['bundle']['sha256'][:12]}, commit {results['commit'][:12]}"
    yield f"{machine['cpu']}, {machine['cores']} cores" + "".join(f"; {gpu}" for gpu in machine["gpus"])
    for way, details in results["ways"].items():
        yield f"  {way}: {details['details']}"
    if results["rates"]:
        yield "Measured rates: " + ", ".join(f"{name} {_rate(name, rate)}" for name, rate in results["rates"].items())
    for case in results["cases"]:
        yield ""
        yield from _case(case)
    notes = {f"{way}: {each['not apart']}" for way, each in results["ways"].items() if each["not apart"]}
    yield from ("", *(f"Not told apart, {note}" for note in sorted(notes)))
    for way, reason in results["skipped"].items():
        yield f"Not measured, {way}: {reason}"


def _rate(name: str, rate: float) -> str:
    return f"{rate / 1e12:.2f} TFLOP/s" if name.startswith("gemm") else f"{rate / 1e9:.1f} GB/s"


def _case(case: Mapping[str, Any]) -> Iterator[str]:
    agreement = "" if case["agreement"] is None else f", vectors agree to a cosine of {case['agreement']:.5f}"
    yield f"{case['label']}{agreement}"
    for row in case["rows"]:
        for other, ratio in row.get("ratios", {}).items():
            yield (
                f"  {ratio['latency']:7.2f} x as fast as {other} ({ratio['lowest']:.2f} to {ratio['highest']:.2f}), "
                f"throughput {ratio['throughput']:.2f} x: {row['way']} {row['precision']}"
            )
    yield f"  {'':<24} {'p50':>9} {'p90':>9} {'p99':>9} ms {'+-':>6} {'per s':>9} {'bound':>8} {'of it':>6}  stages, ms"
    for row in case["rows"]:
        ms = row["ms"]
        least = f"{row['bound']['ms']:8.3f} {row['reached']:6.0%}" if "bound" in row else f"{'':>15}"
        stages = ", ".join(f"{stage} {taken:.3f}" for stage, taken in row["stages_ms"].items())
        yield (
            f"  {row['way'] + ' ' + row['precision']:<24} {ms['p50']:9.3f} {ms['p90']:9.3f} {ms['p99']:9.3f}    "
            f"{row['spread']:6.0%} {row['per_second']:9.1f} {least}  {stages}"
        )
