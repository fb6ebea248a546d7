"""`longclip-rt export`: weights to a verified bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from longclip_rt.choices import LIBRARIES, PCA_MODES
from longclip_rt.commands.engine_options import build_command, builds_engines, built_with_a_bar, given_flags
from longclip_rt.commands.options import SectionedCommand
from longclip_rt.system.streams import told_at_best

if TYPE_CHECKING:
    from longclip_rt.export.exporter import ParityReport
    from longclip_rt.export.int8 import Int8Sample
    from longclip_rt.export.tensorrt.build import Builders
    from longclip_rt.parity.limits import Check

FP16_MAX = 65504.0
DEFAULT_WEIGHTS = "BeichenZhang/LongCLIP-B"


_SECTIONS = {
    "Bundle": ("weights", "out", "fp16", "int8", "int8_sample", "outputs", "activation", "pca", "pca_mode"),
    "Engines": ("engine", "archs", "text_buckets", "batches", "optimization_level", "pca_in_engine"),
}


@click.command(cls=SectionedCommand, sections=_SECTIONS)
@click.option(
    "--weights",
    default=DEFAULT_WEIGHTS,
    show_default=True,
    metavar="WEIGHTS",
    help="A .pt or .safetensors file, a folder, a hub id, open_clip:MODEL/TAG, or random:MODEL@SEED (untrained).",
)
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to make.  [default: in the cache]")
@click.option("--fp16", is_flag=True, help="Add strongly typed half-precision graphs.")
@click.option(
    "--int8",
    is_flag=True,
    help="Add models in int8 for --precision int8, which is fast on CPUs and loses a little; never taken unasked.",
)
@click.option(
    "--int8-sample",
    metavar="FILES",
    help="List, folder or glob of photographs and texts like yours, as `embed` takes it, to calibrate and judge int8 "
    "on.  [default: what ships with the package]",
)
@click.option(
    "--output-name",
    "outputs",
    multiple=True,
    metavar="NAME",
    help="A further output: pooler_output, last_hidden_state, hidden_states.-N; text:NAME or image:NAME for one tower.",
)
@click.option("--activation", type=click.Choice(["quick_gelu", "gelu"]), help="Where the weights do not say which.")
@click.option(
    "--pca",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Add the outputs text_pca and image_pca: the embeddings reduced with a PCA that `longclip-rt pca fit` wrote.",
)
@click.option("--pca-mode", type=click.Choice(PCA_MODES), default="project", show_default=True, help="What they are.")
@click.option(
    "--pca-in-engine",
    is_flag=True,
    help="Build TensorRT engines with the PCA as the plug-in longclip::pca_head. Without: a kernel behind the engine.",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", *LIBRARIES, "none"]),
    default="auto",
    show_default=True,
    help="Build TensorRT engines from the fp16 graphs; auto does so where a library and a GPU are there.",
)
@builds_engines
def export(
    weights: str,
    out: Path | None,
    fp16: bool,
    int8: bool,
    int8_sample: str | None,
    outputs: tuple[str, ...],
    activation: Literal["quick_gelu", "gelu"] | None,
    pca: Path | None,
    pca_mode: str,
    pca_in_engine: bool,
    engine: str,
    archs: tuple[int, ...] | str,
    text_buckets: tuple[int, ...],
    batches: tuple[int, ...],
    optimization_level: int | None,
) -> None:
    """Export weights to a bundle: ONNX graphs of both encoders, the tokenizer, and a parity report.

    The files are run on real captions and photographs and compared with the torch model. If one check fails, the table
    of failures is printed, the exit status is 1, and no bundle is written. The bundle's path is printed on stdout.

    With --fp16, TensorRT engines are built too where that can be done; `longclip-rt engine build` does it later, or on
    another machine.

    \b
    Examples:
      longclip-rt export --fp16
      longclip-rt export --fp16 --weights longclip-B.pt --out longclip-b
      longclip-rt export --weights open_clip:ViT-L-14/openai --output-name text:hidden_states.-2
      longclip-rt export --weights longclip-B.pt --fp16 --pca pca.safetensors
      longclip-rt export --fp16 --engine tensorrt-rtx --arch sm89 --text-buckets 77,248
      longclip-rt export --weights longclip-B.pt --int8 --int8-sample photos/
      longclip-rt export --weights random:ViT-B-16        # untrained, to try things out
    """
    from longclip_rt.system.extras import require

    require("torch", "export")
    from tqdm import tqdm

    from longclip_rt.errors import EngineError, ExportError, LongClipError
    from longclip_rt.export.exporter import ExportOptions, ParityError, export_bundle, stages

    if pca_in_engine and engine == "tensorrt-rtx":
        raise ExportError("TensorRT-RTX takes no plug-ins from Python. Leave --pca-in-engine out, or --engine.")
    builders, why_none = _builders(engine, archs, fp16, given_flags())
    if int8_sample is not None and not int8:
        raise ExportError("--int8-sample is for int8. Add --int8, or leave it out.")
    sample = None if int8_sample is None else _sample_from(int8_sample)
    options = ExportOptions(
        weights, out, fp16, outputs, activation, pca, pca_mode, pca_in_engine, int8=int8, int8_sample=sample
    )
    with tqdm(total=stages(options), bar_format="{l_bar}{bar:20}| {n}/{total} [{elapsed}] {desc}") as bar:
        started = False

        def progress(stage: str) -> None:
            nonlocal started
            bar.update(int(started))
            bar.set_description_str(stage)
            started = True

        try:
            bundle, report = export_bundle(options, progress)
        except ParityError as error:
            bar.close()
            click.echo(_table(error.report), err=True)
            raise
        bar.update()
        bar.set_description_str("done")
    click.echo(_table(report), err=True)
    with told_at_best():
        click.echo(str(bundle.path))  # before anything else can go wrong
    later = build_command(bundle.path, engine, archs, text_buckets, batches, optimization_level)
    if builders is not None:
        from longclip_rt.export.tensorrt.build import EngineOptions

        whole = f"The bundle {bundle.path} is whole, without that engine; try again: {later} --missing"
        try:
            built_with_a_bar(bundle, builders, EngineOptions("fp16", text_buckets, batches, optimization_level))
        except LongClipError as error:
            raise EngineError(f"{error} {whole}") from error
        except KeyboardInterrupt:
            click.echo(whole, err=True)
            raise
    elif why_none:
        click.echo(f"No engine was built. {why_none} Build one later, on the machine with the GPU: {later}", err=True)


def _builders(engine: str, archs: tuple[int, ...] | str, fp16: bool, given: list[str]) -> tuple[Builders | None, str]:
    """What builds the engines, found out before minutes of work; or None and why, where none was asked for."""
    from longclip_rt.errors import EngineError, ExportError

    if engine == "none":
        if given:
            raise click.UsageError(f"--engine none builds no engine. Leave it out, or {' and '.join(given)}.")
        return None, ""
    if not fp16:
        if engine == "auto" and not given:
            return None, ""
        named = " and ".join(["--engine", *given] if engine != "auto" else given)
        raise ExportError(f"Engines are built from the fp16 graphs. Add --fp16, or leave {named} out.")
    from longclip_rt.export.tensorrt.build import choose_builders

    try:
        return choose_builders(engine, archs), ""
    except EngineError as error:
        if engine != "auto" or archs:
            raise
        return None, str(error).removeprefix("No engine can be built. ")


def _sample_from(files: str) -> Int8Sample:
    """The photographs and texts that `embed` would take; those that cannot be opened are left out and told of."""
    from longclip_rt.embedding.inputs.content import locate, read_text
    from longclip_rt.embedding.inputs.sources import Inputs, sources_from_arguments
    from longclip_rt.errors import ExportError, InputError
    from longclip_rt.export.int8 import LEAST, Int8Sample

    images, texts = [], []
    for entry in Inputs(sources_from_arguments([files], texts=False, column=None), False, None).entries():
        try:
            if entry.error is not None:
                raise InputError(entry.error)
            if entry.kind == "text":
                texts.append(read_text(entry))
            else:
                images.append(locate(entry))
        except InputError as error:
            click.echo(f"Left out of the int8 sample: {entry.id}: {error}", err=True)
    if max(len(images), len(texts)) < LEAST:
        raise ExportError(
            f"{files} holds {len(images)} photographs and {len(texts)} texts. To calibrate int8, name {LEAST} of a "
            "kind at least; some dozens are better."
        )
    return Int8Sample(files, tuple(images), tuple(texts))


def _table(report: ParityReport) -> str:
    """One row a runtime, precision and tower with the figures that matter; then failures, then activations."""
    lines = [f"Parity with the torch towers on {report.texts} captions and {report.images} photographs:", ""]
    heads = ("parity", "neighbours", "trimmed", "shuffled", "batch 1", "after EOT")
    lines.append(
        f"  {'runtime':<12} {'':<5} {'tower':<6}" + "".join(f"{head:>11}" for head in heads) + "   checks passed"
    )
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in report.checks:
        groups.setdefault((check.runtime, check.precision, check.tower), []).append(check)
    for (runtime, precision, tower), checks in groups.items():
        figures = "".join(f"{_figure(checks, column):>11}" for column in _COLUMNS)
        passed = f"{sum(check.passed for check in checks)} of {len(checks)}"
        lines.append(f"  {runtime:<12} {precision:<5} {tower:<6}{figures}   {passed}")
    lines += ["", "  parity: largest difference of a component in fp32, largest 1 - cosine in fp16 and bf16."]
    lines += [
        f"  FAILED: {check.runtime} {check.precision} {check.tower}: {check.name} is {check.value:.3g}, and may be "
        f"{check.limit:.3g}"
        for check in report.failed
    ]
    lines += ["", f"Largest activation of each block (fp16 overflows at {FP16_MAX:.0f}):"]
    for tower in ("text", "image"):
        entries = [entry for entry in report.activations if entry.tower == tower]
        kept = ", ".join(str(entry.block) for entry in entries if entry.keep_fp32) or "none"
        lines.append(f"  {tower:<6}" + " ".join(f"{entry.largest:.3g}" for entry in entries))
        lines.append(f"        head-room {min(entry.headroom for entry in entries):.0f} times; kept in fp32: {kept}")
    return "\n".join(lines)


# What each column of the table shows: the largest value of the checks whose names end so.
_COLUMNS = (
    ("_embeds: max difference", "_embeds: 1 - cosine"), ("other nearest neighbour",), ("trimmed equals padded",),
    ("shuffled batch",), ("batch 1 equals batch N",), ("tokens after EOT changed",),
)  # fmt: skip


def _figure(checks: list[Check], endings: tuple[str, ...]) -> str:
    values = [check.value for check in checks if check.name.endswith(endings)]
    return f"{max(values):.2g}" if values else "-"
