from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from train_case import (
    SMALL,
    assert_same_weights,
    program_path,
    run,
    small_config,
    tensors,
    write_patterns,
)

import longclip_rt.train.loop as loop
from longclip_rt.errors import TrainingError, WeightsError
from longclip_rt.model.positions import stretch_positions
from longclip_rt.train.loop import TrainReport, train
from longclip_rt.train.run.checkpoints import FOLDER
from longclip_rt.train.run.report import METRICS_FILE, read_metrics
from longclip_rt.train.run.results import BAD_ROWS, WEIGHTS
from longclip_rt.weights.checkpoint import load_checkpoint, towers_from_checkpoint

HERE = Path(__file__).parent
RECALLS = [f"{kind}_{way}_r{k}" for kind in ("long", "short") for way in ("i2t", "t2i") for k in (1, 5, 10)]


@pytest.fixture(scope="module")
def unbroken(material: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainReport:
    """A finished run; tests copy its folder before they change it."""
    return run(material, tmp_path_factory.mktemp("runs") / "unbroken")


def test_a_run_leaves_weights_that_load_as_long_clip(material: Path, unbroken: TrainReport) -> None:
    assert unbroken.weights == unbroken.folder / "model.safetensors"
    start, weights = load_checkpoint(material / "clip.safetensors", context_length=None), tensors(unbroken.folder)
    table = stretch_positions(start.state_dict["positional_embedding"])
    assert torch.equal(weights["positional_embedding"], table)
    assert not torch.equal(weights["positional_embedding_res"][20:60], table[20:60])
    loaded = load_checkpoint(unbroken.weights)
    assert loaded.trained and loaded.architecture == dataclasses.replace(SMALL, context_length=248)
    assert torch.equal(loaded.state_dict["positional_embedding"][:20], table[:20])
    for tower in towers_from_checkpoint(loaded):
        assert all(torch.isfinite(one).all() for one in tower.parameters())


def test_a_run_learns(material: Path, tmp_path: Path) -> None:
    data = write_patterns(tmp_path / "patterns", 18)
    settings: dict[str, Any] = {"lr": 3e-3, "logit_scale": 2.5, "validate_every": 1000, "steps": 40}
    config = small_config(data, material / "clip.safetensors", **settings)
    losses = read_metrics(train(config, tmp_path / "run", device="cpu", quiet=True).folder)["loss"][1]
    # Twice ln 8 is chance; label smoothing leaves a rest of about 0.9.
    assert losses[0] > 3 and losses[-1] < 1.8


def test_what_a_run_writes(unbroken: TrainReport) -> None:
    folder = unbroken.folder
    metrics = read_metrics(folder)
    assert metrics["loss"][0] == [10, 20, 24]
    for name in ("loss", "loss_long", "loss_short", "lr", "grad_norm", "logit_scale", "skipped_steps"):
        assert len(metrics[name][1]) == 3, name
    assert metrics["loss"][1] == pytest.approx(
        [long + short for long, short in zip(metrics["loss_long"][1], metrics["loss_short"][1], strict=True)]
    )
    for name in RECALLS:
        assert metrics[name][0] == [5, 10, 15, 20, 24]
    assert list(unbroken.figures) == RECALLS
    assert unbroken.figures == {name: metrics[name][1][-1] for name in RECALLS}
    assert (unbroken.steps, unbroken.bad_rows, unbroken.main) == (24, 0, True) and unbroken.seconds > 0
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events.*"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| Pairs | 72 |" in card and "R@1" in card and "`components` | 4 |" in card
    assert json.loads((folder / "config.json").read_text())["lr"] == 1e-3
    assert sorted(path.name for path in (folder / FOLDER).glob("*.pt")) == ["step-00000021.pt", "step-00000024.pt"]
    assert not (folder / BAD_ROWS).exists()


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(material: Path, tmp_path: Path) -> None:
    run(material, tmp_path / "run", steps=20, warmup_steps=15)
    expected = [1e-3 * 10 / 15, 1e-3 * 0.5 * (1 + math.cos(math.pi * 4 / 5))]
    assert read_metrics(tmp_path / "run")["lr"][1] == pytest.approx(expected)


def test_a_killed_run_goes_on_to_the_weights_of_an_unbroken_one(
    material: Path, unbroken: TrainReport, tmp_path: Path
) -> None:
    arguments = [str(HERE / "killed_run.py"), str(material / "pairs/pairs.jsonl"), str(material / "clip.safetensors")]
    killed = subprocess.run(
        [sys.executable, *arguments, str(tmp_path / "run"), str(torch.get_num_threads())],
        env=os.environ | {"PYTHONPATH": program_path()},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -9, killed.stderr
    folder = tmp_path / "run"
    assert [one.name for one in (folder / FOLDER).glob("*.pt")] == ["step-00000007.pt"]
    assert list((folder / FOLDER).glob("*.tmp"))  # the half of the second
    assert max(read_metrics(folder)["long_i2t_r1"][0]) == 10  # figures that will come again

    report = run(material, folder, resume=True, workers=1)
    assert report.steps == 24 and report.figures == unbroken.figures
    assert_same_weights(folder, unbroken.folder)
    lines = (folder / METRICS_FILE).read_text().splitlines()
    keys = [tuple(line.split(",")[:2]) for line in lines]
    assert len(keys) == len(set(keys))
    assert lines == (unbroken.folder / METRICS_FILE).read_text().splitlines()
    assert not list((folder / FOLDER).glob("*.tmp"))


def test_a_damaged_newest_checkpoint_is_passed_over(
    material: Path, unbroken: TrainReport, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(unbroken.folder, tmp_path / "run")
    (folder / WEIGHTS).unlink()
    newest = folder / FOLDER / "step-00000024.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with caplog.at_level(logging.WARNING, "longclip_rt"):
        run(material, folder, resume=True)
    assert "step-00000024.pt is damaged" in caplog.text
    assert_same_weights(folder, unbroken.folder)
    assert (folder / METRICS_FILE).read_text() == (unbroken.folder / METRICS_FILE).read_text()
    for path in (folder / FOLDER).glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(TrainingError, match=r"All 2 checkpoints .* are damaged. Remove .*run to begin anew"):
        run(material, folder, resume=True)


def test_a_finished_run_is_left_as_it_is(
    material: Path, unbroken: TrainReport, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(unbroken.folder, tmp_path / "run")
    kept = [WEIGHTS, "README.md", "curves.png", METRICS_FILE, "config.json"]
    (folder / "README.md").write_text("edited since")
    before = {name: (folder / name).read_bytes() for name in kept}
    report = run(material, folder, resume=True)
    assert {name: (folder / name).read_bytes() for name in kept} == before
    assert dataclasses.replace(report, folder=unbroken.folder, weights=unbroken.weights, seconds=0) == (
        dataclasses.replace(unbroken, seconds=0)
    )
    # Stopped between the last checkpoint and the results, it makes up for these.
    (folder / WEIGHTS).unlink()
    assert run(material, folder, resume=True).figures == unbroken.figures
    assert_same_weights(folder, unbroken.folder)


def test_a_folder_with_a_run_needs_resume_and_the_same_settings(material: Path, unbroken: TrainReport) -> None:
    with pytest.raises(TrainingError, match="Add --resume"):
        run(material, unbroken.folder)
    with pytest.raises(TrainingError, match=r"another lr \(0.001 there, 0.01 here\)"):
        run(material, unbroken.folder, resume=True, lr=1e-2)


def test_resume_begins_a_run_that_is_not_there(material: Path, unbroken: TrainReport, tmp_path: Path) -> None:
    run(material, tmp_path / "run", resume=True)
    assert_same_weights(tmp_path / "run", unbroken.folder)


def test_a_run_that_cannot_begin_leaves_its_folder_free(material: Path, tmp_path: Path) -> None:
    config = small_config(material / "pairs/pairs.jsonl", tmp_path / "absent.safetensors")
    with pytest.raises(WeightsError, match="absent"):
        train(config, tmp_path / "run", device="cpu", quiet=True)
    assert run(material, tmp_path / "run", steps=1).steps == 1


def test_the_threads_of_the_data_change_nothing(material: Path, unbroken: TrainReport, tmp_path: Path) -> None:
    run(material, tmp_path / "run", workers=2, chunk_size=None)
    assert_same_weights(tmp_path / "run", unbroken.folder)


def test_steps_may_end_within_an_epoch_or_after_many(material: Path, tmp_path: Path) -> None:
    assert run(material, tmp_path / "epochs", steps=None, epochs=2).steps == 18  # 72 rows, 8 a step
    assert run(material, tmp_path / "steps", steps=2).steps == 2


def test_chunks_checkpointing_and_bf16_train_too(material: Path, unbroken: TrainReport, tmp_path: Path) -> None:
    run(material, tmp_path / "exact", steps=10, warmup_steps=1, chunk_size=3, gradient_checkpointing=True)
    run(material, tmp_path / "plain", steps=10, warmup_steps=1)
    run(material, tmp_path / "bf16", steps=10, warmup_steps=1, precision="bf16")
    losses = {name: read_metrics(tmp_path / name)["loss"][1][0] for name in ("exact", "plain", "bf16")}
    assert losses["exact"] == pytest.approx(losses["plain"], abs=1e-3)
    assert losses["bf16"] == pytest.approx(losses["plain"], abs=0.2) and losses["bf16"] != losses["plain"]


def test_a_model_from_random_weights_on_scenes(tmp_path: Path) -> None:
    architecture = dataclasses.replace(SMALL, image_size=32, patch_size=16)
    config = small_config(
        "scenes:40@1?captions=prefix",
        Path("scratch"),
        architecture=architecture,
        positions="none",
        objective="clip",
        steps=2,
        logit_scale=2.0,
        max_logit_scale=1.5,
        clip_grad_norm=0.01,
        lr=0.1,
    )
    report = train(config, tmp_path / "run", device="cpu", quiet=True)
    weights = tensors(report.folder)
    assert len(weights["positional_embedding"]) == 77 and "positional_embedding_res" not in weights
    assert weights["logit_scale"] <= 1.5
    assert "a CLIP" in (report.folder / "README.md").read_text()


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_clipped_unscaled_and_together(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    norms = []

    def step(optimizer: torch.optim.Optimizer) -> None:
        gradients = [one.grad for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    if scaled:
        monkeypatch.setattr(loop, "precision_of", lambda *_: "fp16")
    run(material, tmp_path / "run", steps=10, clip_grad_norm=0.5)
    assert norms == pytest.approx([0.5] * len(norms), rel=1e-4) and norms
    assert read_metrics(tmp_path / "run")["grad_norm"][1][0] > 1  # as it was before


@pytest.mark.parametrize("val_rows", [0, 1])
def test_few_or_no_validation_rows(material: Path, tmp_path: Path, val_rows: int) -> None:
    report = run(material, tmp_path / "run", steps=2, val_rows=val_rows)
    assert list(report.figures) == (RECALLS if val_rows else [])
    assert (tmp_path / "run" / "README.md").exists()
    assert run(material, tmp_path / "run", steps=2, val_rows=val_rows, resume=True).figures == report.figures


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_run_on_a_gpu_goes_on_there_and_on_a_cpu(material: Path, tmp_path: Path, precision: str) -> None:
    data = write_patterns(tmp_path / "patterns", 18)
    settings: dict[str, Any] = {"lr": 3e-3, "logit_scale": 2.5, "precision": precision, "chunk_size": 3}
    config = small_config(data, material / "clip.safetensors", **settings)
    report = train(config, tmp_path / "run", device="cuda", quiet=True)
    assert all(torch.isfinite(tensor).all() for tensor in tensors(report.folder).values())
    losses = read_metrics(report.folder)["loss"][1]
    assert losses[-1] < losses[0] - 0.5
    for device in ("cuda", "cpu") if precision == "bf16" else ("cuda",):
        copy = shutil.copytree(report.folder, tmp_path / device / "run")
        (copy / FOLDER / "step-00000024.pt").unlink()
        assert train(config, copy, resume=True, device=device, quiet=True).steps == 24
