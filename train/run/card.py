"""The model card: a README.md, as Hugging Face shows it, that goes with trained weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longclip_rt.system.files import write_text_atomically

CARD_FILE = "README.md"

_RECALL = re.compile(r"(?:.*/)?(?:(?P<captions>.+)_)?(?P<direction>i2t|t2i)_r(?P<k>\d+)")
_DIRECTIONS = {"i2t": "Image to text", "t2i": "Text to image"}


@dataclass(frozen=True)
class TrainingFacts:
    """How a model was trained.

    Attributes:
        data: Where the pairs came from, in words or as a path that may be published.
        rows: Pairs trained on.
        seed: Of the data's order, and of weights that began at random.
        steps: Optimiser steps.
        batch_size: Pairs of a step, over all processes.
        precision: What the towers computed in, such as `bf16`.
        hardware: Such as `1 x NVIDIA A100 80GB`, or the processor's name.
        seconds: Time spent in training, resumed parts included.
        started_from: The weights it began with.
        validation_rows: Pairs the retrieval figures were measured on; a recall means little without.
        versions: Library -> version; libraries whose version is None are left out.
        commit: Of the code that trained it.
    """

    data: str
    rows: int
    seed: int
    steps: int
    batch_size: int
    precision: str
    hardware: str
    seconds: float
    started_from: str | None = None
    validation_rows: int | None = None
    versions: Mapping[str, str | None] = field(default_factory=dict)
    commit: str | None = None


@dataclass(frozen=True)
class ModelCard:
    """What a model card says.

    Attributes:
        name: The model's name, the card's heading.
        summary: What it is, and what it is for; Markdown.
        training: How it was trained.
        limits: What it does not do; Markdown.
        config: The run's configuration: a dataclass or a mapping, nested or not, shown as a table.
        retrieval: Validation recall as fractions, by the names of `longclip_rt.metrics.retrieval` with the kind
            of captions before them: `long_i2t_r1`. Other names are shown as further figures.
        figures: Further measured figures: what was measured, and the result; Markdown.
        weights: The file of weights, beside the card.
        license: An identifier as Hugging Face has them.
        tags: For Hugging Face's search.
        base_model: The repository on Hugging Face that it was trained from, if any.
        usage: How to use it, Markdown; None tells how weights are exported.
    """

    name: str
    summary: str
    training: TrainingFacts
    limits: str
    config: Any = field(default_factory=dict)
    retrieval: Mapping[str, float] = field(default_factory=dict)
    figures: Sequence[tuple[str, str]] = ()
    weights: str = "model.safetensors"
    license: str = "apache-2.0"
    tags: Sequence[str] = ("clip", "long-clip", "image-text-retrieval")
    base_model: str | None = None
    usage: str | None = None


def model_card(card: ModelCard) -> str:
    """Renders a card: YAML front matter, then Markdown; figures that were not given leave out their section."""
    parts = (_front_matter(card), f"# {_line(card.name)}", card.summary.strip(), *_figures(card), *_training(card))
    return "\n\n".join((*parts, _usage(card), "## Limits", card.limits.strip())) + "\n"


def write_model_card(path: Path, card: ModelCard) -> None:
    """Writes a card, whole or not at all.

    Args:
        path: The file, `README.md` in a model's folder.
        card: What it says.

    Raises:
        OutputError: The folder cannot be written.
    """
    write_text_atomically(path, model_card(card))


def _front_matter(card: ModelCard) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=card.license,
        library_name="longclip-rt",
        pipeline_tag="zero-shot-image-classification",
        base_model=card.base_model,
        tags=list(card.tags) or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _figures(card: ModelCard) -> Iterator[str]:
    """The section of measured figures; nothing where there are none."""
    recall = {name: match for name in card.retrieval if (match := _RECALL.fullmatch(name))}
    others = [(name, f"{value:.4g}") for name, value in card.retrieval.items() if name not in recall]
    rows = [*others, *card.figures]
    if recall or rows:
        yield "## Figures"
    if recall:
        count = card.training.validation_rows
        among = "the validation pairs" if count is None else f"the {count:,} validation pairs"
        yield (
            f"Retrieval among {among}: the share of queries, in %, whose partner is the first, or among the first k "
            "(R@k). Equal similarities count as if broken at random."
        )
        yield _recall_table(card.retrieval, recall)
    if rows:
        yield _table(("Measured", "Result"), rows)


def _recall_table(values: Mapping[str, float], recall: Mapping[str, re.Match[str]]) -> str:
    """Rows are captions, columns the directions and ranks; what was not measured is a dash."""
    ranks = sorted({int(match["k"]) for match in recall.values()})
    columns = [(direction, k) for direction in _DIRECTIONS for k in ranks]
    cells: dict[str, dict[tuple[str, int], str]] = {}
    for name, match in recall.items():
        row = cells.setdefault((match["captions"] or "all").replace("_", " "), {})
        row[match["direction"], int(match["k"])] = f"{100 * values[name]:.1f}"
    head = ("Captions", *(f"{_DIRECTIONS[direction]} R@{k}" for direction, k in columns))
    return _table(head, ((captions, *(row.get(one, "–") for one in columns)) for captions, row in cells.items()))


def _training(card: ModelCard) -> Iterator[str]:
    facts = card.training
    versions = ", ".join(f"{name} {number}" for name, number in facts.versions.items() if number is not None)
    rows = {
        "Data": facts.data,
        "Pairs": f"{facts.rows:,}",
        "Started from": facts.started_from,
        "Steps": f"{facts.steps:,}",
        "Pairs in a step": f"{facts.batch_size:,}",
        "Precision": facts.precision,
        "Seed": str(facts.seed),
        "Hardware": facts.hardware,
        "Time": _duration(facts.seconds),
        "Versions": versions or None,
        "Commit of the code": facts.commit,
    }
    yield "## Training"
    yield "Trained with `longclip-rt train`, after Long-CLIP (Zhang et al., 2024, arXiv 2403.15378)."
    yield _table(("", ""), ((name, value) for name, value in rows.items() if value is not None))
    if settings := list(_flat(card.config)):
        yield "The run's configuration:"
        yield _table(("Setting", "Value"), ((f"`{name}`", value) for name, value in settings))


def _usage(card: ModelCard) -> str:
    if card.usage is not None:
        return f"## Use\n\n{card.usage.strip()}"
    # Quoted where a shell would split it; double quotes hold on every system's shell.
    weights = card.weights if re.fullmatch(r"[\w./-]+", card.weights) else f'"{card.weights}"'
    return "\n".join((
        "## Use",
        "",
        "```",
        'pip install "longclip-rt[export]"',
        f"longclip-rt export --weights {weights} --out bundle",
        "longclip-rt embed images.txt -o images.parquet --bundle bundle",
        'longclip-rt search images.parquet "a long description of what to find" --bundle bundle',
        "```",
        "",
        "`images.txt` has the path of an image in each line.",
    ))  # fmt: skip


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of a dataclass or mapping; None stays, for it is a setting too."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    for name, value in config.items():
        if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split())


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
