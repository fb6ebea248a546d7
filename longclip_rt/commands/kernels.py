"""`longclip-rt kernels`: compiles the Triton kernels for GPUs that need not be here, and reports on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from longclip_rt.choices import ARCHITECTURES, EVERY
from longclip_rt.commands.options import architectures


@click.group()
def kernels() -> None:
    """Compile the Triton kernels ahead of time, and see registers and tensor cores.

    \b
    Examples:
      longclip-rt kernels compile --arch sm80,sm90
    """


@kernels.command(name="compile")
@click.option(
    "--arch",
    "archs",
    multiple=True,
    default=(EVERY,),
    show_default=True,
    callback=architectures,
    metavar="sm89",
    help=f"Compute capabilities out of {', '.join(map(str, ARCHITECTURES))}; no GPU needs to be here.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="kernels-compiled",
    show_default=True,
    metavar="DIR",
    help="Folder to make for the cubins and kernels.json, which holds the table.",
)
def compile_command(archs: tuple[int, ...] | str, out: Path) -> None:
    """Compile every kernel in every configuration for the named GPUs, on a machine with or without one.

    A table on stdout shows what is in the machine code: registers, spilled bytes, shared memory, tensor-core
    instructions. A kernel that spills, uses no tensor cores in half precision, or needs more shared memory than the GPU
    has makes the exit status 1.

    \b
    Examples:
      longclip-rt kernels compile --arch sm80,sm90 --out kernels-compiled
    """
    from longclip_rt.errors import KernelError
    from longclip_rt.system.extras import require
    from longclip_rt.system.files import directory_in_the_making

    chosen_archs = ARCHITECTURES if isinstance(archs, str) else archs
    if unknown := set(chosen_archs) - set(ARCHITECTURES):
        raise click.BadParameter(
            f"sm{min(unknown)} is none of {', '.join(map(str, ARCHITECTURES))}", param_hint="--arch"
        )
    require("triton", "export")
    if out.exists():
        with directory_in_the_making(out):  # refuses, and says how to go on, before minutes of work
            pass
    from tqdm import tqdm

    from longclip_rt.kernels.aot import compile_kernels, failed_gates, save_compiled, variants

    chosen = tuple(variants())
    with tqdm(total=len(chosen) * len(chosen_archs), unit=" kernels") as bar:
        compiled = compile_kernels(chosen_archs, chosen, lambda name: bar.update())
    click.echo(_table([entry.row() for entry in compiled]))
    save_compiled(compiled, out)
    click.echo(f"Wrote {len(compiled)} cubins and kernels.json to {out}.", err=True)
    if failures := [failure for entry in compiled for failure in failed_gates(entry)]:
        raise KernelError(f"{len(failures)} checks failed: {'; '.join(failures)}.")


def _table(rows: list[dict[str, Any]]) -> str:
    """Columns under their names, numbers to the right."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    numbers = [isinstance(value, (int, float)) for value in rows[0].values()]
    return "\n".join(
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) else str(value) or "-"
