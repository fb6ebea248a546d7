from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from longclip_rt import Embedder
from longclip_rt.bundle.bundle import bundles_home
from longclip_rt.bundle.manifest import write_fields
from longclip_rt.bundle.samples import example_captions, example_photos
from longclip_rt.errors import BundleError, InputError
from longclip_rt.weights.checkpoint import load_checkpoint, towers_from_checkpoint


@pytest.fixture(scope="module")
def embedder(tiny_bundle: Path) -> Embedder:
    return Embedder.from_bundle(tiny_bundle, "openvino", "fp32")


def test_texts_come_back_in_order_as_the_towers_give_them(embedder: Embedder, tiny_weights: Path) -> None:
    texts = [text for caption in example_captions() for text in (caption.long, caption.short)] + ["", "a", "é 😀"]
    vectors = embedder.embed_texts(texts)
    assert vectors.shape == (len(texts), embedder.dim) and vectors.dtype == np.float32
    text, _ = towers_from_checkpoint(load_checkpoint(tiny_weights))
    expected = text(torch.from_numpy(embedder.tokenizer(texts)))[0].numpy()
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_a_long_text_is_cut_and_said_or_refused(embedder: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    long = "many words " * 200
    with caplog.at_level(logging.WARNING, "longclip_rt"):
        vectors = embedder.embed_texts(["short", long, long])
    assert "2 of 3 texts were cut to 248 tokens" in caplog.text
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    with pytest.raises(InputError, match=r"Text 1 has 402 tokens.*248"):
        embedder.embed_texts(["short", long], truncate=False)


def test_images_of_every_kind_of_source_are_one(embedder: Embedder) -> None:
    photos = example_photos()
    by_path = embedder.embed_images(photos)
    assert by_path.shape == (len(photos), embedder.dim) and by_path.dtype == np.float32
    mixed = embedder.embed_images([str(photos[0]), photos[1].read_bytes(), Image.open(photos[2])])
    np.testing.assert_array_equal(mixed.shape, (3, embedder.dim))
    np.testing.assert_allclose(mixed, by_path[:3], atol=1e-5)


def test_nothing_gives_an_empty_array(embedder: Embedder) -> None:
    assert embedder.embed_texts([]).shape == (0, embedder.dim)
    assert embedder.embed_images([]).shape == (0, embedder.dim)


def test_a_single_item_in_place_of_a_list_is_refused(embedder: Embedder) -> None:
    with pytest.raises(InputError, match="list of texts"):
        embedder.embed_texts("one text")
    with pytest.raises(InputError, match="list of images"):
        embedder.embed_images("one.jpg")


def test_a_bad_image_is_named(embedder: Embedder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jpg"):
        embedder.embed_images([example_photos()[0], tmp_path / "absent.jpg"])


def test_the_default_bundle_is_named_and_untrained_weights_are_said(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BundleError, match="longclip-rt export"):
        Embedder.from_bundle()
    shutil.copytree(tiny_bundle, bundles_home() / "newest")
    with caplog.at_level(logging.INFO, "longclip_rt"):
        embedder = Embedder.from_bundle()
    assert str(bundles_home() / "newest") in caplog.text
    assert "UNTRAINED" not in caplog.text
    assert embedder.describe()["trained"] == "true"
    write_fields(bundles_home() / "newest", {**embedder.bundle.manifest, "trained": False})
    with caplog.at_level(logging.INFO, "longclip_rt"):
        assert Embedder.from_bundle().describe()["trained"] == "false"
    assert "UNTRAINED" in caplog.text


def test_one_pool_of_threads_serves_all_calls(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[threading.Thread] = set()
    encode = embedder.encode_tokens

    def noted(ids: np.ndarray) -> np.ndarray:
        seen.add(threading.current_thread())
        return encode(ids)

    monkeypatch.setattr(embedder, "encode_tokens", noted)
    for call in range(4 * (embedder.concurrency + 1)):
        embedder.embed_texts([f"call {call}"])
    assert 1 <= len(seen) <= embedder.concurrency + 1


def test_use_after_leaving_a_with_block_is_possible_again(tiny_bundle: Path) -> None:
    with Embedder.from_bundle(tiny_bundle, "onnxruntime") as embedder:
        before = embedder.embed_texts(["a cup"])
    np.testing.assert_allclose(embedder.embed_texts(["a cup"]), before, atol=1e-6)


def test_tensors_come_back_where_they_are_asked_for(embedder: Embedder) -> None:
    texts = ["a red circle", "many words " * 40, ""]
    tensor = embedder.embed_texts(texts, convert_to="torch")
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), embedder.embed_texts(texts))
    photos = example_photos()[:2]
    np.testing.assert_array_equal(
        embedder.embed_images(photos, convert_to="torch").numpy(), embedder.embed_images(photos)
    )
    assert embedder.embed_images([], convert_to="torch").shape == (0, embedder.dim)
    with pytest.raises(InputError, match="'numpy' or 'torch'"):
        embedder.embed_texts(texts, convert_to="jax")  # type: ignore[call-overload]
