from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer, util

from longclip_rt import Embedder, InputError, MissingExtraError
from longclip_rt.bundle.bundle import BUILT_IN
from longclip_rt.bundle.samples import example_captions
from longclip_rt.integrations.sentence_transformers import LongClip

PHOTOS = [caption.photo for caption in example_captions()]
TEXTS = [text for caption in example_captions() for text in (caption.long, caption.short)]


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    module = LongClip(BUILT_IN, "openvino", "fp32")
    return SentenceTransformer(modules=[module], device="cpu", prompts={"query": "a picture of "})


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.from_bundle(BUILT_IN, "openvino", "fp32")


def test_texts_and_images_are_the_embedders(model: SentenceTransformer, embedder: Embedder) -> None:
    np.testing.assert_allclose(model.encode(TEXTS, batch_size=4), embedder.embed_texts(TEXTS), atol=1e-5)
    expected = embedder.embed_images(PHOTOS)
    np.testing.assert_allclose(model.encode([Image.open(photo) for photo in PHOTOS]), expected, atol=1e-5)
    np.testing.assert_allclose(model.encode([str(photo) for photo in PHOTOS[:2]]), expected[:2], atol=1e-5)
    np.testing.assert_allclose(model.encode([{"image": Image.open(PHOTOS[0])}]), expected[:1], atol=1e-5)
    array = np.asarray(Image.open(PHOTOS[0]).convert("RGB"))
    np.testing.assert_allclose(model.encode([array]), expected[:1], atol=1e-5)
    assert model.get_embedding_dimension() == embedder.dim and model.max_seq_length == 248


def test_a_prompt_stands_before_texts_alone(model: SentenceTransformer, embedder: Embedder) -> None:
    prompted = model.encode(["a dog"], prompt_name="query")
    np.testing.assert_allclose(prompted, embedder.embed_texts(["a picture of a dog"]), atol=1e-5)
    photo = [Image.open(PHOTOS[0])]
    np.testing.assert_array_equal(model.encode(photo, prompt_name="query"), model.encode(photo))


def test_semantic_search_finds_what_is_there(model: SentenceTransformer) -> None:
    corpus = model.encode(TEXTS, convert_to_tensor=True)
    hits = util.semantic_search(model.encode(TEXTS[3:5], convert_to_tensor=True), corpus, top_k=2)
    assert [found[0]["corpus_id"] for found in hits] == [3, 4]


def test_a_saved_model_has_its_bundle_along(
    model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save(str(tmp_path / "saved"))
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = SentenceTransformer(str(tmp_path / "moved"), device="cpu", trust_remote_code=True)
    assert again[0].embedder.bundle.path == tmp_path / "moved" / "bundle"
    assert again[0].embedder.backend.precision == "fp32" and again.prompts["query"] == "a picture of "
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))
    again.save(str(tmp_path / "moved"))  # onto itself
    np.testing.assert_array_equal(again.encode(TEXTS[:1]), model.encode(TEXTS[:1]))


def test_other_processes_open_the_bundle_themselves(model: SentenceTransformer) -> None:
    again = pickle.loads(pickle.dumps(model[0]))
    assert again.embedder.describe() == model[0].embedder.describe()


def test_what_is_neither_is_refused(model: SentenceTransformer) -> None:
    with pytest.raises(InputError, match="Encode them apart"):
        model[0].preprocess(["a dog", Image.open(PHOTOS[0])])
    with pytest.raises(InputError, match="Pairs"):
        model.encode([("a", "b"), ("c", "d")])
    with pytest.raises(InputError, match=r"uint8 \[H, W, 3\]; got float64"):
        model.encode([np.zeros((3, 8, 8))])
    with pytest.raises(InputError, match="neither a text nor an image"):
        model[0].preprocess([3])
    with pytest.raises(InputError, match=r"absent\.jpg"):
        model[0].forward({"images": ["absent.jpg"]})


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers.base.modules", None)
    monkeypatch.delitem(sys.modules, "longclip_rt.integrations.sentence_transformers")
    with pytest.raises(MissingExtraError, match=r"longclip-rt\[sentence-transformers\]"):
        import longclip_rt.integrations.sentence_transformers  # noqa: F401


def test_the_example_finds_every_scene() -> None:
    example = Path(__file__).parents[2] / "examples" / "semantic_search.py"
    result = subprocess.run([sys.executable, example, BUILT_IN], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = re.findall(r"\.\.\.\n +0\.\d+  (scene-\d)", result.stdout)
    assert found == [f"scene-{number}" for number in range(6)]
