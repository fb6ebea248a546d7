"""`longclip-rt bench`: how fast the backends are here."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from longclip_rt.choices import BACKENDS, PRECISIONS, REFERENCES


class _Several(click.ParamType[Any]):
    """Values with commas between them: of a few words, or numbers from 1."""

    name = "list"

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.words = words

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """The values, each once, in their order."""
        parts = dict.fromkeys(part.strip() for part in str(value).split(","))
        for part in parts:
            good = part in self.words if self.words else part.isascii() and part.isdigit() and int(part) > 0
            if not good:
                wanted = f"of {', '.join(self.words)}" if self.words else "numbers from 1"
                self.fail(f"{part!r} should be one or more {wanted}, with commas between", parameter, context)
        return tuple(parts) if self.words else tuple(map(int, parts))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """For the help."""
        return "A,B,..."


_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="The model. Default: the newest bundle.")
@click.option("--weights", metavar="W", help="Export these (such as random:ViT-B-16) for the run, unverified.")
@click.option("--backend", "backends", type=_Several(("auto", "all", *BACKENDS)), default="auto",
              show_default=True, help="Backends; all are those usable here, on a GPU if there is one.")  # fmt: skip
@click.option("--precision", "precisions", type=_Several(("auto", *PRECISIONS)), default="auto", show_default=True,
              help="Precisions of each; auto is the fastest that it offers.")  # fmt: skip
@click.option("--against", type=_Several(("reference", *REFERENCES)), default=None,
              help="Measure beside what one would use instead; reference is all four.")  # fmt: skip
@click.option("--tower", "towers", type=_Several(("text", "image")), default="text,image", show_default=True,
              help="Encoders.")  # fmt: skip
@click.option("--batch", "batches", type=_Several(), help="Rows in a batch. Default: 1,64 on a GPU, else 1,8.")
@click.option("--tokens", "lengths", type=_Several(), default="20,77,248", show_default=True, help="Lengths of texts.")
@click.option(
    "--rounds",
    metavar="N",
    type=click.IntRange(2),
    default=4,
    show_default=True,
    help="Turns of each way in each case.",
)
@click.option("--seconds", metavar="S", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True,
              help="Of each way in each case, all rounds together, warm-up aside.")  # fmt: skip
@click.option("--quick", is_flag=True, help="2 rounds of 0.1 seconds.")
@click.option("--json", "json_path", type=_FILE, help="Write everything there.")
@click.option("--csv", "csv_path", type=_FILE, help="Write the table there.")
@click.option("--plot", "plot_path", type=_FILE, help="Draw there: .png, .svg or .pdf.")
@click.option("--compare", "old_path", type=_FILE,
              help="Say what changed since the run of this JSON file; exit 1 on a regression.")  # fmt: skip
@click.option("--bound", metavar="P", type=click.FloatRange(0), default=10.0, show_default=True,
              help="Percent more time that make a regression, beyond the noise.")  # fmt: skip
def bench(
    bundle: Path | None,
    weights: str | None,
    backends: tuple[str, ...],
    precisions: tuple[str, ...],
    against: tuple[str, ...] | None,
    towers: tuple[str, ...],
    batches: tuple[int, ...] | None,
    lengths: tuple[int, ...],
    rounds: int,
    seconds: float,
    quick: bool,
    json_path: Path | None,
    csv_path: Path | None,
    plot_path: Path | None,
    old_path: Path | None,
    bound: float,
) -> None:
    """Measure latency and throughput here, stage by stage, beside what one would use instead.

    \b
    Examples:
      longclip-rt bench --quick
      longclip-rt bench --backend openvino,onnxruntime --precision fp32 --against reference
      longclip-rt bench --weights random:ViT-B-16 --backend all --precision fp16,fp32 --json card.json
    """
    from longclip_rt.bench.cases import BATCHES, cases
    from longclip_rt.bench.compare import changes, lines, load_results
    from longclip_rt.bench.measure import BenchOptions, run_bench
    from longclip_rt.bench.plot import check_plot, plot
    from longclip_rt.bench.report import csv_text, table
    from longclip_rt.bench.setting import model, ways_of
    from longclip_rt.system.files import write_text_atomically

    old = None if old_path is None else load_results(old_path)  # before minutes are spent
    if plot_path is not None:
        check_plot(plot_path)

    def say(words: str) -> None:
        click.echo(words, err=True)

    fp16 = "fp16" in precisions and any(name != "torch" for name in backends)  # which lowers the fp32 weights itself
    with model(bundle, weights, fp16, say) as opened:
        ways, on_gpu = ways_of(opened, backends, precisions, REFERENCES if "reference" in (against or ()) else against)
        chosen = cases(towers, batches or BATCHES[on_gpu], lengths, opened.architecture.context_length)
        rounds, seconds = (2, 0.2) if quick else (rounds, seconds)
        results = run_bench(opened, BenchOptions(ways, chosen, on_gpu, seconds, rounds), say)
    click.echo("\n".join(table(results)))
    if json_path is not None:
        write_text_atomically(json_path, json.dumps(results, indent=1) + "\n")
    if csv_path is not None:
        write_text_atomically(csv_path, csv_text(results, " ".join(["longclip-rt", *sys.argv[1:]])))
    if plot_path is not None:
        plot(results, plot_path)
    if old is not None:
        found = changes(old, results)
        click.echo("\n".join(lines(found, bound / 100)))
        if any(change.regressed(bound / 100) for change in found):
            sys.exit(1)
