from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_case import small_config

from longclip_rt.errors import OutputError, TrainingError
from longclip_rt.train.config import TrainConfig
from longclip_rt.train.distributed import Processes
from longclip_rt.train.run.checkpoints import TrainState, save_checkpoint
from longclip_rt.train.run.folder import CONFIG, claim_folder, note_config, only_run

ALONE = Processes(0, 1, torch.device("cpu"))
CONFIGURATION = small_config("pairs.jsonl", Path("clip.safetensors"))


def begun(folder: Path, step: int | None = None, config: TrainConfig = CONFIGURATION, world: int = 1) -> Path:
    note_config(config, folder)
    if step is not None:
        save_checkpoint(folder, TrainState(step, config.to_dict(), {}, {}, {}, {}, 0.0, world), keep=1)
    return folder


def claim(folder: Path, *, resume: bool = True, **changes: object) -> TrainState | None:
    config = small_config("pairs.jsonl", Path("clip.safetensors"), **changes)
    return claim_folder(config, folder, resume, ALONE)


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "some/run"
    with only_run(folder):
        assert folder.is_dir()
        assert claim(folder, resume=False) is None and claim(folder) is None
        note_config(CONFIGURATION, folder)
    assert TrainConfig.from_dict(json.loads((folder / CONFIG).read_text())) == CONFIGURATION


def test_a_run_goes_on_only_when_it_is_asked_to(tmp_path: Path) -> None:
    begun(tmp_path, 7)
    with pytest.raises(TrainingError, match=r"holds a run\. Add --resume"):
        claim(tmp_path, resume=False)
    assert claim(tmp_path).step == 7  # type: ignore[union-attr]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    assert claim(begun(tmp_path)) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lr": 2e-3}, r"lr \(0.001 there, 0.002 here\)"),
        ({"seed": 1, "steps": None}, r"steps \(24 there, None here\), seed \(0 there, 1 here\)"),
        ({"objective": "long"}, "objective"),
        ({"batch_size": 16}, "batch_size"),
    ],
)
def test_another_configuration_is_refused(tmp_path: Path, changes: dict[str, object], told: str) -> None:
    with pytest.raises(TrainingError, match=f"another {told}"):
        claim(begun(tmp_path, 7), **changes)


def test_what_changes_nothing_learnt_may_change(tmp_path: Path) -> None:
    free = {"workers": 3, "validate_every": 9, "checkpoint_every": 9, "keep_checkpoints": 9}
    ways_out_of_a_full_memory = {"chunk_size": 2, "gradient_checkpointing": True, "compile": True}
    assert claim(begun(tmp_path, 7), **free, **ways_out_of_a_full_memory).step == 7  # type: ignore[union-attr]


def test_settings_of_other_versions_are_those_by_default(tmp_path: Path) -> None:
    """What an older version did not know has its default; what a newer one knows is passed over."""
    begun(tmp_path, 7)
    fields = json.loads((tmp_path / CONFIG).read_text())
    del fields["pcm_scope"]
    (tmp_path / CONFIG).write_text(json.dumps(fields | {"of_tomorrow": 1}))
    assert claim(tmp_path).step == 7  # type: ignore[union-attr]
    with pytest.raises(TrainingError, match="pcm_scope"):
        claim(tmp_path, pcm_scope="global")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"data": "x", "steps": "many"}'])
def test_a_broken_configuration_is_a_sentence(tmp_path: Path, content: str) -> None:
    begun(tmp_path, 7)
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(TrainingError, match=r"config.json cannot be read"):
        claim(tmp_path)


@pytest.mark.parametrize("resume", [False, True])
def test_what_is_not_a_run_s_is_not_written_over(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "notes.txt").touch()
    assert claim(tmp_path, resume=resume) is None
    (tmp_path / "README.md").write_text("precious")
    with pytest.raises(TrainingError, match=r"holds README.md, but no config.json.*Choose another --out"):
        claim(tmp_path, resume=resume)


def test_processes_that_see_other_folders_are_refused(tmp_path: Path) -> None:
    class Two(Processes):
        def collect(self, value: object) -> list[object]:  # type: ignore[override]
            return [value, None]

    begun(tmp_path, 7)
    with pytest.raises(TrainingError, match=r"steps \[7, None\].*share its folder"):
        claim_folder(CONFIGURATION, tmp_path, True, Two(0, 2, torch.device("cpu")))


def test_another_number_of_processes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "longclip_rt"):
        claim(begun(tmp_path, 7, world=8))
    assert "the run had 8 processes before and has 1 now" in caplog.text


def test_a_second_run_is_kept_out_until_the_first_is_gone(tmp_path: Path) -> None:
    script = (
        "import fcntl, sys, time\n"
        f"lock = open({str(tmp_path / '.lock')!r}, 'a')\n"
        "fcntl.lockf(lock, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(TrainingError, match="Another run is training in"), only_run(tmp_path):
            pass
        other.kill()
        other.wait()
        with only_run(tmp_path):
            pass


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), only_run(tmp_path / "file"):
        pass
