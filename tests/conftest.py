from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_tensors

# Tests neither read nor fill the user's folders, and never ask a hub. The bundles they know are those they make: a test
# of the built-in model names it.
os.environ["HF_HUB_OFFLINE"] = "1"

os.environ["PYTHONFAULTHANDLER"] = "1"
CHILD_SECONDS = 100
"""What a program that a test starts may take, unless the test says more: less than the test itself may."""


def _bounded_run(
    *arguments: Any,
    input: Any = None,
    capture_output: bool = False,
    check: bool = False,
    timeout: float = CHILD_SECONDS,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run`, but a child that hangs ends by SIGABRT, at which Python prints the stacks of its threads."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options["stdout"] = options["stderr"] = subprocess.PIPE
    with subprocess.Popen(*arguments, **options) as process:
        try:
            out, err = process.communicate(input, timeout)
        except subprocess.TimeoutExpired as expired:
            process.send_signal(signal.SIGABRT)
            expired.stdout, expired.stderr = process.communicate(timeout=10)
            sys.stderr.write(str(expired.stderr))
            raise
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args, out, err)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


subprocess.run = _bounded_run


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr("longclip_rt.bundle.bundle.BUILT_IN", cache / "no built-in model")
    return cache


@pytest.fixture(autouse=True)
def own_logger() -> Iterator[None]:
    """The package's messages reach each test, whatever a test or a library before it did to loggers."""
    logger = logging.getLogger("longclip_rt")
    before = (logger.level, logger.propagate, logger.disabled, logging.root.manager.disable)
    yield
    found = (logger.level, logger.propagate, logger.disabled, logging.root.manager.disable)
    logger.level, logger.propagate, logger.disabled, logging.root.manager.disable = before
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    assert found[1:] == before[1:], f"a test left the package's logger with {found}, and it was {before}"


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
    states = ("last_hidden_state", "hidden_states.-2", "hidden_states.-3")
    outputs = ("pooler_output", *(f"text:{name}" for name in states), "image:last_hidden_state")
    export_bundle(ExportOptions(str(tiny_weights), out, fp16=True, outputs=outputs))
    return out


@pytest.fixture(scope="session")
def pca_bundle(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a PCA of 8 components, as operators, as kernels and as a plug-in; tests must not change it."""
    import numpy as np

    from longclip_rt.export import exporter
    from longclip_rt.parity import gate
    from longclip_rt.pca.basis import Basis, Pca, save_pca

    folder = tmp_path_factory.mktemp("pca bundles")
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((32, 32)))
    mean, variances = 0.01 * rng.standard_normal(32), np.linspace(2, 1, 32)
    save_pca(Pca({"joint": Basis(mean, basis[:, :8], variances, 100)}), folder / "pca.safetensors")
    pca, texts = folder / "pca.safetensors", gate.parity_texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "parity_texts", lambda tokenizer: texts(tokenizer)[::6])
        patch.setattr(exporter, "_runtimes", lambda *_: [("onnxruntime", "fp32")])  # the others have their own tests
        options = exporter.ExportOptions(str(tiny_weights), folder / "bundle", True, pca=pca, pca_in_engine=True)
        exporter.export_bundle(options)
    return folder / "bundle"


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_arrives() -> None:
    """Lets SIGINT reach programs that tests start: a shell's background job, as CI may be, inherits it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
