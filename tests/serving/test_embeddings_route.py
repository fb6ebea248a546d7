from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from longclip_rt import Embedder, load_bundle
from longclip_rt.pca.basis import Basis, Pca

PHOTOS = sorted((Path(__file__).parents[2] / "examples" / "photos").glob("*.jpg"))[:3]
TEXTS = ["a red cup", "ein Haus am See", "a long description of a street, " * 60]
CLOSE = {"rtol": 0, "atol": 2e-5}  # fp32 in batches of another size


def uri(path: Path) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()


def vectors(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([one["embedding"] for one in answer.json()["data"]], np.float32)


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()["error"]
    assert set(body) == {"message", "type", "param", "code"} and "Traceback" not in body["message"]
    return body  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def text_vectors(embedder: Embedder) -> np.ndarray:
    return embedder.embed_texts(TEXTS)


@pytest.fixture(scope="module")
def image_vectors(embedder: Embedder) -> np.ndarray:
    return embedder.embed_images(PHOTOS)


def test_openais_client_works_unchanged(url: str, text_vectors: np.ndarray, embedder: Embedder) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        (model,) = client.models.list().data
        for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            answer = client.embeddings.create(input=TEXTS, model=model.id, **form)  # type: ignore[call-overload]
            found = [one.embedding for one in answer.data]
            if form.get("encoding_format") == "base64":
                found = [np.frombuffer(base64.b64decode(one), "<f4") for one in found]
            np.testing.assert_allclose(np.array(found, np.float32), text_vectors, **CLOSE)
            lengths = [len(one.ids) for one in embedder.tokenizer.encode(TEXTS)]
            assert answer.usage.prompt_tokens == sum(lengths)
            assert answer.model_extra["truncated"][0]["index"] == 2 and len(answer.model_extra["truncated"]) == 1
        one = client.embeddings.create(input=TEXTS[0], model=model.id)
        np.testing.assert_allclose(one.data[0].embedding, text_vectors[0], **CLOSE)
        pictures = client.embeddings.create(
            input=[uri(path) for path in PHOTOS], model=model.id, extra_body={"modality": "image"}
        )
        assert len(pictures.data) == 3 and pictures.usage.prompt_tokens == 0
        with pytest.raises(openai.NotFoundError, match="There is no model"):
            client.embeddings.create(input="a", model="text-embedding-3-small")
        with pytest.raises(openai.BadRequestError, match="dimensions is 5"):
            client.embeddings.create(input="a", model=model.id, dimensions=5)


def test_token_lists(client: httpx.Client, embedder: Embedder, text_vectors: np.ndarray) -> None:
    framed = [one.ids.tolist() for one in embedder.tokenizer.encode(TEXTS)]
    bare = [ids[1:-1] for ids in framed]
    for lists in (framed, bare):
        np.testing.assert_allclose(vectors(client.post("/v1/embeddings", json={"input": lists})), text_vectors, **CLOSE)
    single = client.post("/v1/embeddings", json={"input": bare[0]})
    np.testing.assert_allclose(vectors(single), text_vectors[:1], **CLOSE)
    long = client.post("/v1/embeddings", json={"input": [bare[0] * 200]}).json()
    assert long["truncated"] == [{"index": 0, "tokens": 200 * len(bare[0]) + 2}]
    assert long["usage"]["prompt_tokens"] == embedder.context_length
    bad = error(client.post("/v1/embeddings", json={"input": [[1], [10**9]]}), 422)
    assert bad["code"] == "bad_token_ids" and bad["param"] == "input[1]"


def test_images_in_every_form(client: httpx.Client, image_vectors: np.ndarray, text_vectors: np.ndarray) -> None:
    objects = client.post("/v1/embeddings", json={"input": [{"image": uri(path)} for path in PHOTOS]})
    np.testing.assert_allclose(vectors(objects), image_vectors, **CLOSE)
    mixed = client.post("/v1/embeddings", json={"input": [{"text": TEXTS[0]}, {"image": uri(PHOTOS[0])}, TEXTS[1]]})
    expected = np.stack([text_vectors[0], image_vectors[0], text_vectors[1]])
    np.testing.assert_allclose(vectors(mixed), expected, **CLOSE)
    infinity = client.post("/v1/embeddings", json={"input": [uri(path) for path in PHOTOS], "modality": "image"})
    np.testing.assert_allclose(vectors(infinity), image_vectors, **CLOSE)
    files = [("image", (path.name, path.read_bytes(), "image/jpeg")) for path in PHOTOS]
    form = client.post("/v1/embeddings", files=files, data={"text": TEXTS[0], "encoding_format": "float"})
    np.testing.assert_allclose(vectors(form), np.stack([text_vectors[0], *image_vectors]), **CLOSE)


def test_raw_numbers(client: httpx.Client, text_vectors: np.ndarray) -> None:
    answer = client.post("/v1/embeddings", json={"input": TEXTS}, headers={"Accept": "application/octet-stream"})
    shape = tuple(map(int, answer.headers["X-Embeddings-Shape"].split(",")))
    np.testing.assert_allclose(np.frombuffer(answer.content, "<f4").reshape(shape), text_vectors, **CLOSE)
    assert answer.headers["X-Truncated-Inputs"] == "1"


def test_similarity(client: httpx.Client, text_vectors: np.ndarray, image_vectors: np.ndarray) -> None:
    body = {"queries": TEXTS, "candidates": [{"image": uri(path)} for path in PHOTOS[:2]]}
    answer = client.post("/v1/similarity", json=body).json()
    np.testing.assert_allclose(answer["scores"], text_vectors @ image_vectors[:2].T, rtol=0, atol=5e-5)
    assert [one["index"] for one in answer["truncated"]["queries"]] == [2]
    assert answer["truncated"]["candidates"] == []


def test_words_and_their_tokens(client: httpx.Client, embedder: Embedder) -> None:
    for text in ("A red  cup,\nand a house!", "", TEXTS[2]):
        answer = client.post("/v1/tokens", json={"text": text}).json()
        assert answer["tokens"] == embedder.tokenizer.encode([text])[0].length
        assert [one["word"] for one in answer["words"]] == text.split()
    assert answer["context_length"] == embedder.context_length


def test_the_bundles_pca_gives_fewer_dimensions(serve: Any, tiny_bundle: Path, embedder: Embedder) -> None:
    rng = np.random.default_rng(0)
    components = np.linalg.qr(rng.standard_normal((32, 32)))[0][:, :8]
    pca = Pca({"joint": Basis(0.01 * rng.standard_normal(32), components, np.linspace(2, 1, 32), 100)})
    bundle = load_bundle(tiny_bundle)
    bundle.__dict__["pca"] = pca
    embedder = Embedder(bundle, embedder.backend)
    with serve(of=embedder) as url:
        whole = embedder.embed_texts(TEXTS)
        reduced = embedder.with_pca(pca).embed_texts(TEXTS)
        for dimensions, expected in ((None, whole), (32, whole), (8, reduced)):
            answer = httpx.post(f"{url}/v1/embeddings", json={"input": TEXTS, "dimensions": dimensions})
            np.testing.assert_allclose(vectors(answer), expected, rtol=0, atol=5e-5)
        three = vectors(httpx.post(f"{url}/v1/embeddings", json={"input": TEXTS, "dimensions": 3}))
        shorter = reduced[:, :3] / np.linalg.norm(reduced[:, :3], axis=1, keepdims=True)
        np.testing.assert_allclose(three, shorter, rtol=0, atol=5e-5)
        bad = error(httpx.post(f"{url}/v1/embeddings", json={"input": TEXTS, "dimensions": 9}), 400)
        assert "32 and 1 to 8" in bad["message"]
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["pca_dimensions"] == 8


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "truncated"),
        (b"\xff\xfe", 400, "expected here"),
        (b'{"input": "\\ud800"}', 400, "expected here"),
        (b"[" * 100_000, 400, "expected here"),
        (b'{"a": ' + b"[" * 100_000, 400, "expected here"),
        (b'{"input": 1e400}', 400, "expected here"),
        (b'{"input": [1' + b"0" * 400 + b"]}", 400, "out of range"),
        (b'{"input": "a", "dimensions": "x"}', 400, "`float"),
        (b'{"input": ""}', 400, "length >= 1"),
        (b'{"input": []}', 400, "length >= 1"),
        (b'{"input": ["a", {"text": "b", "image": "c"}]}', 422, "either"),
        (b'{"input": [{"text": "a", "video": "b"}]}', 400, "unknown field"),
        (b'{"input": [{"image": "http://127.0.0.1/a.png"}]}', 422, "fetches no URLs"),
        (b'{"input": [{"image": "file:///etc/passwd"}]}', 422, "fetches no URLs"),
        (b'{"input": [{"image": "data:image/png;base64,A"}]}', 422, "not base64"),
        (b'{"input": [{"image": "data:image/png;base64,AAAA"}]}', 422, "is not an image"),
        (b'{"input": "a", "encoding_format": "hex"}', 400, "hex"),
        (b'{"input": "a", "modality": "audio"}', 400, "audio"),
        (b'{"input": "&#' + b"9" * 5000 + b';"}', 422, "cannot be tokenized"),
    ],
)
def test_bad_requests_are_answered_in_a_sentence(client: httpx.Client, body: bytes, status: int, said: str) -> None:
    answer = client.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    assert said in error(answer, status)["message"]
    assert client.get("/health").status_code == 200


def test_a_bomb_and_a_bad_form(client: httpx.Client) -> None:
    buffer = io.BytesIO()
    Image.new("1", (1, 1)).save(buffer, "PNG")
    head = struct.pack(">4sIIBBBBB", b"IHDR", 60_000, 40_000, 1, 0, 0, 0, 0)
    picture = buffer.getvalue()
    picture = picture[:12] + head + struct.pack(">I", zlib.crc32(head)) + picture[33:]
    bomb = client.post("/v1/embeddings", files={"image": picture})
    assert "pixels" in error(bomb, 422)["message"]
    assert "is not an image" in error(client.post("/v1/embeddings", files={"image": b"\0" * 100}), 422)["message"]
    error(client.post("/v1/embeddings", files={"picture": b"x"}), 422)
    error(client.post("/v1/embeddings", files={"image": b""}), 422)
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    for body, status in ((b"", 422), (b"--x\r\n", 422), (b"q", 400), (b"--x\r\nContent-Disposition: q\r\n\r\nq", 400)):
        error(client.post("/v1/embeddings", content=body, headers=form), status)
    error(client.post("/v1/embeddings", content=b"a", headers={"Content-Type": "multipart/form-data"}), 400)
    error(client.post("/v1/embeddings", content=json.dumps({"input": "a"})), 415)
    error(client.get("/v1/embeddings"), 405)
    error(client.get("/v1/bundle/text.onnx"), 404)
