"""A benchmark's results as a table for the terminal, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any


def table(results: Mapping[str, Any]) -> Iterator[str]:
    """The lines: where it ran, then a block a case, ratios first."""
    machine = results["machine"]
    yield f"{results['bundle']['name']}, bundle {results['bundle']['sha256'][:12]}, commit {results['commit'][:12]}"
    yield f"{machine['cpu']}, {machine['cores']} cores" + "".join(f"; {gpu}" for gpu in machine["gpus"])
    if machine["load"] is not None and machine["load"] > 0.5 * machine["cores"]:
        yield f"WARNING: other programs kept {machine['load']:.1f} cores busy: ratios are distorted"
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


def csv_text(results: Mapping[str, Any], command: str) -> str:
    """A row a way and case, headed by comments that say where it ran."""
    machine, bundle = results["machine"], results["bundle"]
    versions = ", ".join(f"{name} {found}" for name, found in results["versions"].items())
    head = [
        f"command: {command}",
        f"machine: {machine['cpu']}, {machine['cores']} cores ({' '.join(machine['features'])}), "
        f"{machine['memory_gib']} GiB{''.join('; ' + gpu for gpu in machine['gpus'])}; load before: {machine['load']}",
        f"clocks: {machine['gpu_clocks'] or 'not known'}",
        f"versions: {versions}",
        f"commit: {results['commit']}",
        f"bundle: {bundle['name']}, {bundle['sha256']}",
        "rates: " + ", ".join(f"{name} {_rate(name, rate)}" for name, rate in results["rates"].items()),
    ]
    rows = [_row(case, row) for case in results["cases"] for row in case["rows"]]
    fields = list(dict.fromkeys(field for row in rows for field in row))
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in head)
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(case: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, object]:
    ratios = {f"x {other}": f"{ratio['latency']:.2f}" for other, ratio in row.get("ratios", {}).items()}
    return {
        "tower": case["tower"],
        "batch": case["batch"],
        "tokens": case["tokens"] or "",
        "way": row["way"],
        "precision": row["precision"],
        **ratios,
        **{f"{q} ms": f"{ms:.3f}" for q, ms in row["ms"].items()},
        "spread": f"{row['spread']:.3f}",
        "calls": row["calls"],
        "per second": f"{row['per_second']:.1f}",
        **{f"{stage} ms": f"{ms:.3f}" for stage, ms in row["stages_ms"].items()},
        **({"bound ms": f"{row['bound']['ms']:.3f}", "reached": f"{row['reached']:.2f}"} if "bound" in row else {}),
    }
