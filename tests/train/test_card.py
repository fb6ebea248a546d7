from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from longclip_rt.errors import OutputError
from longclip_rt.train.run.card import ModelCard, TrainingFacts, model_card, write_model_card

FACTS = TrainingFacts(
    data="scenes | seeds 0 to 9",
    rows=40_000,
    seed=7,
    steps=1_250,
    batch_size=128,
    precision="bf16",
    hardware="2 cores",
    seconds=5_400,
    validation_rows=1_000,
    versions={"torch": "2.14.1", "tensorrt": None},
    commit="0123abc",
)
CARD = ModelCard("tiny", "A small model.", FACTS, "It knows nothing about photographs.")


def front_matter(card: ModelCard) -> Any:
    opening, matter, _ = model_card(card).split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(matter)


def table_rows(text: str) -> dict[str, list[str]]:
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


@dataclass
class Inner:
    width: int = 192


@dataclass
class Config:
    lr: float = 1e-6
    val: str | None = None
    architecture: Inner = field(default_factory=Inner)


def test_front_matter_is_yaml_and_survives_odd_names() -> None:
    assert front_matter(CARD) == {
        "license": "apache-2.0",
        "library_name": "longclip-rt",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "long-clip", "image-text-retrieval"],
    }
    odd = replace(CARD, license="no", tags=("a: b", "1", "ü#x"), base_model="openai/clip-vit-base-patch16")
    found = front_matter(odd)
    assert (found["license"], found["tags"]) == ("no", ["a: b", "1", "ü#x"])
    assert found["base_model"] == "openai/clip-vit-base-patch16"
    assert "tags" not in front_matter(replace(CARD, tags=()))


def test_training_is_told_and_what_is_unknown_left_out() -> None:
    text = model_card(CARD)
    rows = table_rows(text)
    assert rows["Data"] == ["scenes \\| seeds 0 to 9"]
    assert (rows["Pairs"], rows["Steps"], rows["Seed"]) == (["40,000"], ["1,250"], ["7"])
    assert (rows["Time"], rows["Versions"]) == (["1 h 30 min"], ["torch 2.14.1"])
    assert rows["Commit of the code"] == ["0123abc"]
    assert "Started from" not in rows
    assert "## Figures" not in text
    assert text.endswith("## Limits\n\nIt knows nothing about photographs.\n")
    assert "longclip-rt export --weights model.safetensors --out" in text
    assert '--weights "my model.safetensors" ' in model_card(replace(CARD, weights="my model.safetensors"))


@pytest.mark.parametrize(("seconds", "shown"), [(12.4, "12 s"), (59.8, "1 min"), (3599, "1 h 0 min")])
def test_times_are_rounded_to_a_useful_unit(seconds: float, shown: str) -> None:
    assert table_rows(model_card(replace(CARD, training=replace(FACTS, seconds=seconds))))["Time"] == [shown]


@pytest.mark.parametrize("config", [Config(), {"lr": 1e-6, "val": None, "architecture": {"width": 192}}])
def test_the_configuration_is_a_table_whatever_it_is_held_in(config: object) -> None:
    rows = table_rows(model_card(replace(CARD, config=config)))
    assert (rows["`lr`"], rows["`val`"], rows["`architecture.width`"]) == (["1e-06"], ["None"], ["192"])


def test_retrieval_is_a_table_of_captions_and_directions() -> None:
    retrieval = {
        "val/short_t2i_r1": 0.25,
        "long_i2t_r1": 0.9876,
        "long_i2t_r5": 1.0,
        "long_t2i_r1": 0.5,
        "loss": 1.23456,
    }
    text = model_card(replace(CARD, retrieval=retrieval, figures=[("Zero-shot, main object", "88.1%")]))
    rows = table_rows(text)
    assert rows["Captions"] == ["Image to text R@1", "Image to text R@5", "Text to image R@1", "Text to image R@5"]
    assert rows["long"] == ["98.8", "100.0", "50.0", "–"]
    assert rows["short"] == ["–", "–", "25.0", "–"]
    assert (rows["loss"], rows["Zero-shot, main object"]) == (["1.235"], ["88.1%"])
    assert "the 1,000 validation pairs" in text
    # A table needs an empty line before it.
    assert "\n\n| Captions" in text


def test_the_card_is_written_whole(tmp_path: Path) -> None:
    write_model_card(tmp_path / "README.md", CARD)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == model_card(CARD)
    with pytest.raises(OutputError, match="cannot be written"):
        write_model_card(tmp_path / "absent" / "README.md", CARD)


def test_a_card_may_tell_another_use() -> None:
    told = model_card(replace(CARD, usage="It is a bundle."))
    assert "## Use\n\nIt is a bundle.\n\n## Limits" in told and "longclip-rt export" not in told
