from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from longclip_rt.backends.base import Backend, Float32
from longclip_rt.bundle.bundle import Bundle, load_bundle
from longclip_rt.errors import BackendError
from longclip_rt.opening import open_backend
from longclip_rt.parity.self_check import FILE, run_self_check


class Altered(Backend):
    """ONNX Runtime's vectors, changed on the way."""

    name = "altered"
    version = device = "0"  # type: ignore[assignment]

    def __init__(self, bundle: Bundle, change: Any, precision: str = "fp16") -> None:
        super().__init__(bundle, precision)
        self.inner = open_backend(bundle, "onnxruntime", precision)
        self.change = change
        self.shapes: list[tuple[int, ...]] = []

    def _run(self, tower: str, inputs: Any, outputs: Sequence[str]) -> list[Float32]:
        self.shapes.append(inputs.shape)
        return [self.change(tower, inputs, array) for array in self.inner.run(tower, inputs, outputs)]

    def _close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_right_backend_passes_in_several_shapes(tiny_bundle: Path, precision: str) -> None:
    bundle = load_bundle(tiny_bundle)
    backend = Altered(bundle, lambda tower, inputs, array: array, precision)
    run_self_check(backend)
    texts = [shape for shape in backend.shapes if len(shape) == 2]
    lengths = {shape[1] for shape in texts}
    assert (4, 248) in texts and min(lengths) < 8 and len(lengths) >= 4
    assert all(backend.shapes.count(shape) >= 2 for shape in backend.shapes)
    assert (2, 3, 24, 24) in backend.shapes and (1, 3, 24, 24) in backend.shapes
    kept = load_file(tiny_bundle / FILE)
    assert kept["image"].dtype == np.uint8 and kept["text_embeds"].shape == (4, 32)


def swapped(tower: str, inputs: Any, array: Float32) -> Float32:
    return array[::-1].copy()


def noisy(tower: str, inputs: Any, array: Float32) -> Float32:
    noise = np.random.default_rng(0).standard_normal(array.shape).astype(np.float32)
    return array + 0.05 * noise / np.sqrt(array.shape[1]) * (tower == "image")


def not_a_number(tower: str, inputs: Any, array: Float32) -> Float32:
    return array * np.float32("nan")


def wrong_when_long(tower: str, inputs: Any, array: Float32) -> Float32:
    return -array if tower == "text" and inputs.shape[1] == 248 else array


@pytest.mark.parametrize("change", [swapped, noisy, not_a_number, wrong_when_long])
def test_a_wrong_one_is_refused(tiny_bundle: Path, change: Any) -> None:
    with pytest.raises(BackendError, match=r"altered 0 on 0 fails its self-check.*1 - cosine.*engine verify"):
        run_self_check(Altered(load_bundle(tiny_bundle), change))


def test_every_corner_is_tried_and_a_wrong_one_is_named(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    corners = {"text": [("profile 1", 16, 2), ("profile 2", 248, 9), ("profile 3", 1, 4)], "image": [("all", None, 7)]}
    monkeypatch.setattr(Altered, "corners", lambda self, tower: corners[tower])
    backend = Altered(load_bundle(tiny_bundle), lambda tower, inputs, array: array)
    run_self_check(backend)
    for shape in ((2, 16), (9, 248), (7, 3, 24, 24)):
        assert backend.shapes.count(shape) == 2
    assert "short enough for profile 3, which is not checked" in caplog.text

    def wrong(tower: str, inputs: Any, array: Float32) -> Float32:
        array = array.copy()
        array[8:] *= -1  # a row that a smaller batch does not have
        return array

    with pytest.raises(BackendError, match=r"text_embeds of 9 texts \(profile 2\) has 1 - cosine"):
        run_self_check(Altered(load_bundle(tiny_bundle), wrong))


def test_an_older_bundle_has_no_figures_and_a_damaged_file_is_said(
    tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = load_bundle(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    backend = Altered(bundle, not_a_number)
    bundle.file(FILE).write_bytes(b"x")
    with pytest.raises(BackendError, match=r"self_check\.safetensors cannot be read"):
        run_self_check(backend)
    bundle.file(FILE).unlink()
    with caplog.at_level(logging.WARNING, "longclip_rt"):
        run_self_check(backend)
    assert "no figures for a self-check" in caplog.text and not backend.shapes
