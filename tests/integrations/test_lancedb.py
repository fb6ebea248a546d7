from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pytest
from lancedb.embeddings import get_registry
from lancedb.pydantic import LanceModel, Vector
from PIL import Image

from longclip_rt import Embedder, MissingExtraError
from longclip_rt.bundle.bundle import BUILT_IN
from longclip_rt.bundle.samples import example_photos
from longclip_rt.integrations import lancedb as integration

PHOTOS = [str(photo) for photo in example_photos()[:4]]


def function(**options: Any) -> Any:
    assert integration.LongClipFunction
    return get_registry().get("longclip-rt").create(bundle=str(BUILT_IN), backend="openvino", **options)


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.from_bundle(BUILT_IN, "openvino")


def test_a_table_embeds_its_images_and_queries_of_both_kinds(tmp_path: Path, embedder: Embedder) -> None:
    images = function(source="image")

    class Picture(LanceModel):
        path: str = images.SourceField()
        vector: Vector(images.ndims()) = images.VectorField()  # type: ignore[valid-type]

    table = lancedb.connect(tmp_path).create_table("pictures", schema=Picture)
    table.add([{"path": path} for path in PHOTOS])
    vectors = np.stack(table.to_arrow()["vector"].to_numpy())
    np.testing.assert_allclose(vectors, embedder.embed_images(PHOTOS), atol=2e-3)  # batches differ, in bf16
    again = lancedb.connect(tmp_path).open_table("pictures")
    hits = again.search("a cup of coffee").distance_type("cosine").limit(4).to_list()
    scores = embedder.embed_texts(["a cup of coffee"]) @ vectors.T
    assert hits[0]["path"] == PHOTOS[int(scores.argmax())]
    assert again.search(Image.open(PHOTOS[2])).limit(1).to_list()[0]["path"] == PHOTOS[2]


def test_a_bad_image_has_no_vector_and_is_said(embedder: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    found = function(source="image").compute_source_embeddings([PHOTOS[0], "absent.jpg"])
    assert found[0].shape == (embedder.dim,) and found[1] is None
    assert "'absent.jpg' does not exist" in caplog.text


def test_columns_of_texts(embedder: Embedder) -> None:
    found = function().compute_source_embeddings(["a dog", "a cat"])
    np.testing.assert_allclose(np.stack(found), embedder.embed_texts(["a dog", "a cat"]), atol=2e-3)
    assert function().max_retries == 0


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lancedb.embeddings", None)
    monkeypatch.delitem(sys.modules, "longclip_rt.integrations.lancedb")
    with pytest.raises(MissingExtraError, match=r"longclip-rt\[lance\]"):
        import longclip_rt.integrations.lancedb  # noqa: F401
