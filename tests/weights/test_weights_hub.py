from __future__ import annotations

import io
import json
import shutil
import socket
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors.torch import save_file
from tiny_models import local_hub, long_clip_tensors, tiny_tensors

from longclip_rt.errors import WeightsError
from longclip_rt.weights.checkpoint import load_checkpoint
from longclip_rt.weights.files import read_weights
from longclip_rt.weights.hub import HubId, download_weights, parse_hub_id
from longclip_rt.weights.naming import huggingface_names

OWNER = "owner/Long.CLIP-B"


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other test runs with HF_HUB_OFFLINE; these ask servers of their own on 127.0.0.1."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four repositories: a single .pt, Hugging Face's layout, several candidates, and split weights."""
    root = tmp_path_factory.mktemp("hub")
    folders = {name: root / name for name in (OWNER, "owner/diffusers", "owner/several", "owner/split")}
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("A model.")
    torch.save(long_clip_tensors(), folders[OWNER] / "longclip-B.pt")
    diffusers = folders["owner/diffusers"]
    save_file(huggingface_names(tiny_tensors()), diffusers / "model.safetensors", metadata={"format": "pt"})
    torch.save({}, diffusers / "pytorch_model.bin")
    gelu = {"hidden_act": "gelu"}
    (diffusers / "config.json").write_text(json.dumps({"text_config": gelu, "vision_config": gelu}))
    for name in ("one.safetensors", "two.safetensors", "old.pt"):
        (folders["owner/several"] / name).write_bytes(b"not looked at")
    tensors = tiny_tensors()
    halves = (dict(list(tensors.items())[:9]), dict(list(tensors.items())[9:]))
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, half in zip(files, halves, strict=True):
        save_file(half, folders["owner/split"] / name)
    weight_map = {key: name for name, half in zip(files, halves, strict=True) for key in half}
    (folders["owner/split"] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folders


@pytest.fixture
def closed_port() -> str:
    """An address on this machine where nothing answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("BeichenZhang/LongCLIP-B", HubId("BeichenZhang/LongCLIP-B")),
        ("hf-hub:owner/name", HubId("owner/name")),
        ("owner/name/longclip-L@336px.pt", HubId("owner/name", "longclip-L@336px.pt")),
        ("owner/name/sub/model.safetensors", HubId("owner/name", "sub/model.safetensors")),
        ("name", None),
        ("/owner/name", None),
        ("~/owner", None),
        ("owner/na me", None),
        ("", None),
    ],
)
def test_ids_are_told_from_other_texts(text: str, expected: HubId | None) -> None:
    assert parse_hub_id(text) == expected


def test_the_single_file_of_weights_is_downloaded_once(repositories: dict[str, Path], tmp_path: Path) -> None:
    with local_hub(repositories) as (endpoint, requests):
        first = download_weights(HubId(OWNER), endpoint=endpoint, cache_dir=tmp_path)
        assert f"GET /{OWNER}/resolve/main/longclip-B.pt" in requests
        assert not [request for request in requests if "README" in request]
        requests.clear()
        second = download_weights(HubId(OWNER), endpoint=endpoint, cache_dir=tmp_path)
        assert not [request for request in requests if request.startswith("GET") and "resolve" in request]
    assert first == second and tmp_path in first.parents
    assert first.read_bytes() == (repositories[OWNER] / "longclip-B.pt").read_bytes()


def test_safetensors_are_preferred_and_the_config_comes_along(repositories: dict[str, Path], tmp_path: Path) -> None:
    with local_hub(repositories) as (endpoint, requests):
        path = download_weights(HubId("owner/diffusers"), endpoint=endpoint, cache_dir=tmp_path)
    assert path.name == "model.safetensors"
    assert path.with_name("config.json").is_file()
    assert not [request for request in requests if "pytorch_model.bin" in request]
    assert load_checkpoint(path).architecture.quick_gelu is False


def test_all_parts_of_split_weights_are_downloaded(repositories: dict[str, Path], tmp_path: Path) -> None:
    with local_hub(repositories) as (endpoint, _):
        path = download_weights(HubId("owner/split"), endpoint=endpoint, cache_dir=tmp_path)
    assert read_weights(path).content.keys() == tiny_tensors().keys()


def test_several_candidates_are_named(repositories: dict[str, Path], tmp_path: Path) -> None:
    with local_hub(repositories) as (endpoint, _):
        with pytest.raises(WeightsError, match=r"owner/several/one\.safetensors, owner/several/two\.safetensors\."):
            download_weights(HubId("owner/several"), endpoint=endpoint, cache_dir=tmp_path)
        named = download_weights(HubId("owner/several", "old.pt"), endpoint=endpoint, cache_dir=tmp_path)
    assert named.read_bytes() == b"not looked at"


@pytest.mark.parametrize(
    ("hub_id", "message"),
    [
        (HubId("owner/absent"), r"no repository owner/absent on the hub, or it is private.*hf auth login"),
        (HubId(OWNER, "absent.pt"), r"has no file absent\.pt"),
        (HubId("owner/.."), r"no name of a repository"),
    ],
)
def test_what_the_hub_does_not_have_is_a_sentence(
    hub_id: HubId, message: str, repositories: dict[str, Path], tmp_path: Path
) -> None:
    with local_hub(repositories) as (endpoint, _), pytest.raises(WeightsError, match=message):
        download_weights(hub_id, endpoint=endpoint, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (503, "", r"hub refused to give .*503"),
        (403, "GatedRepo", r"accepted its terms.*hf auth login"),
    ],
)
def test_a_refusing_hub_is_a_sentence(
    status: int, code: str, message: str, repositories: dict[str, Path], tmp_path: Path
) -> None:
    with local_hub(repositories, (status, code)) as (endpoint, _), pytest.raises(WeightsError, match=message):
        download_weights(HubId(OWNER), endpoint=endpoint, cache_dir=tmp_path)


def test_offline_without_a_copy_the_sentence_says_how_to_go_on(closed_port: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=rf"cannot be reached.*hf download {OWNER}.*pass its path"):
        download_weights(HubId(OWNER), endpoint=closed_port, cache_dir=tmp_path)
    with pytest.raises(WeightsError, match="cannot be reached"):
        download_weights(HubId(OWNER), endpoint=closed_port, cache_dir=tmp_path / "absent")


def test_offline_the_copy_in_the_cache_is_used(
    repositories: dict[str, Path], closed_port: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with local_hub(repositories) as (endpoint, _):
        path = download_weights(HubId(OWNER), endpoint=endpoint, cache_dir=tmp_path)
    assert download_weights(HubId(OWNER), endpoint=closed_port, cache_dir=tmp_path) == path
    assert "using the copy" in caplog.text
    assert download_weights(HubId(OWNER, "longclip-B.pt"), endpoint=closed_port, cache_dir=tmp_path) == path
    for hub_id in (HubId(OWNER, "another.pt"), HubId("owner/another")):
        with pytest.raises(WeightsError, match="cannot be reached"):
            download_weights(hub_id, endpoint=closed_port, cache_dir=tmp_path)


def test_the_users_wish_to_stay_offline_is_heeded(
    repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with local_hub(repositories) as (endpoint, requests), pytest.raises(WeightsError, match="cannot be reached"):
        download_weights(HubId(OWNER), endpoint=endpoint, cache_dir=tmp_path)
    assert requests == []


def test_a_cache_that_cannot_be_written_is_a_sentence(repositories: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with local_hub(repositories) as (endpoint, _), pytest.raises(WeightsError, match=r"cannot be stored.*HF_HOME"):
        download_weights(HubId(OWNER), endpoint=endpoint, cache_dir=tmp_path / "cache")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_on_a_terminals_stderr(
    progress: bool,
    repositories: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with local_hub(repositories) as (endpoint, _):
        download_weights(HubId(OWNER), endpoint=endpoint, cache_dir=tmp_path, progress=progress)
    assert ("longclip-B.pt" in terminal.getvalue()) == progress
    assert capsys.readouterr().out == ""
    assert not are_progress_bars_disabled()


def test_a_checkpoint_is_loaded_by_its_id(
    repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with local_hub(repositories) as (endpoint, _):
        # What the environment variable HF_ENDPOINT sets where it is there before the import.
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        checkpoint = load_checkpoint(OWNER)
    expected = load_checkpoint(shutil.copy(repositories[OWNER] / "longclip-B.pt", tmp_path / "local.pt"))
    assert (checkpoint.source, checkpoint.sha256) == (OWNER, expected.sha256)
    for name, tensor in expected.state_dict.items():
        torch.testing.assert_close(checkpoint.state_dict[name], tensor, rtol=0, atol=0)
