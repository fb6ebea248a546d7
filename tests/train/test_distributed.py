from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from data_case import write_pairs
from torch import Tensor
from torch.nn import functional as F
from train_case import batch_of, clip_weights, program_path, small_config, small_model
from two_processes import CASES

from longclip_rt.errors import TrainingError
from longclip_rt.train.distributed import Processes, processes
from longclip_rt.train.loop import train
from longclip_rt.train.loss import Objective, branch_losses
from longclip_rt.train.run.checkpoints import load_newest_checkpoint
from longclip_rt.train.run.report import read_metrics
from longclip_rt.train.step import backward
from longclip_rt.weights.checkpoint import load_checkpoint

HERE = Path(__file__).parent
ALONE = Processes(0, 1, torch.device("cpu"))
BAD = {f"row_{number}": {"image": "images/absent.png"} for number in (11, 14, 20, 31, 37, 52)}


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind."""
    folder = tmp_path_factory.mktemp("two")
    write_pairs(folder / "pairs", 60, **BAD)
    clip_weights(folder / "clip.safetensors")
    arguments = [sys.executable, str(HERE / "two_processes.py"), str(folder), *free_ports(3)]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": program_path()}
    running = [
        subprocess.Popen(arguments, env=shared | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        said = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"found-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The run of one process on the same pairs."""
    torch.set_num_threads(1)
    config = small_config(folder / "pairs/pairs.jsonl", folder / "clip.safetensors", pcm_scope="global", max_bad=0.5)
    train(config, folder / "alone", device="cpu", quiet=True)
    return folder / "alone"


def test_every_process_knows_its_place(found: list[dict[str, Any]]) -> None:
    assert found[0]["place"] == (0, 2, True, "cpu") and found[1]["place"] == (1, 2, False, "cpu")
    assert found[0]["collected"] == found[1]["collected"] == ["from 0", "from 1"]


def assert_gradients(found: list[dict[str, Any]], name: str, expected: dict[str, Tensor], losses: list[Tensor]) -> None:
    assert all(torch.equal(one, found[1][name][0][key]) for key, one in found[0][name][0].items())
    gradients, *reported = found[0][name]
    torch.testing.assert_close(reported, losses, atol=1e-5, rtol=0)
    assert gradients.keys() == expected.keys()
    for key, one in expected.items():
        largest = one.abs().max().item()
        torch.testing.assert_close(gradients[key], one, atol=2e-5 * largest, rtol=1e-4, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", ["global", "global, chunks", "short half"])
def test_two_processes_have_the_gradients_of_one(found: list[dict[str, Any]], name: str) -> None:
    objective, lengths, _ = CASES[name]
    model = small_model("kps")
    losses = backward(model, batch_of(lengths), objective, ALONE)
    expected = {key: one.grad for key, one in model.named_parameters() if one.grad is not None}
    assert_gradients(found, name, expected, [losses.long, losses.short])


def test_local_pcm_looks_at_each_process_s_own_rows(found: list[dict[str, Any]]) -> None:
    objective, lengths, _ = CASES["local"]
    batch = batch_of(lengths)
    model = small_model("kps")
    image, long, short = (
        F.normalize(one.double(), dim=1)
        for one in (
            model.encode_image(batch.pixels),
            model.encode_text(batch.long_ids),
            model.encode_text(batch.short_ids),
        )
    )
    rebuilt = []
    for rows in image.chunk(2):
        centred = rows - rows.mean(0)
        kept = torch.linalg.svd(centred, full_matrices=False)[2][: objective.components]
        rebuilt.append(centred @ kept.T @ kept + rows.mean(0))
    losses = []
    for left, right in ((image, long), (torch.cat(rebuilt), short)):
        logits = model.logit_scale.double().exp() * left @ right.T
        truth = torch.arange(len(logits))
        sides = [F.cross_entropy(one, truth, label_smoothing=0.1) for one in (logits, logits.T)]
        losses.append(sum(sides) / 2)
    torch.stack(losses).sum().backward()
    expected = {key: one.grad for key, one in model.named_parameters() if one.grad is not None}
    assert_gradients(found, "local", expected, [one.detach().float() for one in losses])
    assert abs(found[0]["local"][2] - found[0]["global"][2]) > 1e-3


def test_a_run_of_two_processes_is_that_of_one(folder: Path, alone: Path) -> None:
    two, one = read_metrics(folder / "run"), read_metrics(alone)
    assert two.keys() == one.keys()
    for name, (steps, values) in one.items():
        assert two[name][0] == steps
        assert two[name][1] == pytest.approx(values, rel=2e-3, abs=1e-4), name
    weights = [load_checkpoint(run / "model.safetensors").state_dict for run in (folder / "run", alone)]
    for name in ("visual.proj", "text_projection", "positional_embedding", "token_embedding.weight"):
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=2e-4, rtol=0, msg=name)
    assert load_newest_checkpoint(folder / "run").world == 2  # type: ignore[union-attr]


def test_bad_rows_of_all_processes_are_listed(folder: Path, alone: Path) -> None:
    listed = []
    for run in (folder / "run", alone):
        lines = (run / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
        listed.append({json.loads(line)["id"] for line in lines})
    assert listed[0] == listed[1] and len(listed[0]) == len(BAD)


def test_one_process_reports_and_a_finished_run_is_left_alone(found: list[dict[str, Any]]) -> None:
    first, second = found
    assert first["report"]["main"] and not second["report"]["main"]
    assert first["report"]["steps"] == second["report"]["steps"] == 24
    assert first["report"]["bad_rows"] == len(BAD)
    assert first["report"]["figures"] and second["report"]["figures"] == {}
    assert first["report again"]["figures"] == first["report"]["figures"]
    assert second["report again"]["figures"] == {}


def test_one_process_needs_no_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with processes("cpu") as procs:
        assert procs == ALONE and procs.main
        rows = torch.ones(2, 3)
        assert procs.gather(rows) is rows and procs.collect(7) == [7]
        procs.wait()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["tpu", "mps", "cuda:x", "CPU", ""])
def test_a_device_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(TrainingError, match="name auto, cpu, cuda or cuda:N"), processes(name):
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(TrainingError, match=r"cuda:2 cannot be had: PyTorch sees 2 CUDA devices"), processes("auto"):
        pass
    with pytest.raises(TrainingError, match=r"3 processes cannot share cuda:0; give"), processes("cuda:0"):
        pass


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match=r"sees 0 CUDA devices\. Choose --device cpu"), processes("cuda"):
        pass


def test_others_that_cannot_be_found_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(TrainingError, match=r"one of 2 processes .WORLD_SIZE.*torchrun"), processes("cpu"):
        pass


def test_losses_of_one_process_need_no_gather() -> None:
    objective, lengths, _ = CASES["global"]
    batch, model = batch_of(lengths), small_model("kps")
    with torch.no_grad():
        features = (
            model.encode_image(batch.pixels),
            model.encode_text(batch.long_ids),
            model.encode_text(batch.short_ids),
        )
        here = branch_losses(objective, *features, model.logit_scale, ALONE.gather)
        local = branch_losses(Objective("longclip", 4), *features, model.logit_scale)
    torch.testing.assert_close(here, local)
