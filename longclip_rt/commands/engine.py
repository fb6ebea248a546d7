"""`longclip-rt engine`: the TensorRT engines of a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from longclip_rt.choices import LARGEST_WORKSPACE, LIBRARIES
from longclip_rt.commands.engine_options import builds_engines, built_with_a_bar
from longclip_rt.commands.options import gpu_numbers, runs_the_model


@click.group()
def engine() -> None:
    """Build the TensorRT engines of a bundle on the machine that runs them, list them, and check them there.

    \b
    Examples:
      longclip-rt engine build longclip-b
      longclip-rt engine list longclip-b
      longclip-rt engine verify longclip-b
    """


@engine.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--engine", "name", type=click.Choice(["auto", *LIBRARIES]), default="auto", show_default=True, help="What builds."
)
@builds_engines
@click.option(
    "--precision", type=click.Choice(["fp16", "fp32"]), default="fp16", show_default=True, help="Graphs to use."
)
@click.option(
    "--workspace",
    type=click.IntRange(1, LARGEST_WORKSPACE),
    metavar="MIB",
    help="Most memory that a layer may compute in.",
)
@click.option("--missing", is_flag=True, help="Build only what is not there, or is damaged or built otherwise.")
def build(
    bundle: Path,
    name: str,
    archs: tuple[int, ...] | str,
    text_buckets: tuple[int, ...],
    batches: tuple[int, ...],
    optimization_level: int | None,
    precision: str,
    workspace: int | None,
    missing: bool,
) -> None:
    """Build engines from a bundle's graphs, into its folder `engines`.

    Neither torch nor the weights are needed: export on one machine, and build on the machine with the GPU. `auto` takes
    TensorRT where it is installed and sees a GPU, else TensorRT-RTX, which also builds for cards that are not here
    (--arch). The precision is that of the graph. An engine runs with the library version that built it only, and one of
    TensorRT on one model of card only. Each engine's folder is printed on stdout as soon as it is built, and a summary
    on stderr. Where one architecture fails, the others are built all the same, and the exit status is 1.

    \b
    Examples:
      longclip-rt engine build longclip-b
      longclip-rt engine build longclip-b --missing --text-buckets 77,248 --batches 1,64
      longclip-rt engine build longclip-b --engine tensorrt-rtx --arch sm89 --arch sm120
    """
    from longclip_rt.bundle.bundle import load_bundle
    from longclip_rt.export.tensorrt.build import EngineOptions, choose_builders

    opened = load_bundle(bundle)
    builders = choose_builders(name, archs)
    options = EngineOptions(precision, text_buckets, batches, optimization_level, workspace)
    built_with_a_bar(opened, builders, options, missing, lambda built: click.echo(str(built.engine.path)))


@engine.command(name="list")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def list_command(bundle: Path, as_json: bool) -> None:
    """List a bundle's engines, and say of each whether this machine can run it, or why not.

    \b
    Examples:
      longclip-rt engine list longclip-b
      longclip-rt engine list longclip-b --json
    """
    from longclip_rt.bundle.bundle import load_bundle
    from longclip_rt.tensorrt.engines import engines_of, why_not_here

    opened = load_bundle(bundle)
    engines, wrong = engines_of(opened)
    rows: list[dict[str, Any]] = []
    for each in engines:
        reason = why_not_here(each, opened)
        rows.append(
            {"engine": each.path.name, "library": each.key.library, "version": each.key.version, "gpu": each.key.gpu,
             "archs": list(each.key.archs), "precision": each.key.precision, "options": dict(each.key.options),
             "device_bytes": each.device_bytes, "towers": dict(each.towers), "usable": not reason, "reason": reason}
        )  # fmt: skip
    rows += [{"engine": text.partition(":")[0], "usable": False, "reason": text.partition(": ")[2]} for text in wrong]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        click.echo(f"{bundle} has no engines. Build some with: longclip-rt engine build {bundle}", err=True)
    for row in rows:
        click.echo(f"{row['engine']}  {'usable here' if row['usable'] else 'not usable here: ' + row['reason']}")
        if "library" in row:
            card = row["gpu"] or "any card"
            archs = ", ".join(f"sm_{arch}" for arch in row["archs"])
            options = row["options"]
            click.echo(
                f"  {row['library']} {row['version']}, {card} of {archs}, {row['precision']}; texts of "
                f"{_numbers(options.get('text_buckets'))} tokens, batches up to {_numbers(options.get('batches'))}"
            )


@engine.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@runs_the_model
@click.option("--devices", callback=gpu_numbers, metavar="LIST", help="Numbers of the GPUs to check. Default: 0.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list of the checks.")
def verify(bundle: Path, backend: str, precision: str, devices: tuple[int, ...] | None, as_json: bool) -> None:
    """Run the whole parity gate on the device, as the export ran it on a CPU.

    The reference is the bundle's own fp32 graphs on the CPU, which the export held to the PyTorch model: neither torch
    nor the weights are needed. Any backend can be checked; `auto` takes what the runtime would take, but fails where
    the bundle has engines and none of them can be used. One failed check makes the exit status 1. The table goes to
    stdout.

    \b
    Examples:
      longclip-rt engine verify longclip-b --backend tensorrt
      longclip-rt engine verify longclip-b --backend onnxruntime-cuda --precision fp16 --devices 1
    """
    from longclip_rt.errors import BackendError
    from longclip_rt.export.device_gate import device_checks

    checks = device_checks(bundle, backend, precision, devices)
    if as_json:
        click.echo(json.dumps([check.to_dict() for check in checks], indent=1))
    else:
        click.echo(f"{'runtime':<21} {'prec.':<5} {'tower':<6} {'value':>9} {'limit':>9}         check")
        for check in checks:
            verdict = "passed" if check.passed else "FAILED"
            click.echo(
                f"{check.runtime:<21} {check.precision:<5} {check.tower:<6} {check.value:>9.2g} {check.limit:>9.2g}  "
                f"{verdict} {check.name}"
            )
    if failed := [check for check in checks if not check.passed]:
        raise BackendError(
            f"{len(failed)} of {len(checks)} checks failed. Build the engines again with: longclip-rt engine build "
            f"{bundle}, or take another --backend."
        )


def _numbers(values: Any) -> str:
    return ", ".join(map(str, values or ())) or "?"
