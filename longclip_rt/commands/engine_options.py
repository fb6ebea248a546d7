"""What `export` and `engine build` share: options, the bar, and the summary."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from longclip_rt.choices import BATCHES, TEXT_BUCKETS
from longclip_rt.commands.options import architectures

if TYPE_CHECKING:
    from longclip_rt.bundle.bundle import Bundle
    from longclip_rt.export.tensorrt.build import Builders, BuiltEngine, EngineOptions

Function = TypeVar("Function", bound=Callable[..., Any])

_FLAGS = {
    "archs": "--arch", "text_buckets": "--text-buckets", "batches": "--batches",
    "optimization_level": "--optimization-level",
}  # fmt: skip


def _ascending(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Numbers with commas between them."""
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1 or sorted(set(numbers)) != list(numbers):
        raise click.BadParameter(f"{value!r} should be ascending numbers with commas between them, such as 1,32,256")
    return numbers


def builds_engines(command: Function) -> Function:
    """Adds what shapes engines: `--arch`, `--text-buckets`, `--batches` and `--optimization-level`."""
    options = (
        click.option(
            "--arch", "archs", multiple=True, callback=architectures, metavar="sm89",
            help="A card's compute capability, or all; may be repeated. Default: the GPU that is here.",
        ),
        click.option(
            "--text-buckets", default=",".join(map(str, TEXT_BUCKETS)), show_default=True, callback=_ascending,
            metavar="LIST", help="Tokens that text batches are padded to; the model's context length is always one.",
        ),
        click.option(
            "--batches", default=",".join(map(str, BATCHES)), show_default=True, callback=_ascending, metavar="LIST",
            help="Last rows of each range of batch sizes that kernels are chosen for.",
        ),
        click.option(
            "--optimization-level", type=click.IntRange(0, 5), metavar="N",
            help="How long TensorRT searches for fast kernels, 0 to 5; TensorRT-RTX heeds none.  [default: its own]",
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def given_flags() -> list[str]:
    """Those of the options that the command line names, such as `--arch`."""
    source = click.get_current_context().get_parameter_source
    return [flag for name, flag in _FLAGS.items() if source(name) is not ParameterSource.DEFAULT]


def build_command(
    bundle: Path,
    engine: str,
    archs: tuple[int, ...] | str,
    text_buckets: tuple[int, ...],
    batches: tuple[int, ...],
    optimization_level: int | None,
) -> str:
    """The `engine build` that builds what `export` was asked for, to be copied into a shell."""
    words = ["longclip-rt", "engine", "build", str(bundle)]
    if engine != "auto":
        words += ["--engine", engine]
    for arch in (archs,) if isinstance(archs, str) else (f"sm{arch}" for arch in archs):
        words += ["--arch", arch]
    if text_buckets != TEXT_BUCKETS:
        words += ["--text-buckets", ",".join(map(str, text_buckets))]
    if batches != BATCHES:
        words += ["--batches", ",".join(map(str, batches))]
    if optimization_level is not None:
        words += ["--optimization-level", str(optimization_level)]
    return shlex.join(words)


def built_with_a_bar(
    bundle: Bundle,
    builders: Builders,
    options: EngineOptions,
    missing: bool = False,
    ready: Callable[[BuiltEngine], None] = lambda result: None,
) -> None:
    """Builds with a bar on stderr, prints each engine's summary there as soon as it is built, and calls `ready`."""
    from tqdm import tqdm

    from longclip_rt.export.tensorrt.build import WITH_PLUGINS, build_engines, has_plugin_graphs, without_effect

    for sentence in without_effect(options, builders.backend, bundle.architecture.context_length):
        click.echo(sentence, err=True)
    if builders.passed_over:
        click.echo(f"Building with {builders.backend}, since: {builders.passed_over}", err=True)
    if has_plugin_graphs(bundle) and builders.backend not in WITH_PLUGINS:
        click.echo(
            f"The bundle was exported with the PCA as a plug-in, which {builders.backend} does not take from Python: "
            "its engines get the kernel behind them.",
            err=True,
        )
    with tqdm(total=100, bar_format="{l_bar}{bar:20}| [{elapsed}] {desc}") as bar:

        def report(stage: str, done: float) -> None:
            bar.set_description_str(stage, refresh=False)
            bar.update(max(0.0, 100 * done - bar.n))

        def built(result: BuiltEngine) -> None:
            with bar.external_write_mode():
                click.echo("\n".join(summary(result)), err=True)
                ready(result)

        build_engines(bundle, builders, options, missing, report, built)
        bar.update(100 - bar.n)
        bar.set_description_str("done")


def summary(result: BuiltEngine) -> list[str]:
    """What was built: attention, precision, size, time, memory per profile, and layers by type and precision."""
    from longclip_rt.tensorrt.head import HEADS

    engine = result.engine
    if not result.built:
        return [f"{engine.path.name}: kept, it was there already"]
    lines = [f"{engine.path.name}: {engine.key.library} {engine.key.version}"]
    if head := engine.key.options.get("pca_head"):
        lines.append(f"  PCA: {HEADS[head]}")
    for tower, facts in engine.towers.items():
        kept = f" ({facts['kept_fp32']} blocks kept in it)" if facts["kept_fp32"] else ""
        lines.append(
            f"  {tower}: {fused_attention(facts)} attention blocks fused, {facts['fp32_products']} matrix products in "
            f"fp32{kept}; plan {_mib(facts['plan_bytes'])} MiB, "
            f"weights {_mib(facts['weights'])} MiB, {facts['seconds']} s"
        )
        if facts["changed_nodes"]:
            lines.append(
                f"    softmax_precision was taken out of {facts['changed_nodes']} Attention nodes, in memory only: "
                "TensorRT's parser refuses it"
            )
        if facts["decomposable"]:
            lines.append(
                f"    {facts['decomposable']} attention blocks are in fp32, which no fused kernel takes; they are "
                "taken apart"
            )
        if engine.key.options["batches"][0] == 1 and facts["profiles"][0]["most"] > 1:
            lines.append(
                "    no fused attention takes batches of one row alone; they are in one range with the batches behind "
                "them"
            )
        lines.append("    profile  tokens       rows  workspace MiB")
        for profile in facts["profiles"]:
            rows = f"{profile['least']}-{profile['most']}"
            tokens = "-" if profile["length"] is None else profile["length"]
            lines.append(f"    {profile['index']:>7}  {tokens:>6}  {rows:>9}  {_mib(profile['memory']):>13}")
        lines += _layers(facts["layers"])
    return lines


def fused_attention(facts: Mapping[str, Any]) -> str:
    """How many of a tower's blocks have fused attention, such as `12 of 12`: those in fp32 are taken apart."""
    return f"{facts['attention'] - facts['decomposable']} of {facts['blocks']}"


def _layers(counts: dict[str, int]) -> list[str]:
    """A line for each precision, the types with most layers first."""
    by_precision: dict[str, list[tuple[int, str]]] = {}
    for name, count in counts.items():
        kind, _, precision = name.partition(" ")
        by_precision.setdefault(precision, []).append((-count, kind))
    return [
        f"    layers in {precision}: {', '.join(f'{kind} {-count}' for count, kind in sorted(kinds))}"
        for precision, kinds in sorted(by_precision.items())
    ]


def _mib(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**20:,.1f}"
