from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pca_files import write_embeddings
from PIL import Image

from longclip_rt import Embedder
from longclip_rt.errors import BundleError, InputError, PcaError
from longclip_rt.search.nearest import search
from longclip_rt.serving.server import Options, Server

EXAMPLES = Path(__file__).parents[2] / "examples"


def index_of(path: Path, embedder: Embedder, **metadata: str) -> Path:
    """Photographs, one of them by a path that leaves the folder, one absent, and a text."""
    photos = sorted((EXAMPLES / "photos").glob("*.jpg"))[:4]
    (path.parent / "pictures").mkdir()
    for photo in photos:
        (path.parent / "pictures" / photo.name).write_bytes(photo.read_bytes())
    (path.parent / "secret.jpg").write_bytes(photos[0].read_bytes())
    (path.parent / "pictures" / "link.jpg").symlink_to(path.parent / "secret.jpg")
    (path.parent / "pictures" / "text.jpg").write_text("no picture")
    ids = [photo.name for photo in photos] + ["../secret.jpg", "link.jpg", "text.jpg", "a cup of coffee"]
    kinds = ["image"] * 7 + ["text"]
    vectors = np.concatenate([embedder.embed_images([*photos, *photos[:3]]), embedder.embed_texts([ids[-1]])])
    return write_embeddings(path, vectors, ids, kinds, **{"bundle": embedder.bundle.sha256, **metadata})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, embedder: Embedder) -> Path:
    made = tmp_path_factory.mktemp("collection")
    index_of(made / "index.parquet", embedder)
    return made


@pytest.fixture(scope="module")
def searched(serve: Any, folder: Path) -> Iterator[str]:
    with serve(Options(index=folder / "index.parquet", pictures=folder / "pictures")) as url:
        yield url


def test_search_gives_what_the_command_gives(searched: str, folder: Path, embedder: Embedder) -> None:
    query = embedder.embed_texts(["a cup of coffee"])[0]
    for kind in (None, "image", "text"):
        for k in (1, 3, 100):
            body = {"input": "a cup of coffee", "k": k, "kind": kind}
            hits = httpx.post(f"{searched}/v1/search", json=body).json()["hits"]
            expected = search(folder / "index.parquet", query, k, kind and [kind])
            assert [hit["row"] for hit in hits] == [hit.row for hit in expected]
            assert [hit["id"] for hit in hits] == [hit.id for hit in expected]
            np.testing.assert_allclose([hit["score"] for hit in hits], [hit.score for hit in expected], atol=1e-5)
    picture = base64.b64encode((folder / "secret.jpg").read_bytes()).decode()
    body = {"input": {"image": f"data:image/jpeg;base64,{picture}"}, "k": 1, "kind": "image"}
    (best,) = httpx.post(f"{searched}/v1/search", json=body).json()["hits"]
    assert best["row"] == 0 and best["score"] == pytest.approx(1, abs=1e-5)
    assert httpx.get(f"{searched}/v1/models").json()["data"][0]["index_rows"] == 8


def test_thumbnails_come_from_the_folder_and_from_nowhere_else(searched: str) -> None:
    hits = httpx.post(f"{searched}/v1/search", json={"input": "x", "k": 100}).json()["hits"]
    shown = {hit["row"]: hit["thumbnail"] for hit in hits}
    assert [row for row in sorted(shown) if shown[row]] == [0, 1, 2, 3, 6]
    for row in range(4):
        answer = httpx.get(searched + shown[row])
        with Image.open(io.BytesIO(answer.content)) as picture:
            assert picture.format == "JPEG" and max(picture.size) <= 560
    for row in ("4", "5", "6", "7", "8", "-1", "9" * 40, "x", "..%2fsecret.jpg", "٣"):
        assert httpx.get(f"{searched}/v1/thumbnails/{row}").status_code == 404, row


def test_without_a_folder_there_are_no_thumbnails(serve: Any, folder: Path, url: str) -> None:
    with serve(Options(index=folder / "index.parquet")) as searched:
        hits = httpx.post(f"{searched}/v1/search", json={"input": "x"}).json()["hits"]
        assert {hit["thumbnail"] for hit in hits} == {None}
        assert httpx.get(f"{searched}/v1/thumbnails/0").status_code == 404
        assert httpx.post(f"{searched}/v1/search", json={"input": "x", "k": 0}).status_code == 400
    assert httpx.post(f"{url}/v1/search", json={"input": "x"}).status_code == 404  # without an index


def test_an_index_of_another_making_is_refused(tmp_path: Path, embedder: Embedder, folder: Path) -> None:
    index = index_of(tmp_path / "other.parquet", embedder, bundle="0" * 64)
    with pytest.raises(BundleError, match="made with the bundle 0000"):
        Server(embedder, Options(index=index))
    (tmp_path / "x").mkdir()
    reduced = index_of(tmp_path / "x" / "pca.parquet", embedder, pca="f" * 64)
    with pytest.raises(PcaError, match="PCA vectors"):
        Server(embedder, Options(index=reduced))
    with pytest.raises(InputError, match="is no folder"):
        Server(embedder, Options(index=folder / "index.parquet", pictures=tmp_path / "absent"))
