from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_tensors

# Tests neither read nor fill the user's folders, and never ask a hub. The bundles they know are those they make: a test
# of the built-in model names it.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr("longclip_rt.bundle.BUILT_IN", cache / "no built-in model")
    return cache


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tiny_tensors(0).items()}, path)
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a small model with both precisions and further outputs; tests must not change it."""
    from longclip_rt.export.exporter import ExportOptions, export_bundle

    torch.set_num_threads(2)
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    outputs = ("pooler_output", "text:hidden_states.-2", "image:last_hidden_state")
    export_bundle(ExportOptions(str(tiny_weights), out, fp16=True, outputs=outputs))
    return out


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_arrives() -> None:
    """Lets SIGINT reach programs that tests start: a shell's background job, as CI may be, inherits it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
