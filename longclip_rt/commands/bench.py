"""`longclip-rt bench`: how fast the backends are here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from longclip_rt.choices import BACKENDS, PRECISIONS


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


_REFERENCES = ("open_clip", "torch.compile", "transformers", "plain-onnxruntime")


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="The model. Default: the newest bundle.")
@click.option("--weights", metavar="W", help="Export these (such as random:ViT-B-16) for the run, in fp32, unverified.")
@click.option("--backend", "backends", type=_Several(("auto", *BACKENDS)), default="auto", show_default=True,
              help="Backends to measure.")  # fmt: skip
@click.option("--precision", "precisions", type=_Several(("auto", *PRECISIONS)), default="auto", show_default=True,
              help="Precisions of each; auto is the fastest that it offers.")  # fmt: skip
@click.option("--against", type=_Several(("reference", *_REFERENCES)), default=None,
              help="Measure beside what one would use instead; reference is all four.")  # fmt: skip
@click.option("--tower", "towers", type=_Several(("text", "image")), default="text,image", show_default=True,
              help="Encoders.")  # fmt: skip
@click.option("--batch", "batches", type=_Several(), default="1,64", show_default=True, help="Rows in a batch.")
@click.option("--tokens", "lengths", type=_Several(), default="20,77,248", show_default=True, help="Lengths of texts.")
@click.option("--rounds", type=click.IntRange(1), default=4, show_default=True, help="Turns of each way in each case.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True,
              help="Of each way in each case, all rounds together, warm-up aside.")  # fmt: skip
@click.option("--quick", is_flag=True, help="2 rounds of 0.1 seconds.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write everything there.")
def bench(
    bundle: Path | None,
    weights: str | None,
    backends: tuple[str, ...],
    precisions: tuple[str, ...],
    against: tuple[str, ...] | None,
    towers: tuple[str, ...],
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
    rounds: int,
    seconds: float,
    quick: bool,
    json_path: Path | None,
) -> None:
    """Measure latency and throughput here, stage by stage, beside what one would use instead.

    \b
    Examples:
      longclip-rt bench --quick
      longclip-rt bench --backend openvino,onnxruntime --precision fp32 --against reference
      longclip-rt bench --weights random:ViT-B-16 --backend torch --precision fp16,fp32 --json card.json
    """
    from longclip_rt.bench.cases import cases
    from longclip_rt.bench.measure import BenchOptions, run_bench
    from longclip_rt.bench.report import table
    from longclip_rt.bench.setting import model, ways_of
    from longclip_rt.system.files import write_text_atomically

    def say(words: str) -> None:
        click.echo(words, err=True)

    with model(bundle, weights, say) as opened:
        ways, on_gpu = ways_of(opened, backends, precisions, _REFERENCES if "reference" in (against or ()) else against)
        chosen = cases(towers, batches, lengths, opened.architecture.context_length)
        rounds, seconds = (2, 0.2) if quick else (rounds, seconds)
        results = run_bench(opened, BenchOptions(ways, chosen, on_gpu, seconds, rounds), say)
    click.echo("\n".join(table(results)))
    if json_path is not None:
        write_text_atomically(json_path, json.dumps(results, indent=1) + "\n")
