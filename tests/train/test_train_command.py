from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from data_case import write_pairs
from train_case import clip_weights

import longclip_rt.commands.train as command
import longclip_rt.train.config as config
import longclip_rt.train.loop as loop
from longclip_rt.cli import main
from longclip_rt.train.loop import TrainReport


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    write_pairs(folder / "pairs", 40)
    clip_weights(folder / "clip.safetensors")
    return folder


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def arguments(material: Path, out: Path, *more: str) -> list[str]:
    data = ["--data", str(material / "pairs/pairs.jsonl"), "--weights", str(material / "clip.safetensors")]
    return ["train", *data, "--out", str(out), "--device", "cpu", "--precision", "fp32", "--workers", "0", *more]


def call(*given: str) -> int:
    """The command's exit status; messages go to stderr, as in a program of its own."""
    root = logging.getLogger()
    kept, root.handlers = root.handlers, []
    try:
        main(given)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        root.handlers = kept
    return 0


def test_help_shows_one_gpu_eight_gpus_and_a_cpu() -> None:
    text = CliRunner().invoke(command.train, ["--help"], terminal_width=100).output
    examples = text.partition("Examples:")[2].replace("\\\n", "").splitlines()
    one, eight, cpu = (next(line for line in examples if end in line) for end in ("# one GPU", "# 8 GPUs", "# a CPU"))
    assert "longclip-rt train" in one and "--chunk-size" in one
    assert "torchrun --nproc-per-node 8 -m longclip_rt train" in eight
    assert "longclip-rt train" in cpu and "--device cpu" in cpu
    assert any("--resume" in line for line in examples)


def test_the_weights_path_is_all_of_stdout(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    given = arguments(material, out, "--steps", "2", "--batch-size", "4", "--components", "2", "--warmup-steps", "1")
    assert call(*given) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out / 'model.safetensors'}\n"
    assert "36 pairs, 2 steps of 4, fp32 on cpu" in captured.err
    assert re.search(r"2 steps in \d+\.\d minutes; validation: long_i2t_r1 .*%", captured.err)
    assert "Traceback" not in captured.err
    assert json.loads((out / "config.json").read_text())["warmup_steps"] == 1
    # The same again: not without being asked, and then all is done.
    assert call(*given) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("Error: ") and "Add --resume" in captured.err
    assert call(*given, "--resume") == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out / 'model.safetensors'}\n" and "all 2 steps of this run are done" in captured.err
    assert call(*given, "--resume", "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_options_reach_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[config.TrainConfig, Path, dict[str, Any]]] = []

    def train(given: config.TrainConfig, folder: Path, **options: Any) -> TrainReport:
        calls.append((given, folder, options))
        return TrainReport(folder, folder / "w", 1, 1.0, {}, 0)

    monkeypatch.setattr(loop, "train", train)
    values: dict[str, Any] = {
        "val": "val.jsonl", "val_rows": 0, "images": "photos", "image_column": "a", "long_column": "b",
        "short_column": "c", "max_bad": 0.5, "objective": "long", "positions": "interpolate", "frozen": "text",
        "components": 3, "pcm_scope": "global", "label_smoothing": 0.0, "logit_scale": 1.5, "max_logit_scale": 4.0,
        "batch_size": 12, "chunk_size": 6, "epochs": 2, "steps": 9, "lr": 0.5, "weight_decay": 0.0, "warmup_steps": 0,
        "clip_grad_norm": 2.0, "precision": "bf16", "seed": 7, "workers": 0, "validate_every": 3,
        "checkpoint_every": 4, "keep_checkpoints": 5, "weights": "w.pt", "gradient_checkpointing": True,
        "compile": True,
    }  # fmt: skip
    flags = {"gradient_checkpointing", "compile"}
    options = [
        part
        for name, value in values.items()
        for part in (f"--{name.replace('_', '-')}", *([] if name in flags else [str(value)]))
    ]
    assert call("train", "--data", "pairs.jsonl", "--out", str(tmp_path), "--resume", "--device", "cuda", *options) == 0
    assert call("train", "--data", "pairs.jsonl", "--out", str(tmp_path), "--preset", "longclip-l") == 0
    (first, folder, given), (second, *_) = calls
    assert {name: getattr(first, name) for name in values} == values and folder == tmp_path
    assert given == {"resume": True, "device": "cuda", "quiet": False}
    assert second == config.preset_config("longclip-l", "pairs.jsonl")
    # Every setting but the architecture, which comes with a preset, has an option.
    assert set(config.TrainConfig.__dataclass_fields__) - values.keys() == {"data", "architecture"}


def test_errors_are_one_sentence(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = ["train", "--data", "absent.jsonl", "--weights", str(material / "clip.safetensors")]
    too_large = arguments(material, tmp_path / "b", "--batch-size", "400")
    for given, told in (
        ([*absent, "--out", str(tmp_path / "a"), "--device", "cpu"], "'absent.jsonl' does not exist"),
        (too_large, "too few for one batch of 400"),
        (arguments(material, tmp_path / "c", "--precision", "fp16"), "fp16 needs a GPU"),
        (arguments(material, tmp_path / "d", "--weights", "absent.pt"), "absent.pt"),
        (arguments(material, tmp_path / "e", "--device", "tpu"), "no device 'tpu'"),
        (arguments(material, tmp_path / "f", "--weights", "scratch"), "need an architecture: choose --preset tiny"),
    ):
        assert call(*given) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("Error: ") and told in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "given",
    [
        ["--lr", "0"],
        ["--batch-size", "0"],
        ["--objective", "magic"],
        ["--label-smoothing", "1"],
        ["--max-bad", "2"],
        ["--preset", "huge"],
    ],
)
def test_usage_errors_have_status_two(tmp_path: Path, given: list[str]) -> None:
    assert call("train", "--data", "pairs.jsonl", "--out", str(tmp_path), *given) == 2
    assert call("train", "--data", "pairs.jsonl") == 2


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*_: Any, **__: Any) -> TrainReport:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", train)
    assert call("train", "--data", "pairs.jsonl", "--out", str(tmp_path)) == 130
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "Stopped. Add --resume to the same command to go on.\n"


def test_other_processes_print_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = TrainReport(tmp_path, tmp_path / "w", 1, 1.0, {}, 0, main=False)
    monkeypatch.setattr(loop, "train", lambda *_, **__: report)
    assert call("train", "--data", "pairs.jsonl", "--out", str(tmp_path)) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize("module", ["matplotlib", "open_clip"])
def test_a_missing_extra_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert call("train", "--data", "pairs.jsonl", "--out", str(tmp_path / "run")) == 1
    assert 'pip install "longclip-rt[train]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
