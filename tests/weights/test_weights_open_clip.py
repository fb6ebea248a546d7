from __future__ import annotations

import json
import socket
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import TINY, local_hub, tiny_tensors

from longclip_rt.errors import WeightsError
from longclip_rt.weights.checkpoint import load_checkpoint
from longclip_rt.weights.open_clip import load_open_clip, open_clip_config

HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Makes open_clip know a small model `Tiny` (77 positions, GELU) with two tags; gives its weights."""
    config = {
        "embed_dim": TINY.embed_dim,
        "vision_cfg": {"image_size": 24, "patch_size": 8, "layers": 2, "width": 128, "mlp_ratio": 1.5},
        "text_cfg": {"width": 64, "heads": 1, "layers": 3, "context_length": 77},
    }
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "Tiny.json").write_text(json.dumps(config))
    (folder / "Tiny-custom.json").write_text(json.dumps(config | {"custom_text": True}))
    (folder / "Tiny-quickgelu.json").write_text(json.dumps(config | {"quick_gelu": True}))
    open_clip.add_model_config(folder)
    tags = {
        "here": {"hf_hub": "owner/tiny/", "mean": HALF, "std": HALF, "quick_gelu": True},
        "there": {"url": "http://127.0.0.1:9/tiny.pt"},
        "squashed": {"hf_hub": "owner/tiny/", "resize_mode": "squash"},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny", tags)
    return tiny_tensors(context_length=77)


def use_hub(address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@pytest.mark.parametrize("name", ["Tiny", "Tiny-custom"])
def test_a_file_is_loaded_through_open_clips_model(
    name: str, tiny_model: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(tiny_model, tmp_path / "tiny.pt")
    checkpoint = load_checkpoint(f"open_clip:{name}/{tmp_path / 'tiny.pt'}")
    assert checkpoint.architecture.to_dict() == TINY.to_dict() | {"quick_gelu": False}
    assert "stretched 77 -> 248 positions (KPS)" in checkpoint.notes
    for key, tensor in tiny_model.items():
        if key != "positional_embedding":
            torch.testing.assert_close(checkpoint.state_dict[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "quick"), [("Tiny", False), ("Tiny-quickgelu", True)])
def test_the_activation_is_that_of_the_resulting_model(
    name: str, quick: bool, tiny_model: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(tiny_model, tmp_path / "tiny.pt")
    assert load_open_clip(f"open_clip:{name}/{tmp_path / 'tiny.pt'}")[1].quick_gelu is quick


def test_a_tag_is_downloaded_with_its_activation_and_normalisation(
    tiny_model: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    save_file(tiny_model, folder / "open_clip_model.safetensors")
    save_file({"blocks.0.weight": torch.ones(1)}, folder / "model.safetensors")  # timm's image tower, in its own names
    with local_hub({"owner/tiny": folder}) as (address, _):
        use_hub(address, tmp_path / "cache", monkeypatch)
        checkpoint = load_checkpoint("open_clip:Tiny/here")
    assert checkpoint.architecture.quick_gelu is True
    assert checkpoint.image_mean == checkpoint.image_std == HALF
    assert checkpoint.sha256 is not None and checkpoint.trained


def test_offline_the_sentence_says_how_to_go_on(
    tiny_model: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    use_hub(address, tmp_path / "cache", monkeypatch)
    with pytest.raises(WeightsError, match=r"hub cannot be reached.*owner/tiny.*pass its path"):
        load_checkpoint("open_clip:Tiny/here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED["Tiny"], "there", {"url": f"{address}/tiny.pt"})
    with pytest.raises(WeightsError, match=r"tiny\.pt cannot be downloaded: .*pass its path"):
        load_checkpoint("open_clip:Tiny/there")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("open_clip:ViT-B-61/openai", r"knows no model 'ViT-B-61'\. Did you mean ViT-B-16"),
        ("open_clip:qqqq/openai", r"knows no model 'qqqq'\.$"),
        ("open_clip:ViT-B-16/opena", r"no weights 'opena' for ViT-B-16\. It has: .*openai"),
        ("open_clip:ViT-B-16", r"no weights '' for ViT-B-16"),
        ("open_clip:ViT-H-16/x", r"It has none; pass a file"),
        ("open_clip:RN50/openai", "ResNet"),
        ("open_clip:ViT-B-16-SigLIP/webli", "not a plain CLIP"),
        ("open_clip:Tiny/squashed", "resize_mode='squash'"),
    ],
)
def test_what_open_clip_or_this_package_lacks_is_said_before_any_download(
    source: str, message: str, tiny_model: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(WeightsError, match=message):
        load_checkpoint(source)


def test_a_file_of_another_model_is_refused(tiny_model: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"open_clip cannot load .*other\.pt as a Tiny"):
        load_checkpoint(f"open_clip:Tiny/{tmp_path / 'other.pt'}")


def test_configurations_are_open_clips_own() -> None:
    assert open_clip_config("ViT-B-16") == open_clip.get_model_config("ViT-B-16")
