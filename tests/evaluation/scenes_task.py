"""Drawn scenes with three captions each as a data set of this machine, for mteb, clip_benchmark and us."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layout_cases import put_lines

from longclip_rt.bundle.bundle import BUILT_IN
from longclip_rt.evaluation.data import DataName
from longclip_rt.evaluation.models import ModelSpec
from longclip_rt.evaluation.retrieval_run import evaluate_retrieval
from longclip_rt.train.scenes import render, scene, sentence_captions

MODEL = BUILT_IN
SPEC = ModelSpec(MODEL, "onnxruntime", "fp32")
SENTENCES = 3


@dataclass(frozen=True)
class ScenesTask:
    """Pictures with three captions each, hard enough that some are missed.

    Attributes:
        images: PNG files.
        captions: Of each.
        figures: What `longclip-rt evaluate retrieval` finds.
    """

    images: list[Path]
    captions: list[list[str]]
    figures: dict[str, float]


def scenes_task(folder: Path, count: int = 24) -> ScenesTask:
    """Writes the pictures and evaluates them."""
    images, captions = [], []
    for number in range(count):
        drawn = scene(1 << 33, number)
        images.append(folder / f"{number}.png")
        render(drawn, 96).save(images[-1])
        captions.append([" ".join(sentence_captions(drawn)[n : n + 3]) for n in range(SENTENCES)])
    # Equal captions of two images would tie, which the others break in one way or the other.
    assert len({text for texts in captions for text in texts}) == SENTENCES * count
    rows = [
        {"image": str(image), "caption": text} for image, texts in zip(images, captions, strict=True) for text in texts
    ]
    data = DataName("table", str(put_lines(folder / "pairs.jsonl", rows)))
    figures = evaluate_retrieval(data, [SPEC], cache=folder / "cache").as_json()
    assert not figures["skipped"] and 0 < figures["t2i_r1"] < 1 and 0 < figures["i2t_r1"] < 1
    return ScenesTask(images, captions, figures)
