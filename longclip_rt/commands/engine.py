"""`longclip-rt engine`: the TensorRT engines of a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import click

from longclip_rt.commands.options import gpu_numbers, runs_the_model


@click.group()
def engine() -> None:
    """Check a bundle's engines on the GPU that runs them.

    \b
    Examples:
      longclip-rt engine verify demo/bundle
    """


@engine.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@runs_the_model
@click.option("--devices", callback=gpu_numbers, metavar="LIST", help="Numbers of the GPUs to check. Default: 0.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list of the checks.")
def verify(bundle: Path, backend: str, precision: str, devices: tuple[int, ...] | None, as_json: bool) -> None:
    """Run the whole parity gate on the device, as the export ran it on a CPU.

    The reference is the bundle's own fp32 graphs on the CPU, which the export held to the PyTorch model: neither torch
    nor the weights are needed. Any backend can be checked; `auto` takes what the runtime would take. One failed check
    makes the exit status 1. The table goes to stdout.

    \b
    Examples:
      longclip-rt engine verify demo/bundle --backend tensorrt
      longclip-rt engine verify demo/bundle --backend onnxruntime-cuda --precision fp16 --devices 1
    """
    from longclip_rt.errors import BackendError
    from longclip_rt.export.gate import device_checks

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
