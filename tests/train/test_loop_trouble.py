from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_case import write_pairs
from train_case import (
    assert_same_weights,
    clip_weights,
    run,
    tensors,
)

import longclip_rt.train.loop as loop
from longclip_rt.errors import OutputError, TrainingError
from longclip_rt.train.run.checkpoints import FOLDER, load_newest_checkpoint
from longclip_rt.train.run.report import read_metrics
from longclip_rt.train.run.results import BAD_ROWS, WEIGHTS
from longclip_rt.weights.checkpoint import load_checkpoint


def breaking(monkeypatch: pytest.MonkeyPatch, is_broken: Callable[[int], bool], value: float = math.nan) -> None:
    """Lets the gradients of some steps (counted from 1) be no finite numbers."""
    count = 0

    def backward(model: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        losses = loop_backward(model, *arguments, **options)
        if is_broken(count):
            model.logit_scale.grad.fill_(value)
        return losses

    loop_backward = loop.backward
    monkeypatch.setattr(loop, "backward", backward)


def test_steps_with_gradients_that_are_not_finite_are_left_out_and_counted(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    breaking(monkeypatch, lambda step: step in (4, 6))
    with caplog.at_level(logging.WARNING, "longclip_rt"):
        run(material, tmp_path / "run", steps=10)
    assert all(torch.isfinite(tensor).all() for tensor in tensors(tmp_path / "run").values())
    assert read_metrics(tmp_path / "run")["skipped_steps"][1] == [2]
    assert "step 4: the gradients are not finite" in caplog.text
    assert "2 steps were left out" in caplog.text


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_is_left_out_changes_no_weight(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    if scaled:  # as on a GPU; a CPU computes in fp16 too, slowly
        monkeypatch.setattr(loop, "precision_of", lambda *_: "fp16")
    breaking(monkeypatch, lambda step: True)
    run(material, tmp_path / "run", steps=2)
    state = load_newest_checkpoint(tmp_path / "run")
    start = load_checkpoint(material / "clip.safetensors", context_length=None).state_dict
    assert state is not None and state.optimizer["state"] == {}
    assert all(torch.equal(state.weights[name], start[name]) for name in start.keys() - {"positional_embedding"})


def test_a_run_that_has_diverged_stops_with_a_sentence(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, lambda step: step > 3)
    with pytest.raises(TrainingError, match=r"gradients of 20 steps in a row, up to step 23, .*--clip-grad-norm"):
        run(material, tmp_path / "run")


def test_the_loss_scale_of_fp16_falls_and_is_kept(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a scale of 65536 the gradients of this model overflow at first."""

    def one_checkpoint_back(folder: Path, name: str) -> Path:
        copy = shutil.copytree(folder, tmp_path / name)
        (copy / FOLDER / "step-00000010.pt").unlink()
        (copy / WEIGHTS).unlink()
        return copy

    monkeypatch.setattr(loop, "precision_of", lambda *_: "fp16")
    whole = run(material, tmp_path / "fp16", steps=10).folder
    state = load_newest_checkpoint(whole)
    (skipped,) = read_metrics(whole)["skipped_steps"][1]
    assert state is not None and 1 <= skipped < 7
    assert state.scaler["scale"] == 65536 / 2**skipped
    resumed = run(material, one_checkpoint_back(whole, "resumed"), steps=10, resume=True).folder
    assert_same_weights(resumed, whole)
    assert load_newest_checkpoint(resumed).scaler == state.scaler  # type: ignore[union-attr]

    # A run may change between a GPU, where `auto` is fp16, and a CPU, where there is no scaler.
    monkeypatch.setattr(loop, "precision_of", lambda *_: "fp32")
    without = run(material, one_checkpoint_back(whole, "fp32"), steps=10, resume=True).folder
    assert load_newest_checkpoint(without).scaler == {}  # type: ignore[union-attr]
    plain = run(material, tmp_path / "plain", steps=10).folder
    monkeypatch.setattr(loop, "precision_of", lambda *_: "fp16")
    begun = run(material, one_checkpoint_back(plain, "again fp16"), steps=10, resume=True).folder
    assert load_newest_checkpoint(begun).scaler["scale"] <= 65536  # type: ignore[union-attr]


def test_pcm_without_effect_is_said_with_the_way_out(
    material: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "longclip_rt"):
        run(material, tmp_path / "small", steps=4, components=32)
    assert "PCM changes nothing here: 8 rows of 48 values have no more than 32" in caplog.text
    assert "--batch-size with --chunk-size" in caplog.text and "--pcm-scope global" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "longclip_rt"):
        run(material, tmp_path / "large", steps=4, components=32, objective="long+short")
        run(material, tmp_path / "other", steps=4, components=6)
    assert "PCM" not in caplog.text


def test_a_warm_up_that_never_ends_is_said(material: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "longclip_rt"):
        run(material, tmp_path / "run", steps=2, warmup_steps=200)
    assert "the warm-up takes all of the 2 steps" in caplog.text


def test_bad_rows_are_listed_and_outlive_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path / "pairs", 80, **{f"row_{one}": {"image": "absent.png"} for one in (9, 30, 31, 70)})
    clip_weights(tmp_path / "clip.safetensors")
    report = run(tmp_path, tmp_path / "run", max_bad=0.3)
    listed = (tmp_path / "run" / BAD_ROWS).read_text(encoding="utf-8")
    assert report.bad_rows == 4 and len(listed.splitlines()) == 4
    # A run that is stopped after its last epoch's bad rows were met still knows of them.
    folder = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (folder / WEIGHTS).unlink()
    (folder / FOLDER / "step-00000024.pt").unlink()
    assert run(tmp_path, folder, resume=True, max_bad=0.3).bad_rows == 4
    assert_same_weights(folder, tmp_path / "run")


def test_an_epoch_of_too_many_bad_rows_stops_at_its_end_too(tmp_path: Path) -> None:
    """Too few rows to say so before, and the epoch's end is the run's."""
    write_pairs(tmp_path / "pairs", 80, **{f"row_{one}": {"image": "absent.png"} for one in range(20, 32)})
    clip_weights(tmp_path / "clip.safetensors")
    with pytest.raises(TrainingError, match=r"rows of this epoch cannot be used"):
        run(tmp_path, tmp_path / "run", steps=None, epochs=1)
    assert not (tmp_path / "run" / WEIGHTS).exists()


def test_a_full_gpu_is_a_sentence(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loop, "backward", backward)
    with pytest.raises(TrainingError, match=r"activations of 8 pairs. Lower --chunk-size"):
        run(material, tmp_path / "run")


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_made(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    from longclip_rt.train.distributed import Processes

    monkeypatch.setattr(loop, "processes", lambda _: nullcontext(Processes(0, 3, torch.device("cpu"))))
    with pytest.raises(TrainingError, match="A batch of 8 cannot be shared by 3 processes; choose a multiple"):
        run(material, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_refuses_is_a_sentence(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"step-00000002.pt.*No space left on device. Make room"):
        run(material, tmp_path / "run", steps=2)
    monkeypatch.undo()
    assert run(material, tmp_path / "run", steps=2, resume=True).steps == 2


@pytest.mark.parametrize(("lr", "steps"), [(1e30, 10), (1e30, 1), (1e5, 24)])
def test_weights_of_a_run_that_diverged_are_not_written(lr: float, steps: int, material: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"diverged: after step .* not saved\. Begin anew .*--lr"):
        run(material, tmp_path / "run", lr=lr, warmup_steps=0, steps=steps, val_rows=0)
    assert not (tmp_path / "run" / WEIGHTS).exists()
    # Nor does going on write them: there is no checkpoint with such weights.
    with pytest.raises(TrainingError, match="diverged"):
        run(material, tmp_path / "run", lr=lr, warmup_steps=0, steps=steps, val_rows=0, resume=True)


def test_a_run_of_which_most_steps_are_left_out_fails(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, lambda step: step % 10 > 2)
    with pytest.raises(TrainingError, match=r"gradients of 20 of 28 steps, up to step 28, are not finite"):
        run(material, tmp_path / "run", steps=40)
    assert not (tmp_path / "run" / WEIGHTS).exists()


def test_a_disk_that_is_full_at_a_checkpoint_is_a_sentence_and_the_run_goes_on(material: Path, tmp_path: Path) -> None:
    whole = run(material, tmp_path / "whole").folder
    folder = tmp_path / "run" / FOLDER
    folder.mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text((whole / "config.json").read_text())
    (folder / "step-00000007.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"step-00000007\.pt' cannot be written: No space left .*with --resume"):
        run(material, tmp_path / "run", resume=True)
    assert_same_weights(run(material, tmp_path / "run", resume=True).folder, whole)
