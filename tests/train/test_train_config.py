from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from longclip_rt.errors import TrainingError
from longclip_rt.train.config import PRESETS, TrainConfig, preset_config
from longclip_rt.train.loss import COMPONENTS, LABEL_SMOOTHING
from longclip_rt.train.setup import precision_of


@pytest.mark.parametrize("preset", ["longclip-b", "longclip-l"])
def test_the_paper_s_presets_are_the_reference_s_settings(preset: str) -> None:
    config = preset_config(preset, "pairs.json")
    reference = {
        "objective": "longclip",
        "positions": "kps",
        "components": 32,
        "pcm_scope": "local",
        "label_smoothing": 0.1,
        "logit_scale": math.log(100),
        "max_logit_scale": None,
        "batch_size": 2048,
        "lr": 1e-6,
        "weight_decay": 1e-2,
        "warmup_steps": 200,
        "clip_grad_norm": None,
        "val_rows": 1000,
        "epochs": 1,
    }
    assert {name: getattr(config, name) for name in reference} == reference
    assert (COMPONENTS, LABEL_SMOOTHING) == (32, 0.1)
    assert config.weights == f"open_clip:{'ViT-B-16' if preset == 'longclip-b' else 'ViT-L-14'}/openai"


def test_auto_is_fp16_on_a_gpu_as_in_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert [precision_of(name, gpu) for name in ("auto", "bf16", "fp32")] == ["fp16", "bf16", "fp32"]
    for features, expected in ((["avx2"], "fp32"), (["avx2", "amx_bf16"], "bf16"), (["asimd", "bf16"], "bf16")):
        monkeypatch.setattr("longclip_rt.train.setup.cpu_features", lambda found=features: found)
        assert precision_of("auto", cpu) == expected
    with pytest.raises(TrainingError, match="fp16 needs a GPU; choose --precision bf16 or fp32"):
        precision_of("fp16", cpu)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_make_configurations_that_go_through_json(preset: str) -> None:
    config = preset_config(preset, "pairs.json", seed=3, steps=None, weights="mine" if preset == "tiny-long" else None)
    assert config.seed == 3
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_second_phase_does_not_begin_with_weights_that_nobody_named() -> None:
    with pytest.raises(TrainingError, match="name them, as in --weights"):
        preset_config("tiny-long", "scenes:100")


def test_changes_win_over_a_preset_and_none_leaves_it() -> None:
    tiny = preset_config("tiny", "scenes:100")
    assert dataclasses.replace(tiny, lr=2.0) == preset_config("tiny", "scenes:100", lr=2.0, batch_size=None)
    with pytest.raises(TrainingError, match="no preset 'huge'; choose longclip-b"):
        preset_config("huge", "scenes:100")


def test_the_learning_rate() -> None:
    config = TrainConfig("pairs.json", lr=2.0, warmup_steps=4)
    rates = [config.lr_at(step, 12) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    expected = [1 + math.cos(math.pi * step / 8) for step in range(8)]
    assert rates[4:] == pytest.approx(expected)
    assert config.lr_at(12, 12) == pytest.approx(0)
    assert [dataclasses.replace(config, warmup_steps=0).lr_at(step, 2) for step in range(2)] == pytest.approx([2, 1])
    # A warm-up that is longer than the run takes all of it.
    assert [config.lr_at(step, 2) for step in range(2)] == [1, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"epochs": 0},
        {"steps": 0},
        {"chunk_size": 0},
        {"components": 0},
        {"keep_checkpoints": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"weight_decay": -1.0},
        {"warmup_steps": -1},
        {"label_smoothing": 1.0},
        {"clip_grad_norm": 0.0},
        {"objective": "magic"},
        {"positions": "magic"},
        {"precision": "int3"},
        {"pcm_scope": "both"},
        {"weights": "scratch"},
    ],
)
def test_settings_out_of_bounds_are_refused_by_name(changes: dict[str, object]) -> None:
    (name,) = changes
    with pytest.raises(TrainingError, match=name.replace("weights", "Weights from scratch")):
        TrainConfig("pairs.json", **changes)  # type: ignore[arg-type]
