"""`longclip-rt info`: what can be used on this machine, and what is missing for the rest."""

from __future__ import annotations

import json
import platform
from typing import Any

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(as_json: bool) -> None:
    """Show which backends are usable here (and how to get the others), the machine, versions, and known bundles.

    \b
    Examples:
      longclip-rt info
      longclip-rt info --json
    """
    facts = _facts()
    click.echo(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))


def _facts() -> dict[str, Any]:
    from longclip_rt.bundle.bundle import bundles_home, known_bundles
    from longclip_rt.choices import BACKENDS
    from longclip_rt.opening import availability
    from longclip_rt.system import machine

    states = [availability(name) for name in BACKENDS]
    memory = machine.memory_bytes()
    return {
        "backends": [
            {"name": state.name, "usable": state.usable, "precisions": state.precisions, "reason": state.reason,
             "remedy": state.remedy}
            for state in states
        ],
        "machine": {
            "system": platform.platform(terse=True),
            "python": platform.python_version(),
            "cpu": machine.cpu_name(),
            "cores": machine.cores(),
            "features": machine.cpu_features(),
            "memory_gib": round(memory / 2**30, 1) if memory else None,
            "gpus": machine.gpus(),
        },
        "versions": machine.package_versions(),
        "bundles_home": str(bundles_home()),
        "bundles": [
            {"path": str(bundle.path), "name": bundle.name, "trained": bundle.trained, "precisions": bundle.precisions,
             "weights": bundle.manifest["source"]["weights"], "sha256": bundle.sha256}
            for bundle in known_bundles()
        ],
    }  # fmt: skip


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = ["Backends"]
    for backend in facts["backends"]:
        if backend["usable"]:
            lines.append(f"  {backend['name']:<20} usable: {', '.join(backend['precisions'])}")
        else:
            lines.append(f"  {backend['name']:<20} not usable: {backend['reason']}. Mend it with: {backend['remedy']}")
    machine = facts["machine"]
    lines += ["", "Machine"]
    lines.append(f"  CPU     {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib'] or '?'} GiB")
    lines.append(f"          {' '.join(machine['features']) or 'features unknown'}")
    lines += [f"  GPU     {gpu}" for gpu in machine["gpus"]]
    lines += ["  GPU     none (nvidia-smi finds no NVIDIA card)"] if not machine["gpus"] else []
    lines.append(f"  System  {machine['system']}, Python {machine['python']}")
    lines += ["", "Versions"]
    lines += [f"  {name:<16} {version or '-'}" for name, version in facts["versions"].items()]
    lines += ["", f"Bundles in {facts['bundles_home']}, newest first"]
    for bundle in facts["bundles"]:
        trained = "" if bundle["trained"] else ", UNTRAINED"
        lines.append(f"  {bundle['path']}")
        lines.append(f"    {bundle['name']}{trained}, {' and '.join(bundle['precisions'])}, from {bundle['weights']}")
    if not facts["bundles"]:
        lines.append("  none yet; make one with: longclip-rt export --fp16")
    return lines
