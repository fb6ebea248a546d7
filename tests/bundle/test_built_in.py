"""The model that ships with the package, as it lies in the repository."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from longclip_rt.bundle.bundle import BUILT_IN, default_bundle, load_bundle
from longclip_rt.errors import BackendError
from longclip_rt.opening import open_backend
from longclip_rt.parity.self_check import FILE, run_self_check
from longclip_rt.runtime import Embedder

SCENES = Path(__file__).parents[2] / "examples" / "scenes"


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.from_bundle(BUILT_IN, precision="fp32")


def test_it_is_the_default_and_small_and_names_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longclip_rt.bundle.bundle.BUILT_IN", BUILT_IN)
    bundle = default_bundle()
    assert bundle.path == BUILT_IN.resolve()
    assert bundle.trained and bundle.precisions == ("fp32", "fp16") and bundle.architecture.context_length == 248
    assert bundle.manifest["source"]["weights"] == "tiny.safetensors"
    assert sum(file.stat().st_size for file in BUILT_IN.iterdir()) < 25_000_000
    assert not [check for check in bundle.manifest["parity"]["checks"] if not check["passed"]]
    load_bundle(BUILT_IN)  # every hash


def test_its_card_says_what_it_does_not_know() -> None:
    card = (BUILT_IN / "README.md").read_text(encoding="utf-8")
    assert "knows nothing about photographs" in card and "| real photographs" in card


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_carries_figures_that_a_gpu_is_held_to(precision: str, caplog: pytest.LogCaptureFixture) -> None:
    backend = open_backend(load_bundle(BUILT_IN), "onnxruntime", precision)
    run_self_check(backend)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert not warnings  # of a bundle without figures
    kept = load_file(BUILT_IN / FILE)
    kept["text_embeds"][2] *= -1
    wrong = {name: np.ascontiguousarray(array) for name, array in kept.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longclip_rt.parity.self_check._figures", lambda bundle: wrong)
        with pytest.raises(BackendError, match="fails its self-check"):
            run_self_check(backend)
    backend.close()


def test_whole_captions_find_more_than_cut_ones(embedder: Embedder) -> None:
    rows = json.loads((SCENES / "captions.json").read_text(encoding="utf-8"))
    scenes = np.array([row["scene"] for row in rows])
    images = embedder.embed_images([SCENES / row["image"] for row in rows])
    captions = [row["caption"] for row in rows]
    best = (embedder.embed_texts(captions) @ images.T).argmax(axis=1)
    assert (scenes[best] == scenes).all()  # always one of the four that are nearly the same
    whole = int((best == np.arange(len(rows))).sum())
    first_sentence = [caption.partition(". ")[0] for caption in captions]
    cut = int(((embedder.embed_texts(first_sentence) @ images.T).argmax(axis=1) == np.arange(len(rows))).sum())
    # 6 of 24 by chance. On one machine: 13 whole, 6 of the first sentence alone.
    assert whole >= 10 and whole > cut
