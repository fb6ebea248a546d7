from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import TINY, long_clip_tensors, tiny_tensors
from torch import Tensor

from longclip_rt.errors import MissingExtraError, WeightsError
from longclip_rt.model.architecture import Architecture
from longclip_rt.model.positions import stretch_positions
from longclip_rt.system.files import sha256_of_file
from longclip_rt.weights.checkpoint import Checkpoint, checkpoint_from_tensors, load_checkpoint
from longclip_rt.weights.naming import huggingface_names

STRETCHED = "stretched 77 -> 248 positions (KPS)"
FOLDED = "folded two position tables: rows below 20 of the first, the others of the second"


def saved(tensors: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def assert_same(checkpoint: Checkpoint, expected: dict[str, Tensor]) -> None:
    assert list(checkpoint.state_dict) == list(checkpoint.architecture.shapes())
    assert checkpoint.state_dict.keys() == expected.keys()
    for name, tensor in expected.items():
        found = checkpoint.state_dict[name]
        assert found.dtype == torch.float32 and found.is_contiguous() and not found.requires_grad
        torch.testing.assert_close(found, tensor, rtol=0, atol=0)


def folded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a Long-CLIP state dict amounts to, written with the masks of the reference."""
    one, two = tensors["positional_embedding"], tensors["positional_embedding_res"]
    mask = (torch.arange(248) < 20)[:, None]
    table = one.float() * mask + two.float() * ~mask
    rest = {name: tensor for name, tensor in tensors.items() if name != "positional_embedding_res"}
    return rest | {"positional_embedding": table}


@pytest.mark.parametrize("name", ["longclip-T.pt", "longclip-T.pth", "longclip-T.bin", "longclip-T.safetensors"])
def test_long_clip_weights_are_folded(name: str, tmp_path: Path) -> None:
    tensors = long_clip_tensors()
    path = saved(tensors, tmp_path / name)
    checkpoint = load_checkpoint(path)
    assert_same(checkpoint, folded(tensors))
    assert checkpoint.architecture == TINY
    assert (checkpoint.source, checkpoint.sha256, checkpoint.trained) == (str(path), sha256_of_file(path), True)
    assert FOLDED in checkpoint.notes
    assert any("QuickGELU assumed" in note for note in checkpoint.notes)


def test_plain_clip_weights_are_stretched() -> None:
    tensors = tiny_tensors(context_length=77)
    checkpoint = checkpoint_from_tensors(tensors, "clip.pt")
    table = stretch_positions(tensors["positional_embedding"])
    assert_same(checkpoint, tensors | {"positional_embedding": table})
    assert STRETCHED in checkpoint.notes


def test_one_table_of_248_rows_is_left_alone() -> None:
    checkpoint = checkpoint_from_tensors(tiny_tensors(), "clip.pt")
    assert_same(checkpoint, tiny_tensors())
    assert STRETCHED not in checkpoint.notes and FOLDED not in checkpoint.notes


@pytest.mark.parametrize("rows", [77, 248])
@pytest.mark.parametrize("second", [False, True])
def test_hugging_face_names_work_with_either_length_and_with_a_second_table(rows: int, second: bool) -> None:
    tensors = tiny_tensors(context_length=rows)
    theirs = huggingface_names(tensors)
    table = tensors["positional_embedding"] if rows == 248 else stretch_positions(tensors["positional_embedding"])
    if second:
        res = torch.randn(248, 64)
        theirs["text_model.embeddings.position_embedding_res.weight"] = res
        table = torch.cat([table[:20], res[20:]])
    checkpoint = checkpoint_from_tensors(theirs, "hf")
    assert_same(checkpoint, tensors | {"positional_embedding": table})
    assert (FOLDED in checkpoint.notes) == second


def test_half_precision_is_converted_before_it_is_stretched() -> None:
    tensors = {name: tensor.half() for name, tensor in tiny_tensors(context_length=77).items()}
    checkpoint = checkpoint_from_tensors(tensors, "clip.pt")
    table = tensors["positional_embedding"].float()
    expected = {name: tensor.float() for name, tensor in tensors.items()}
    assert_same(checkpoint, expected | {"positional_embedding": stretch_positions(table)})
    assert "float16 converted to float32" in checkpoint.notes


def test_openais_own_extras_and_wrappers_are_seen_through(tmp_path: Path) -> None:
    tensors = long_clip_tensors()
    extras = {"input_resolution": torch.tensor(24), "context_length": torch.tensor(248), "vocab_size": torch.tensor(1)}
    wrapped = {"state_dict": {f"module.{name}": value for name, value in (tensors | extras).items()}, "epoch": 3}
    assert_same(load_checkpoint(saved(wrapped, tmp_path / "epoch_3.pt")), folded(tensors))


def huggingface_folder(folder: Path, activation: str | None = None, **tower: Any) -> Path:
    folder.mkdir(exist_ok=True)
    saved(huggingface_names(tiny_tensors()), folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    if activation:
        settings = {"hidden_act": activation} | tower
        (folder / "config.json").write_text(json.dumps({"text_config": settings, "vision_config": settings}))
    return folder


@pytest.mark.parametrize(("activation", "quick"), [("gelu", False), ("quick_gelu", True), (None, True)])
@pytest.mark.parametrize("inner", ["", "model.safetensors"])
def test_a_folder_or_the_file_in_it_is_read_with_its_config(
    inner: str, activation: str | None, quick: bool, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(huggingface_folder(tmp_path / "model", activation) / inner)
    assert_same(checkpoint, tiny_tensors())
    assert checkpoint.architecture.quick_gelu is quick
    assert any("assumed" in note for note in checkpoint.notes) == (activation is None)
    assert checkpoint.sha256 == sha256_of_file(tmp_path / "model" / "model.safetensors")


def test_the_activation_that_is_asked_for_wins_and_is_noted(tmp_path: Path) -> None:
    folder = huggingface_folder(tmp_path / "model", "gelu")
    checkpoint = load_checkpoint(folder, activation="quick_gelu")
    assert checkpoint.architecture.quick_gelu is True
    assert any("against the weights' configuration" in note for note in checkpoint.notes)
    plain = load_checkpoint(saved(tiny_tensors(), tmp_path / "plain.pt"), activation="gelu")
    assert plain.architecture.quick_gelu is False and plain.notes == ()


def test_a_cut_vocabulary_is_known_by_this_packages_header_alone(tmp_path: Path) -> None:
    tensors = tiny_tensors(vocab_size=8192)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 8192}, "vision_config": {}}))
    path = folder / "model.safetensors"
    save_file(tensors, path)
    with pytest.raises(WeightsError, match="vocabulary of 8192 tokens; CLIP's has 49408"):
        load_checkpoint(path)
    save_file(tensors, path, metadata={"longclip_rt.vocab_size": "8192"})
    checkpoint = load_checkpoint(path)
    assert_same(checkpoint, tensors)
    assert checkpoint.architecture.eot_id == 8191 and checkpoint.config.vocab_size == 8192
    save_file(tensors, path, metadata={"longclip_rt.vocab_size": "4096"})
    with pytest.raises(WeightsError, match="states a vocabulary of 4096 tokens, but has a table of 8192"):
        load_checkpoint(path)


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no activation 'relu'; known are quick_gelu, gelu"):
        load_checkpoint(tmp_path, activation="relu")  # type: ignore[arg-type]


def test_heads_and_normalisation_come_from_the_files_beside(tmp_path: Path) -> None:
    folder = huggingface_folder(tmp_path / "model")
    vision = {"hidden_size": 128, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps({"text_config": {}, "vision_config": vision}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    checkpoint = load_checkpoint(folder)
    assert checkpoint.architecture.vision_heads == 4
    assert checkpoint.image_mean == checkpoint.image_std == (0.5, 0.5, 0.5)


def test_a_folder_in_open_clips_layout_is_read(tmp_path: Path) -> None:
    tensors = tiny_tensors(context_length=77)
    custom = {
        name if name.startswith(("visual.", "logit")) else f"text.{name}": value for name, value in tensors.items()
    }
    saved(custom, tmp_path / "open_clip_model.safetensors")
    model = {"embed_dim": 32, "vision_cfg": {"width": 128}, "text_cfg": {"width": 64, "heads": 1}, "quick_gelu": False}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.architecture.quick_gelu is False
    assert_same(checkpoint, tensors | {"positional_embedding": stretch_positions(tensors["positional_embedding"])})


def test_the_temperature_may_be_absent_or_a_vector() -> None:
    tensors = tiny_tensors()
    vector = checkpoint_from_tensors(tensors | {"logit_scale": torch.tensor([4.0])}, "clip.pt")
    assert_same(vector, tensors | {"logit_scale": torch.tensor(4.0)})
    del tensors["logit_scale"]
    absent = checkpoint_from_tensors(tensors, "clip.pt")
    torch.testing.assert_close(absent.state_dict["logit_scale"].exp(), torch.tensor(100.0))
    assert any("logit_scale" in note for note in absent.notes)


def test_gmp_weights_are_the_weights_they_stand_for() -> None:
    tensors = tiny_tensors()
    geometric = dict(tensors)
    for name in [name for name in tensors if name.endswith(("c_fc.weight", "c_proj.weight"))]:
        weight = geometric.pop(name)
        length = weight.norm(dim=1, keepdim=True)
        geometric[name.replace("weight", "r")] = length
        geometric[name.replace("weight", "theta")] = weight / length
    checkpoint = checkpoint_from_tensors(geometric, "gmp.safetensors")
    for name, tensor in tensors.items():
        torch.testing.assert_close(checkpoint.state_dict[name], tensor, rtol=1e-5, atol=1e-7)
    assert "multiplied out 10 GmP weights" in checkpoint.notes


@pytest.mark.parametrize(
    ("context_length", "rows"), [(77, 77), (248, 77), (248, 134), (97, 97), (191, 77)], ids=lambda n: str(n)
)
def test_other_lengths_are_reached_where_a_whole_ratio_leads_there(context_length: int, rows: int) -> None:
    checkpoint = checkpoint_from_tensors(tiny_tensors(context_length=rows), "clip.pt", context_length=context_length)
    assert checkpoint.architecture.context_length == context_length


@pytest.mark.parametrize(("context_length", "rows"), [(248, 64), (77, 248), (100, 77), (248, 20)])
def test_lengths_that_cannot_be_reached_are_refused(context_length: int, rows: int) -> None:
    with pytest.raises(WeightsError, match=rf"table of {rows} rows, .*{context_length}: .*or 77"):
        checkpoint_from_tensors(tiny_tensors(context_length=rows), "clip.pt", context_length=context_length)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(value: float) -> None:
    tensors = tiny_tensors()
    tensors["visual.ln_post.bias"][5] = value
    with pytest.raises(WeightsError, match=r"NaN or infinite numbers in visual\.ln_post\.bias"):
        checkpoint_from_tensors(tensors, "clip.pt")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused_by_name(dtype: torch.dtype) -> None:
    tensors = tiny_tensors()
    tensors["visual.proj"] = tensors["visual.proj"].to(dtype)
    with pytest.raises(WeightsError, match=rf"visual\.proj \({dtype}\)\. Quantised"):
        checkpoint_from_tensors(tensors, "clip.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual.ln_pre.weight": None}, r"missing: visual\.ln_pre\.weight"),
        ({"head.weight": (10, 32)}, r"unexpected: head\.weight"),
        ({"visual.proj": (128, 33)}, r"wrong shape: visual\.proj \[128, 33\] instead of \[128, 32\]"),
        ({"positional_embedding": None}, "no text position table"),
        ({"text_filip_projection.weight": (32, 64)}, "FG-CLIP"),
        ({"visual.layer1.0.conv1.weight": (1,)}, "ResNet"),
    ],
)
def test_what_is_not_clip_shaped_is_refused_by_name(
    changes: dict[str, tuple[int, ...] | None], message: str, tmp_path: Path
) -> None:
    tensors = tiny_tensors()
    for name, shape in changes.items():
        tensors.pop(name, None)
        if shape:
            tensors[name] = torch.zeros(shape)
    path = saved(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match=rf"{re.escape(str(path))} .*{message}"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("longclip-B.pt", r"no file or folder longclip-B\.pt\. Weights are a path, a hub id such as"),
        ("./owner/name", r"no file or folder \./owner/name"),
        ("/no/such/longclip.safetensors", "no file or folder /no/such"),
        ("~/no-such-weights", "no file or folder ~/no-such"),
        ("weights/longclip-B.pt", r"no file .*If you meant the hub, write hf-hub:weights/longclip-B\.pt"),
        ("here/longclip/B.pt", "no file or folder here/longclip"),
        ("", "no file or folder"),
    ],
)
def test_missing_paths_are_refused_before_any_hub_is_asked(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(WeightsError, match=message):
        load_checkpoint(source)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no file of weights"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("source", "seed"), [("random:ViT-S-32-alt", 0), ("random:ViT-S-32-alt@0", 0), ("random:ViT-S-32-alt@7", 7)]
)
def test_random_weights_are_seeded_stretched_and_called_untrained(source: str, seed: int) -> None:
    checkpoint = load_checkpoint(source)
    assert checkpoint.architecture == Architecture(224, 32, 384, 12, 256, 10, 256)
    assert not checkpoint.trained and checkpoint.source == source
    assert f"drawn at random with seed {seed}; not trained" in checkpoint.notes and STRETCHED in checkpoint.notes
    again = load_checkpoint(f"random:ViT-S-32-alt@{seed}")
    assert_same(checkpoint, again.state_dict)
    assert checkpoint.sha256 == again.sha256 != load_checkpoint("random:ViT-S-32-alt@8").sha256


def test_random_weights_take_the_activation_that_is_asked_for() -> None:
    assert load_checkpoint("random:ViT-S-32-alt", activation="gelu").architecture.quick_gelu is False


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("random:ViT-B-61", r"no model 'ViT-B-61'\. Did you mean"),
        ("random:ViT-B-16@x", r"seed in random:ViT-B-16@x must be a whole number.*got 'x'"),
        ("random:RN50", "ResNet"),
    ],
)
def test_random_weights_of_no_model_are_refused(source: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        load_checkpoint(source)


@pytest.mark.parametrize(
    ("absent", "source"), [("torch", "weights.pt"), ("open_clip", "random:ViT-B-16"), ("safetensors", "w.safetensors")]
)
def test_a_missing_package_names_its_extra(
    absent: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if ":" not in source:
        saved(tiny_tensors(), Path(source))
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MissingExtraError, match=rf"'{absent}' is not installed.*longclip-rt\[export\]"):
        load_checkpoint(source)
