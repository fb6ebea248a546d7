from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import longclip_rt.train.run.checkpoints as checkpoints
from longclip_rt.errors import OutputError, TrainingError
from longclip_rt.train.run.checkpoints import FOLDER, TrainState, load_newest_checkpoint, save_checkpoint


def state(step: int, **changes: Any) -> TrainState:
    parameter = torch.nn.Parameter(torch.full((3, 2), float(step)))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.ones(3, 2)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0).state_dict()
    given: dict[str, Any] = {
        "step": step,
        "config": {"data": "pairs.jsonl", "architecture": {"image_size": 8}, "steps": None},
        "weights": {"a": parameter.detach()},
        "optimizer": optimizer.state_dict(),
        "scaler": scaler,
        "random": {"cpu": torch.get_rng_state()},
        "seconds": 12.5,
        "world": 2,
    }
    return TrainState(**(given | changes))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / FOLDER).iterdir())


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


def test_a_checkpoint_gives_back_all_of_the_state(tmp_path: Path) -> None:
    saved = state(7)
    path = save_checkpoint(tmp_path, saved, keep=1)
    assert path == tmp_path / "checkpoints/step-00000007.pt"
    found = load_newest_checkpoint(tmp_path)
    assert found is not None
    for name in TrainState.__dataclass_fields__:
        assert_equal(getattr(found, name), getattr(saved, name))
    assert found.optimizer["state"][0]["exp_avg"].any()


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path) is None
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "step-latest.pt").touch()
    assert load_newest_checkpoint(tmp_path) is None


def test_the_newest_are_kept_by_their_number(tmp_path: Path) -> None:
    for step in (9, 10, 99, 100):
        save_checkpoint(tmp_path, state(step), keep=2)
    assert names(tmp_path) == ["step-00000099.json", "step-00000099.pt", "step-00000100.json", "step-00000100.pt"]
    assert load_newest_checkpoint(tmp_path).step == 100  # type: ignore[union-attr]


def damage_by_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_by_cutting(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_the_hash(path: Path) -> None:
    path.with_suffix(".json").write_text("{")


def remove_the_hash(path: Path) -> None:
    path.with_suffix(".json").unlink()


DAMAGES = [damage_by_a_bit, damage_by_cutting, damage_the_hash, remove_the_hash]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 10):
        save_checkpoint(tmp_path, state(step), keep=3)
    damage(tmp_path / FOLDER / "step-00000010.pt")
    with caplog.at_level(logging.WARNING, "longclip_rt"):
        found = load_newest_checkpoint(tmp_path)
    assert found is not None and found.step == 5
    assert "step-00000010.pt" in caplog.text and len(caplog.records) == 1
    damage(tmp_path / FOLDER / "step-00000005.pt")
    with pytest.raises(TrainingError, match=r"All 2 checkpoints in .* are damaged"):
        load_newest_checkpoint(tmp_path)


def test_damaged_ones_and_rests_of_killed_runs_go_when_the_run_passes(tmp_path: Path) -> None:
    """Else they would be taken for the newest ones that are kept."""
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, state(step), keep=9)
    damage_by_a_bit(tmp_path / FOLDER / "step-00000015.pt")
    (tmp_path / FOLDER / "step-00000020.pt.tmp").write_bytes(b"half")
    (tmp_path / FOLDER / "step-00000020.json.tmp").write_bytes(b"half")
    save_checkpoint(tmp_path, state(12), keep=2)
    assert names(tmp_path) == ["step-00000010.json", "step-00000010.pt", "step-00000012.json", "step-00000012.pt"]


def test_a_failing_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, state(5), keep=1)

    def full(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match="No space left on device"):
        save_checkpoint(tmp_path, state(10), keep=1)
    assert names(tmp_path) == ["step-00000005.json", "step-00000005.pt"]
    assert load_newest_checkpoint(tmp_path).step == 5  # type: ignore[union-attr]


def test_checkpoints_of_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = checkpoints._FIELDS
    older = [name for name in fields if name != "world"]
    monkeypatch.setattr(checkpoints, "_FIELDS", older)
    save_checkpoint(tmp_path, state(5), keep=1)
    monkeypatch.setattr(checkpoints, "_FIELDS", fields)
    assert load_newest_checkpoint(tmp_path).world == 1  # type: ignore[union-attr]
    monkeypatch.setattr(checkpoints, "_FIELDS", ("step",))
    save_checkpoint(tmp_path, state(6), keep=1)
    with pytest.raises(TrainingError, match="damaged"):
        load_newest_checkpoint(tmp_path)


def test_no_code_is_run_to_read_one(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    save_checkpoint(tmp_path, state(5, config={"trap": Trap()}), keep=1)
    with pytest.raises(TrainingError, match="damaged"):
        load_newest_checkpoint(tmp_path)
    assert not (tmp_path / "sprung").exists()
