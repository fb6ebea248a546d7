from __future__ import annotations

import argparse
import json
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longclip_rt.errors import WeightsError
from longclip_rt.system.files import sha256_of_file
from longclip_rt.weights.files import choose_weights, read_weights, split_parts, tensors_of

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2.0, dtype=torch.float16)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor] = TENSORS) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0)


def test_torch_archives_are_read_whatever_their_name(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "weights.safetensors")
    raw = read_weights(tmp_path / "weights.safetensors")
    assert_same(raw.content)
    assert raw.sha256 == sha256_of_file(tmp_path / "weights.safetensors")


def test_archives_of_old_versions_of_torch_are_read(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(read_weights(tmp_path / "old.pt").content)


def test_safetensors_are_read_with_what_they_say_of_themselves(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "weights.pt", metadata={"format": "pt", "note": "hello"})
    raw = read_weights(tmp_path / "weights.pt")
    assert_same(raw.content)
    assert raw.metadata["note"] == "hello"


def test_tensors_outlive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(TENSORS, path)
    raw = read_weights(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_same(raw.content)


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("it-ran",)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_holds_code_is_refused_by_the_name_it_calls_for(
    new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": TENSORS, "payload": Malice()}, "bad.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(WeightsError, match=r"bad\.pt holds code: its pickle calls for \w+\.mkdir, and .*refused"):
        read_weights(Path("bad.pt"))
    assert not Path("it-ran").exists()


def test_an_objects_class_is_named(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "args": argparse.Namespace(lr=1)}, tmp_path / "train.pt")
    with pytest.raises(WeightsError, match=r"calls for argparse\.Namespace.*model\.state_dict\(\)"):
        read_weights(tmp_path / "train.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_torchscript_is_refused_with_the_way_to_openais_weights(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "ViT-B-16.pt"))
    with pytest.raises(WeightsError, match=r"TorchScript archive.*open_clip:ViT-B-16/openai"):
        read_weights(tmp_path / "ViT-B-16.pt")


def test_another_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("photos/one.jpg", b"x")
    with pytest.raises(WeightsError, match=r"zip archive of something else \(it holds photos/one.jpg\)"):
        read_weights(tmp_path / "photos.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>sign in</html>", "web page"),
        (b"\n<html>", "web page"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (
            b"\x89PNG\r\n\x1a\n" + b"\0" * 64,
            r"neither a torch archive nor a safetensors file: it begins with b'.x89PNG",
        ),
        (b"\x80\x02garbage", "damaged"),
        (b"PK\x03\x04" + b"\0" * 100, "cut short"),
        (b"\x40\0\0\0\0\0\0\0{" + b" " * 20, "no readable safetensors.*damaged or cut short"),
        (b"\xff" * 7 + b"\x7f{", "no readable safetensors"),
    ],
)
def test_files_that_are_no_weights_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_weights(path)


@pytest.mark.parametrize("kept", [0.2, 0.7, 0.99])
@pytest.mark.parametrize("kind", ["zip", "pickle", "safetensors"])
def test_files_cut_short_are_refused(kind: str, kept: float, tmp_path: Path) -> None:
    path, tensors = tmp_path / "weights", {"a": torch.randn(64, 64)}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(WeightsError, match=r"cut short|damaged"):
        read_weights(path)


def test_safetensors_are_known_whatever_the_length_of_their_header(tmp_path: Path) -> None:
    path, first_bytes = tmp_path / "weights.safetensors", set()
    for padding in range(0, 256, 8):
        save_file(TENSORS, path, metadata={"note": "x" * padding})
        first_bytes.add(path.read_bytes()[0])
        assert read_weights(path).content.keys() == TENSORS.keys()
    assert 0x80 in first_bytes  # as a pickle begins


def test_an_unreadable_path_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"Cannot read .*No such file"):
        read_weights(tmp_path / "absent.pt")


def split(folder: Path) -> Path:
    save_file({"a.weight": TENSORS["a.weight"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "model-00002-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    names = {"a.weight": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"metadata": {"total_size": 26}, "weight_map": names}))
    return index


def test_split_weights_are_joined(tmp_path: Path) -> None:
    raw = read_weights(split(tmp_path))
    assert_same(raw.content)
    assert raw.sha256 is None


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    index = split(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00002\.safetensors, which is missing"):
        read_weights(index)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../../secret"}}'])
def test_an_index_that_is_none_or_leads_elsewhere_is_refused(content: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(WeightsError, match=r"index|is not a file beside it"):
        split_parts(index)


@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        OrderedDict(TENSORS),
        {"state_dict": TENSORS, "epoch": 3, "optimizer": {"state": {}}},
        {"model": {"state_dict": TENSORS}},
        {"model_state_dict": {f"module.{name}": tensor for name, tensor in TENSORS.items()}},
        {f"_orig_mod.module.{name}": tensor for name, tensor in TENSORS.items()},
        {f"model.clip.{name}": tensor for name, tensor in TENSORS.items()},
        TENSORS | {"epoch": 3},
    ],
)
def test_wrappers_and_prefixes_are_taken_off(content: Any) -> None:
    assert_same(tensors_of(content, "weights.pt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({}, "an empty dictionary"),
        (torch.ones(3), "holds a Tensor"),
        ({1: torch.ones(3)}, "holds a dict"),
        ({"epoch": 3, "name": "x"}, "no tensors under the names epoch, name"),
    ],
)
def test_content_without_named_tensors_is_refused(content: Any, message: str) -> None:
    with pytest.raises(WeightsError, match=rf"weights\.pt .*{message}"):
        tensors_of(content, "weights.pt")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["README.md", "longclip-B.pt"], "longclip-B.pt"),
        (["pytorch_model.bin", "model.safetensors", "extra.safetensors"], "model.safetensors"),
        (["open_clip_model.safetensors", "model.safetensors"], "open_clip_model.safetensors"),
        (["weights.pt", "weights.safetensors"], "weights.safetensors"),
        (["a/weights.pt", "top.pt"], "top.pt"),
        (["checkpoints/weights.pt", "config.json"], "checkpoints/weights.pt"),
        (["pytorch_model.bin", "training_args.bin", "optimizer.pt"], "pytorch_model.bin"),
        (["last.pth", "scheduler.pt", "rng_state.pth"], "last.pth"),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
            "model.safetensors.index.json",
        ),
    ],
)
def test_the_weights_among_other_files_are_chosen(names: list[str], chosen: str) -> None:
    assert choose_weights(names, "owner/name") == chosen
    assert choose_weights(list(reversed(names)), "owner/name") == chosen


def test_several_candidates_are_all_named_as_they_can_be_passed() -> None:
    with pytest.raises(WeightsError, match=r"name one of them: owner/name/a\.pt, owner/name/b\.pt"):
        choose_weights(["b.pt", "a.pt", "README.md"], "owner/name/")


def test_a_folder_without_weights_is_refused() -> None:
    with pytest.raises(WeightsError, match="holds no file of weights"):
        choose_weights(["README.md", "config.json"], "owner/name")
