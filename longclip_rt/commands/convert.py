"""`longclip-rt convert`: weights of any supported kind to the layout of another library."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from longclip_rt.system.streams import told_at_best


@click.command()
@click.argument("weights")
@click.option(
    "--to",
    "layout",
    type=click.Choice(["longclip", "huggingface", "open_clip"]),
    required=True,
    help="longclip: one .safetensors file. huggingface, open_clip: a folder that transformers or open_clip loads.",
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, metavar="PATH", help="File or folder to make."
)
@click.option("--activation", type=click.Choice(["quick_gelu", "gelu"]), help="Where the weights do not say which.")
def convert(
    weights: str,
    layout: Literal["longclip", "huggingface", "open_clip"],
    out: Path,
    activation: Literal["quick_gelu", "gelu"] | None,
) -> None:
    """Convert CLIP or Long-CLIP weights to another library's layout (float32 safetensors, 248 positions).

    WEIGHTS is a .pt or .safetensors file, a folder, a hub id, open_clip:MODEL/TAG, or random:MODEL@SEED. Its position
    tables are folded into one, and stretched where they have 77 rows. What was done is told on stderr; the path of the
    result is printed on stdout. Nothing is overwritten.

    \b
    Examples:
      longclip-rt convert longclip-B.pt --to huggingface --out longclip-b-hf
      longclip-rt convert zer0int/LongCLIP-L-Diffusers --to longclip --out longclip-L.safetensors
      longclip-rt convert open_clip:ViT-L-14/openai --to open_clip --out clip-l-248
    """
    from longclip_rt.weights.checkpoint import load_checkpoint
    from longclip_rt.weights.convert import save_converted

    checkpoint = load_checkpoint(weights, activation=activation)
    for note in checkpoint.notes:
        click.echo(note, err=True)
    written = save_converted(checkpoint, out, layout)
    with told_at_best():
        click.echo(str(written))
