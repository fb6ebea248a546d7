"""What the public names are given by mistake is a sentence, and never another vector."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import longclip_rt
from longclip_rt import Embedder, load_bundle, load_embeddings, stretch_positions
from longclip_rt.bundle.bundle import BUILT_IN
from longclip_rt.formats.embeddings import iter_embeddings

MODEL = BUILT_IN
LONG = "a" * 5000


@pytest.fixture(scope="module", params=["openvino", "onnxruntime"])
def embedder(request: pytest.FixtureRequest) -> Embedder:
    return Embedder.from_bundle(MODEL, request.param, "fp32")


def pixels(embedder: Embedder) -> np.ndarray:
    size = embedder.image_size
    return np.random.default_rng(0).normal(size=(2, 3, size, size)).astype(np.float32)


@pytest.mark.parametrize(
    "convert",
    [
        lambda given: given.astype(">f4"),
        lambda given: given.astype(np.float64),
        np.asfortranarray,
        lambda given: np.repeat(given, 2, axis=0)[::2],
    ],
)
def test_pixels_of_other_layouts_are_the_same_pixels(
    embedder: Embedder, convert: Callable[[np.ndarray], np.ndarray]
) -> None:
    given = pixels(embedder)
    expected = embedder.backend.run("image", given)[0]
    np.testing.assert_array_equal(embedder.backend.run("image", convert(given))[0], expected)


@pytest.mark.parametrize("kind", ["int16", ">i4", "uint32", "int64", "uint8"])
def test_ids_of_other_types_are_the_same_ids(embedder: Embedder, kind: str) -> None:
    ids = np.array([[1, 5, 9, 2]], np.int32)
    expected = embedder.encode_tokens(ids)
    np.testing.assert_array_equal(embedder.encode_tokens(ids.astype(kind)), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.astype(np.uint8), "must be normalised floats; got uint8"),
        (lambda given: given.astype(bool), "must be normalised floats; got bool"),
        (lambda given: given.astype(np.complex64), "must be normalised floats"),
        (lambda given: np.where(given > 2, np.nan, given), "must be finite"),
        (lambda given: np.where(given > 2, np.inf, given), "must be finite"),
        (lambda given: given * 1e300, "must be finite"),
    ],
)
def test_pixels_that_are_none_are_refused(
    embedder: Embedder, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    with pytest.raises(longclip_rt.BackendError, match=message):
        embedder.backend.run("image", change(pixels(embedder).astype(np.float64)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda embedder: embedder.embed_texts(["fine", "\ud800"]), "Text 1 is not valid Unicode"),
        (lambda embedder: embedder.embed_texts(None), "takes a list of texts; got NoneType"),
        (lambda embedder: embedder.embed_texts([None]), "."),
        (lambda embedder: embedder.embed_images(None), "takes a list of images; got NoneType"),
        (lambda embedder: embedder.embed_images(Image.new("RGB", (9, 9))), "got one image"),
        (lambda embedder: embedder.encode_tokens([[1, 2]]), "takes a numpy array; got list"),
        (lambda embedder: embedder.encode_tokens(np.ones((1, 3), np.float32)), "must be integers"),
        (lambda embedder: embedder.encode_tokens(np.full((1, 3), 10**6, np.int32)), "the model's vocabulary"),
        (lambda embedder: embedder.encode_tokens(np.full((1, 3), -1, np.int32)), "the model's vocabulary"),
        (lambda embedder: embedder.encode_tokens(np.full((1, 3), 2**63, np.uint64)), "the model's vocabulary"),
        (lambda embedder: embedder.backend.run("voice", np.ones((1, 3), np.int32)), "There is no tower 'voice'"),
        (lambda embedder: embedder.backend.run("text", np.ones((1, 3), np.int32), []), "No output was named"),
        (lambda embedder: embedder.encode_crops(None), "one numpy array.*got NoneType"),
        (lambda embedder: embedder.encode_crops([1]), "one numpy array.*got list"),
        (lambda embedder: embedder.encode_crops(Image.new("RGB", (9, 9))), "one numpy array.*got Image"),
        (lambda embedder: embedder.with_pca("absent.safetensors"), "There is no file 'absent.safetensors'"),
        (lambda embedder: embedder.with_pca(1), "A PCA is given as .* got int"),
        (lambda embedder: embedder.with_pca("a\0"), "holds a NUL"),
        (lambda embedder: embedder.with_pca(LONG), "longer than any"),
        (pickle.dumps, "cannot be pickled"),
    ],
)
def test_misuse_of_an_embedder_is_a_sentence(
    embedder: Embedder, call: Callable[[Embedder], object], message: str
) -> None:
    with pytest.raises(longclip_rt.LongClipError, match=message):
        call(embedder)


@pytest.mark.parametrize(
    ("call", "given", "message"),
    [
        (stretch_positions, None, "a numpy array or a torch tensor; got NoneType"),
        (stretch_positions, [[1]], "a numpy array or a torch tensor; got list"),
        (stretch_positions, np.full((77, 3), "a"), "holds real numbers; got"),
        (stretch_positions, np.zeros((77, 3), complex), "real numbers; got one of complex128"),
        (stretch_positions, torch.zeros((77, 3), device="meta"), "real numbers; got one of"),
        (stretch_positions, torch.zeros((77, 3)).to_sparse(), "real numbers; got one of"),
        (lambda given: stretch_positions(np.zeros((77, 3)), keep=given), "20", "got keep='20'"),
        (load_embeddings, "\ud800.parquet", "is not valid Unicode"),
        (load_embeddings, "a\0.parquet", "holds a NUL"),
        (load_embeddings, None, "a str or a Path; got NoneType"),
        (load_embeddings, LONG + ".parquet", "longer than any"),
        (load_embeddings, "", "should end with"),
        (load_bundle, None, "a str or a Path; got NoneType"),
        (load_bundle, b"bytes", "a str or a Path; got bytes"),
        (load_bundle, "a\0", "holds a NUL"),
        (load_bundle, LONG, "longer than any"),
        (load_bundle, "a" * 300, "cannot be read: File name too long"),
        (Embedder.from_bundle, 1, "a str or a Path; got int"),
        (Embedder.from_bundle, LONG, "longer than any"),
        (lambda given: next(iter_embeddings("absent.parquet", given)), 0, "must be at least 1"),
    ],
)
def test_what_is_no_file_is_a_sentence(call: Callable[[Any], object], given: object, message: str) -> None:
    with pytest.raises(longclip_rt.LongClipError, match=message):
        call(given)


@pytest.mark.parametrize("devices", ["0", 0, [], [None], [0.5], [-1], [0, 0]])
def test_devices_are_numbers_each_once(devices: Any) -> None:
    with pytest.raises(longclip_rt.BackendError, match="Devices are numbers of GPUs from 0"):
        Embedder.from_bundle(MODEL, "onnxruntime", devices=devices)
