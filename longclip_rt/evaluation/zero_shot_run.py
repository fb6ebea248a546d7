"""`longclip-rt evaluate zero-shot`: images and classes, one or several models, one report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.errors import InputError
from longclip_rt.evaluation.cache import opened_entry
from longclip_rt.evaluation.classes import ClassesName, Classified, Question, load_classified
from longclip_rt.evaluation.collection import Skipped, skipped_as_json
from longclip_rt.evaluation.data import reading_errors
from longclip_rt.evaluation.figures import Difference, Figure, differences
from longclip_rt.evaluation.models import Made, ModelSpec, each_model
from longclip_rt.evaluation.published import IMAGENET, SECOND_HAND
from longclip_rt.evaluation.report import csv_text, difference_columns, markdown_table, percent, points
from longclip_rt.evaluation.vectors import Bars, Embedded, NoBar, embedded
from longclip_rt.metrics import places, unit_rows
from longclip_rt.runtime import Embedder
from longclip_rt.version import __version__

TOPS = (1, 5)


@dataclass(frozen=True)
class Accuracy:
    """One model's answers to one question about n images.

    Attributes:
        question: The question.
        figures: `top1` and `top5`.
        mean_per_class: The mean over classes with images of their own top-1, from 0 to 1.
    """

    question: Question
    figures: dict[str, Figure]
    mean_per_class: float

    def as_json(self) -> dict[str, Any]:
        """Counts, and shares from 0 to 1."""
        counts = {"images": len(self.figures["top1"].hits), "classes": len(self.question.classes)}
        shares = {name: figure.share for name, figure in self.figures.items()}
        prompts = sum(map(len, self.question.prompts))
        return counts | shares | {"mean_per_class": self.mean_per_class, "prompts": prompts}


@dataclass(frozen=True)
class ZeroShotReport:
    """What an evaluation found.

    Attributes:
        data: The data set.
        classified: Its images and questions.
        skipped: Everything that takes no part.
        made: The models, the first of which the others are compared with.
        accuracies: What each of them answered, a question each.
        computed: Images and texts that were embedded in this run.
    """

    data: ClassesName
    classified: Classified
    skipped: tuple[Skipped, ...]
    made: tuple[Made, ...]
    accuracies: tuple[tuple[Accuracy, ...], ...]
    computed: int

    @cached_property
    def compared(self) -> list[list[dict[str, Difference]]]:
        """For each further model and question, how much its figures are above the first model's."""
        return [
            [differences(one.figures, base.figures) for one, base in zip(further, self.accuracies[0], strict=True)]
            for further in self.accuracies[1:]
        ]

    def as_json(self) -> dict[str, Any]:
        """The first model's answers to the main question, all questions, what takes no part, what made it; others."""
        compared = [
            {"model": made.label, "made_by": made.made_by}
            | further[0].as_json()
            | {"questions": self._questions(further)}
            | {"difference": {name: dataclasses.asdict(one) for name, one in found[0].items()}}
            for made, further, found in zip(self.made[1:], self.accuracies[1:], self.compared, strict=True)
        ]
        return (
            {"model": self.made[0].label}
            | self.accuracies[0][0].as_json()
            | {
                "questions": self._questions(self.accuracies[0]),
                "templates": self.classified.templates,
                "skipped": skipped_as_json(self.skipped),
                "data": self.data.as_json(),
                "made_by": {"tool": f"longclip-rt {__version__}"} | self.made[0].made_by,
                "compared": compared,
                "published": [{"what": SECOND_HAND} | dataclasses.asdict(row) for row in self._published()],
            }
        )

    @staticmethod
    def _questions(accuracies: Sequence[Accuracy]) -> dict[str, Any]:
        return {one.question.name: one.as_json() for one in accuracies}

    def _published(self) -> tuple[Any, ...]:
        return IMAGENET if self.data.kind == "imagenet" else ()

    def as_markdown(self) -> str:
        """Tables: all models and published rows, and differences."""
        rows = []
        for made, answers in zip(self.made, self.accuracies, strict=True):
            for one in answers:
                found = one.as_json()
                shares = [percent(found[name]) for name in ("top1", "top5", "mean_per_class")]
                counts = [f"{found[name]:,}" for name in ("images", "classes")]
                rows.append([made.label, one.question.name, *counts, *shares])
        for row in self._published():
            cells = ["class", "50,000", "1,000", percent(row.top1), "-", "-"]
            rows.append([f"{row.model}, {SECOND_HAND}: {row.source}", *cells])
        header = ["model", "question", "images", "classes", "top-1", "top-5", "mean per class"]
        parts = [markdown_table(header, rows, left=2)]
        if self.compared:
            differing = [
                [made.label, one.question.name, points(found["top1"]), points(found["top5"])]
                for made, further, several in zip(self.made[1:], self.accuracies[1:], self.compared, strict=True)
                for one, found in zip(further, several, strict=True)
            ]
            title = f"points above {self.made[0].label} [95% interval]"
            parts.append(markdown_table([title, "question", "top-1", "top-5"], differing, left=2))
        return "\n\n".join(parts) + "\n"

    def as_csv(self) -> str:
        """A row for each model and question, and for each published figure."""
        compared: list[list[dict[str, Difference]]] = [[{}] * len(self.accuracies[0]), *self.compared]
        rows: list[dict[str, Any]] = [
            {"model": made.label, "source": "measured", "question": one.question.name}
            | one.as_json()
            | difference_columns(found)
            for made, answers, several in zip(self.made, self.accuracies, compared, strict=True)
            for one, found in zip(answers, several, strict=True)
        ]
        for row in self._published():
            source = f"{SECOND_HAND}: {row.source}"
            rows.append({"model": row.model, "source": source, "question": "class", "top1": row.top1})
        return csv_text(rows)


def evaluate_zero_shot(
    data: ClassesName,
    specs: Sequence[ModelSpec],
    *,
    cache: Path | None = None,
    fresh: bool = False,
    batch_size: int | None = None,
    bars: Bars = NoBar,
) -> ZeroShotReport:
    """Evaluates models on one data set; see `evaluate_retrieval` for the arguments.

    Raises:
        LongClipError: The data cannot be read, a model not be opened, or nothing could be embedded.
    """
    loaded: list[Classified] = []
    with opened_entry(cache, f"classes-{data.kind}", data.as_json(), fresh) as entry:

        def work(embedder: Embedder) -> Embedded:
            if not loaded:  # scenes are drawn for the first model
                with reading_errors(data.path):
                    loaded.append(load_classified(data, entry, embedder.image_size))
            texts = [text for one in loaded[0].questions for prompts in one.prompts for text in prompts]
            return embedded(entry, embedder, loaded[0].images, texts, batch_size, bars)

        results = list(each_model(specs, work))
    classified = loaded[0]
    bad = {row: why for _, one in results for row, why in one.bad_images.items()}
    for _, one in results:
        if one.bad_texts:
            raise InputError(f"A prompt cannot be embedded: {next(iter(one.bad_texts.values()))}")
    kept = np.array([row for row in range(len(classified.images)) if row not in bad], np.int64)
    skipped = classified.skipped + tuple(Skipped(classified.names[row], why) for row, why in bad.items())
    if not len(kept):
        raise InputError(f"None of the images could be embedded, such as {skipped[-1].id}: {skipped[-1].reason}")
    return ZeroShotReport(
        data,
        classified,
        skipped,
        tuple(made for made, _ in results),
        tuple(tuple(_answers(classified, one, kept)) for _, one in results),
        sum(one.computed for _, one in results),
    )


def _answers(classified: Classified, vectors: Embedded, kept: NDArray[np.int64]) -> list[Accuracy]:
    """Each question's accuracy on the images that were embedded."""
    found, start = [], 0
    for question in classified.questions:
        stop = start + sum(map(len, question.prompts))
        classes = class_vectors(vectors.texts[start:stop], [len(prompts) for prompts in question.prompts])
        start = stop
        labels = question.labels[kept]
        where = places(vectors.images[kept], classes, labels, np.arange(len(classes)))
        units = np.arange(len(kept))
        figures = {f"top{top}": Figure(where.hits(top), units) for top in TOPS}
        hits = np.bincount(labels, figures["top1"].hits, len(classes))
        sizes = np.bincount(labels, minlength=len(classes))
        found.append(Accuracy(question, figures, float((hits[sizes > 0] / sizes[sizes > 0]).mean())))
    return found


def class_vectors(texts: NDArray[np.float32], prompts: Sequence[int]) -> NDArray[np.float32]:
    """The mean of each class's normalised prompts, of length 1: float32 [C, D] from [sum of prompts, D].

    Args:
        texts: Embeddings of the prompts, class after class.
        prompts: How many each of the C classes has.
    """
    ends = np.cumsum(prompts)
    means = [unit_rows(texts[end - count : end]).mean(axis=0) for end, count in zip(ends, prompts, strict=True)]
    return unit_rows(np.stack(means))
