"""`longclip-rt engine`: the TensorRT engines of a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import click

from longclip_rt.commands.options import gpu_numbers, runs_the_model


@click.group()
def engine() -> None:
    """Build a bundle's engines, and check them on the GPU that runs them.

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


@engine.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--engine", "name", type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]), default="auto")
@click.option("--arch", "archs", multiple=True, metavar="smNN", help="For RTX; may be repeated. Default: all.")
@click.option("--text-buckets", default="32,77,128,248", show_default=True, help="Lengths that texts are padded to.")
@click.option("--batches", default="1,32,256", show_default=True, help="Fewest, usual and most rows of a batch.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="Default: the library's own.")
@click.option("--missing", is_flag=True, help="Build only what is not there.")
def build(
    bundle: Path, name: str, archs: tuple[str, ...], text_buckets: str, batches: str, optimization_level: int | None,
    missing: bool,
) -> None:  # fmt: skip
    """Build engines from the fp16 graphs of a bundle; neither torch nor the weights are needed.

    \b
    Examples:
      longclip-rt engine build demo/bundle --engine tensorrt-rtx --arch sm89
    """
    from longclip_rt.backends.tensorrt import import_library
    from longclip_rt.bundle import load_bundle
    from longclip_rt.errors import EngineError
    from longclip_rt.export.engine import EngineOptions, build_engines, choose_library, offered_archs

    try:
        wanted = [int(arch.removeprefix("sm")) for arch in archs]
        least, usual, most = (int(number) for number in batches.split(","))
        buckets = tuple(int(number) for number in text_buckets.split(","))
    except ValueError as error:
        raise EngineError(
            "Give --arch like sm89, --text-buckets like 32,77 and --batches as three numbers like 1,32,256."
        ) from error
    backend, gpu = choose_library(name), ""
    library = import_library(backend)
    if backend == "tensorrt":
        from longclip_rt.backends.device import Gpu

        card = Gpu(0)
        if wanted and wanted != [card.arch]:
            raise EngineError(f"TensorRT builds for the GPU that is here, sm{card.arch}; leave --arch out.")
        wanted, gpu = [card.arch], card.name
    options = EngineOptions(buckets, (least, usual, most), optimization_level)
    built = build_engines(load_bundle(bundle), backend, wanted or offered_archs(library), options, gpu, missing=missing)
    for folder, towers in built:
        click.echo(folder.name)
        for tower, one in towers.items():
            click.echo(
                f"  {tower:<6} {one.plan_bytes / 2**20:8.1f} MiB {one.seconds:7.1f} s  {one.attention} attention"
            )
            for layer, count in sorted(one.layers.items()):
                click.echo(f"    {layer:<32} {count:>6}")
    if not built:
        click.echo("Nothing is missing.")
