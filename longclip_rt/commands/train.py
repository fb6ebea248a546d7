"""`longclip-rt train`: CLIP weights and (image, long caption) pairs to Long-CLIP weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from longclip_rt.commands.options import SectionedCommand
from longclip_rt.system.streams import told_at_best
from longclip_rt.train.config import PRESETS, Frozen, ObjectiveName, PcmScope, Positions, Precision

_POSITIVE = click.IntRange(min=1)
_ABOVE_0 = click.FloatRange(min=0, min_open=True)


_SECTIONS = {
    "Run": ("preset", "weights", "out", "resume", "device", "workers", "seed"),
    "Data": ("data", "images", "image_column", "long_column", "short_column", "val", "val_rows", "max_bad"),
    "Objective": (
        *("objective", "positions", "frozen", "components", "pcm_scope"),
        *("label_smoothing", "logit_scale", "max_logit_scale"),
    ),
    "Optimisation": (
        *("batch_size", "chunk_size", "epochs", "steps", "lr", "weight_decay", "warmup_steps", "clip_grad_norm"),
        *("precision", "gradient_checkpointing", "compile"),
    ),
    "Validation and checkpoints": ("validate_every", "checkpoint_every", "keep_checkpoints"),
}


@click.command(cls=SectionedCommand, sections=_SECTIONS)
@click.option(
    "--data",
    required=True,
    metavar="PAIRS",
    help="ShareGPT4V .json, .jsonl, .parquet, .tar shards such as 'shards/{000..010}.tar', a folder or glob of one "
    "kind, or procedural scenes such as 'scenes:200000@0?twins=0.5'.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder of the run.")
@click.option("--resume", is_flag=True, help="Go on with the run in DIR, or begin it where there is none.")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="longclip-b",
    show_default=True,
    help="Settings to begin with: the paper's for ViT-B/16 and ViT-L/14; tiny is a small CLIP from scratch, tiny-long "
    "its fine-tuning.",
)
@click.option("--weights", metavar="WEIGHTS", help="What to begin with: as for export, or scratch. [default: preset's]")
@click.option("--val", metavar="PAIRS", help="Pairs to validate on. [default: the first rows of --data]")
@click.option("--val-rows", type=click.IntRange(min=0), metavar="N", help="First rows that validate. [default: 1000]")
@click.option("--images", metavar="DIR", help="Folder of relative image paths. [default: the folder of --data]")
@click.option("--image-column", metavar="NAME", help="Column of the image. [default: found by its usual names]")
@click.option("--long-column", metavar="NAME", help="Column of the long caption. [default: likewise]")
@click.option("--short-column", metavar="NAME", help="Column of the short caption. [default: likewise, else cut off]")
@click.option("--max-bad", type=click.FloatRange(0, 1), metavar="SHARE", help="Unusable rows allowed. [default: 0.05]")
@click.option(
    "--objective",
    type=click.Choice(get_args(ObjectiveName)),
    help="longclip: long captions, and short ones after PCM. The others leave out PCM, the short captions, or 248 "
    "tokens.",
)
@click.option("--positions", type=click.Choice(get_args(Positions)), help="How 77 text positions become 248.")
@click.option("--frozen", type=click.Choice(get_args(Frozen)), help="text: train the image tower alone.")
@click.option("--components", type=_POSITIVE, metavar="K", help="Principal components of PCM. [default: 32]")
@click.option("--pcm-scope", type=click.Choice(get_args(PcmScope)), help="PCM on a process's rows or on all of them.")
@click.option("--label-smoothing", type=click.FloatRange(0, 1, max_open=True), metavar="S", help="[default: 0.1]")
@click.option("--logit-scale", type=float, metavar="X", help="ln(1/temperature) to begin with. [default: ln 100]")
@click.option("--max-logit-scale", type=float, metavar="X", help="Bound on it. [default: none]")
@click.option("--batch-size", type=_POSITIVE, metavar="N", help="Pairs of a step, all processes together.")
@click.option(
    "--chunk-size",
    type=_POSITIVE,
    metavar="N",
    help="Pairs that a process holds activations of at a time: the same gradients in less memory, a third slower.",
)
@click.option("--epochs", type=_POSITIVE, metavar="N", help="Passes over the data. [default: 1]")
@click.option("--steps", type=_POSITIVE, metavar="N", help="Steps, in place of epochs.")
@click.option("--lr", type=_ABOVE_0, metavar="RATE", help="Largest learning rate.")
@click.option("--weight-decay", type=click.FloatRange(min=0), metavar="W", help="AdamW's, on every parameter.")
@click.option("--warmup-steps", type=click.IntRange(min=0), metavar="N", help="Steps to reach it. [default: 200]")
@click.option("--clip-grad-norm", type=_ABOVE_0, metavar="X", help="Bound on the gradients' norm. [default: none]")
@click.option("--precision", type=click.Choice(get_args(Precision)), help="auto: fp16 on a GPU, bf16 or fp32 on a CPU.")
@click.option("--gradient-checkpointing", is_flag=True, default=None, help="Less memory for activations, slower.")
@click.option("--compile", is_flag=True, default=None, help="Use torch.compile.")
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Of the order, and of weights from scratch.")
@click.option("--workers", type=click.IntRange(min=0), metavar="N", help="Processes that decode. [default: preset's]")
@click.option("--validate-every", type=_POSITIVE, metavar="STEPS", help="[default: 500]")
@click.option("--checkpoint-every", type=_POSITIVE, metavar="STEPS", help="[default: 500]")
@click.option("--keep-checkpoints", type=_POSITIVE, metavar="N", help="Newest ones that are kept. [default: 2]")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda or cuda:N.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def train(preset: str, data: str, out: Path, resume: bool, device: str, quiet: bool, **changes: Any) -> None:
    """Train Long-CLIP weights from CLIP weights and pairs of images and long captions.

    DIR gets config.json, metrics.csv, TensorBoard events, checkpoints and, at the end, model.safetensors (which export
    takes), curves.png, bad_rows.jsonl and a model card. A run that was stopped, even killed, goes on with the same
    command and --resume. The path of the weights is printed on stdout.

    A batch of 2048 needs no large GPU: with --chunk-size, features are computed in chunks, the loss on all of them, and
    gradients in chunks again. They are the same as those of one piece.

    \b
    Examples:
      longclip-rt train --data sharegpt4v.json --images photos/ --out run --chunk-size 64           # one GPU
      torchrun --nproc-per-node 8 -m longclip_rt train --preset longclip-l --data sharegpt4v.json \\
          --images photos/ --out run --gradient-checkpointing                                       # 8 GPUs
      longclip-rt train --preset tiny --data 'scenes:20000?captions=prefix' --out run --device cpu  # a CPU
      longclip-rt train --data pairs.jsonl --out run --steps 100 --batch-size 64 --resume
    """
    from longclip_rt.system.extras import require

    for module in ("torch", "open_clip", "matplotlib"):
        require(module, "train")
    from longclip_rt.train.config import preset_config
    from longclip_rt.train.loop import train as run

    try:
        report = run(preset_config(preset, data, **changes), out, resume=resume, device=device, quiet=quiet)
    except KeyboardInterrupt:
        click.echo("Stopped. Add --resume to the same command to go on.", err=True)
        click.get_current_context().exit(130)
    if not report.main:
        return
    if not quiet:
        recall = ", ".join(f"{name} {value:.1%}" for name, value in report.figures.items() if name.endswith("_r1"))
        click.echo(f"{report.steps:,} steps in {report.seconds / 60:.1f} minutes; validation: {recall}", err=True)
    with told_at_best():
        click.echo(report.weights)
