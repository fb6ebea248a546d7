from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from longclip_rt import Embedder, load_embeddings
from longclip_rt.backends import remote
from longclip_rt.cli import main
from longclip_rt.errors import BackendError, BundleError
from longclip_rt.serving.bounds import Bounds
from longclip_rt.serving.server import Options

EXAMPLES = Path(__file__).parents[2] / "examples"
CLOSE = {"rtol": 0, "atol": 2e-5}


class Mocked(http.server.BaseHTTPRequestHandler):
    """Answers what the test says, one after the other, and then 200 for ever."""

    answers: ClassVar[list[tuple[int, dict[str, str], bytes]]] = []
    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("Authorization", ""))
        status, headers, body = self.answers.pop(0) if self.answers else (200, {}, b"{}")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *values: Any) -> None:
        pass


@pytest.fixture
def mocked() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mocked) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        Mocked.answers.clear()
        Mocked.seen.clear()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_server_stands_for_the_bundle(url: str, embedder: Embedder) -> None:
    texts = ["a red cup", "", "word " * 300, "with <end_of_text> in it"]
    photos = sorted((EXAMPLES / "photos").glob("*.jpg"))[:9]
    with Embedder.connect(url) as connected:
        np.testing.assert_allclose(connected.embed_texts(texts), embedder.embed_texts(texts), **CLOSE)
        np.testing.assert_allclose(connected.embed_images(photos), embedder.embed_images(photos), **CLOSE)
        assert connected.describe() == embedder.describe()
        with pytest.raises(BackendError, match="alone"):
            connected.backend.run("text", np.zeros((1, 2), np.int32), ["pooler_output"])
        with pytest.raises(BackendError, match="not normalised pixels"):
            size = connected.image_size
            connected.backend.run("image", np.zeros((1, 3, size, size), np.float32))


def test_embed_through_a_server(
    serve: Any, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a key, and with so small a queue that some requests are refused at first."""
    (tmp_path / "texts.txt").write_text("\n".join(f"picture {number}" for number in range(40)))
    monkeypatch.setenv("LONGCLIP_RT_API_KEY", "k")
    monkeypatch.setattr(remote, "_LONGEST_WAIT", 0.05)
    arguments = ["embed", str(tmp_path / "texts.txt"), "--texts", "--batch-size", "4", "-q"]
    with serve(Options(Bounds(queue=5, inputs=5), key="k")) as url:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "-o", str(tmp_path / "remote.parquet"), "--server", url])
        assert ended.value.code in (None, 0)
    found = load_embeddings(tmp_path / "remote.parquet")
    np.testing.assert_allclose(found.vectors, embedder.embed_texts(found.ids), **CLOSE)
    assert found.metadata["longclip_rt.backend"] == "openvino"
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--server", url, "--backend", "openvino"])
    assert ended.value.code == 2


def test_what_passes_is_tried_again_and_the_rest_is_not(mocked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    Mocked.answers += [(429, {"Retry-After": "7"}, b"{}"), (503, {}, b"x"), (502, {"Retry-After": "soon"}, b"")]
    connection = remote.Connection(mocked, "secret")
    assert connection.send("GET", "/").status_code == 200
    assert Mocked.seen == ["Bearer secret"] * 4
    assert 7 <= pauses[0] <= 10.5 and 0.5 <= pauses[1] <= 0.75 and 1 <= pauses[2] <= 1.5
    Mocked.answers += [(400, {}, json.dumps({"error": {"message": "no good"}}).encode())]
    with pytest.raises(BackendError, match="refuses the request: no good"):
        connection.send("GET", "/")
    Mocked.answers += [(503, {"Retry-After": "400"}, b"{}")] * 100
    impatient = remote.Connection(mocked, patience=5)
    with pytest.raises(BackendError, match="does not answer: HTTP status 503"):
        impatient.send("GET", "/")


@pytest.mark.parametrize(
    ("answers", "error", "said"),
    [
        ([{}], BackendError, "is not a server of longclip-rt"),
        ([{"data": [{"id": "gpt"}]}], BackendError, "is not a server of longclip-rt"),
        ([{"data": [{"bundle": "../x", "backend": "", "batch_size": 1, "concurrency": 1}]}], BackendError, "no hash"),
        ([{"data": [{"bundle": "ab", "backend": "", "batch_size": 1, "concurrency": 1}]}], BundleError, "bundle"),
    ],
)
def test_a_stranger_is_refused(mocked: str, answers: list[Any], error: type[Exception], said: str) -> None:
    Mocked.answers += [(200, {}, json.dumps(answer).encode()) for answer in answers]
    with pytest.raises(error, match=said):
        Embedder.connect(mocked)


@pytest.mark.parametrize("url", ["ftp://x", "no address", "http://[x", ""])
def test_what_is_no_address_is_a_sentence(url: str) -> None:
    with pytest.raises(BackendError, match="no address of a server"):
        Embedder.connect(url)


def test_a_server_that_is_not_there(mocked: str) -> None:
    with pytest.raises(BackendError, match="Is it running"):
        Embedder.connect("http://127.0.0.1:1", patience=0.1)
