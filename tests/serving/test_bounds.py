from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from longclip_rt import Embedder
from longclip_rt.serving.bounds import Bounds
from longclip_rt.serving.server import Options


class Held(Embedder):
    """An embedder whose encoder stands still while its gate is shut."""

    gate = threading.Event()

    def encode_tokens(self, ids: np.ndarray) -> np.ndarray:
        assert self.gate.wait(20)
        return super().encode_tokens(ids)


@pytest.fixture
def held(embedder: Embedder) -> Iterator[Held]:
    opened = Held(embedder.bundle, embedder.backend)
    opened.gate.set()
    yield opened
    opened.gate.set()


def ask(url: str, texts: list[str], seconds: float = 20, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/embeddings", json={"input": texts}, timeout=seconds, headers=headers)


def value(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return float(next((line.split()[-1] for line in lines if line.startswith(f"{name} ")), 0))


def until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def refused(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert status not in (429, 503) or int(answer.headers["Retry-After"]) >= 1


def test_a_full_queue_answers_at_once_and_recovers(serve: Any, held: Held) -> None:
    with serve(Options(Bounds(queue=4)), held) as url, ThreadPoolExecutor(8) as pool:
        held.gate.clear()
        first = [pool.submit(ask, url, [f"{number} a", f"{number} b"]) for number in range(2)]
        until(lambda: value(url, "longclip_admitted_inputs") == 4)
        refused(ask(url, ["c"]), 429, "queue_full")  # while nothing can be encoded
        held.gate.set()
        assert [each.result().status_code for each in first] == [200, 200]
        assert ask(url, ["c"]).status_code == 200
        assert value(url, 'longclip_errors_total{code="queue_full"}') == 1


def test_ten_times_the_load_is_answered_right_or_refused(serve: Any, embedder: Embedder) -> None:
    """What is let in is right; the rest hears 429 or 503, with the time after which to come again."""
    texts = [f"picture {number} of a row of houses" for number in range(200)]
    expected = embedder.embed_texts(texts)
    with serve(Options(Bounds(queue=20, connections=16))) as url, ThreadPoolExecutor(40) as pool:
        with httpx.Client(base_url=url, limits=httpx.Limits(max_connections=40), timeout=20) as client:
            answers = list(pool.map(lambda text: client.post("/v1/embeddings", json={"input": text}), texts))
        for answer, vector in zip(answers, expected, strict=True):
            if answer.status_code == 200:
                np.testing.assert_allclose(answer.json()["data"][0]["embedding"], vector, rtol=0, atol=2e-5)
            else:
                assert answer.status_code in (429, 503) and int(answer.headers["Retry-After"]) >= 1
        assert {answer.status_code for answer in answers} >= {200}
        assert ask(url, ["a"]).status_code == 200


def test_more_requests_than_are_taken(serve: Any, held: Held) -> None:
    with serve(Options(Bounds(connections=1)), held) as url, ThreadPoolExecutor(1) as pool:
        held.gate.clear()
        first = pool.submit(ask, url, ["a"])
        until(lambda: value(url, "longclip_admitted_inputs") == 1)
        refused(ask(url, ["b"]), 503, "too_many_requests")
        held.gate.set()
        assert first.result().status_code == 200


def test_a_request_that_takes_too_long_leaves_the_queue(serve: Any, held: Held) -> None:
    with serve(Options(Bounds(seconds=0.3)), held) as url:
        held.gate.clear()
        refused(ask(url, ["a"]), 503, "timeout")
        assert value(url, "longclip_admitted_inputs") == 0
        held.gate.set()
        assert ask(url, ["a"]).status_code == 200


def test_a_client_that_hangs_up_leaves_the_queue(serve: Any, held: Held) -> None:
    with serve(of=held) as url:
        held.gate.clear()
        with pytest.raises(httpx.ReadTimeout):
            ask(url, [f"{number}" for number in range(300)], 0.3)
        until(lambda: value(url, "longclip_admitted_inputs") == 0)
        assert value(url, 'longclip_queue_inputs{kind="text"}') == 0
        assert value(url, 'longclip_errors_total{code="client_gone"}') == 1
        held.gate.set()


def test_bodies_and_inputs(serve: Any) -> None:
    with serve(Options(Bounds(body_bytes=2000, inputs=3, pixels=100, seconds=0.5))) as url:
        refused(ask(url, ["a"] * 4), 400, "too_many_inputs")
        refused(ask(url, ["a" * 3000]), 413, "body_too_large")
        chunked = httpx.post(f"{url}/v1/embeddings", content=iter([b" " * 1000] * 3))
        refused(chunked, 413, "body_too_large")
        host, port = url.removeprefix("http://").split(":")
        for beginning in (b'{"input"', b""):  # and then nothing more
            with socket.create_connection((host, int(port)), timeout=10) as slow:
                slow.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n" + beginning)
                assert slow.recv(1000).startswith(b"HTTP/1.1 503")
        huge = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=10) as liar, contextlib.suppress(ConnectionError):
            liar.sendall(huge)
            assert liar.recv(1000)[9:12] in (b"413", b"400")
        assert ask(url, ["a"]).status_code == 200


def test_the_key(serve: Any) -> None:
    with serve(Options(key="sésame".encode().hex())) as url:
        key = "sésame".encode().hex()
        assert ask(url, ["a"], Authorization=f"Bearer {key}").status_code == 200
        for given in ({}, {"Authorization": "Bearer x"}, {"Authorization": key}, {"Authorization": f"Bearer {key}x"}):
            refused(ask(url, ["a"], **given), 401, "invalid_api_key")
            assert httpx.get(f"{url}/metrics", headers=given).status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        assert "access-control-allow-origin" not in ask(url, ["a"], Origin="http://x").headers


def test_a_failing_encoder_is_an_error_without_a_traceback(
    serve: Any, embedder: Embedder, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Embedder):
        def encode_crops(self, crops: np.ndarray) -> np.ndarray:
            return super().encode_crops(crops)

        def encode_tokens(self, ids: np.ndarray) -> np.ndarray:
            if ids.shape[0] * ids.shape[1] > 8:
                raise RuntimeError("secret path /etc")
            return super().encode_tokens(ids)

    with serve(of=Failing(embedder.bundle, embedder.backend)) as url:
        answer = ask(url, ["a", "b", "c"])
        refused(answer, 500, "internal_error")
        assert "secret" not in answer.text and "secret path" in caplog.text
        assert ask(url, ["a"]).status_code == 200


def test_many_mixed_requests_at_once(url: str, embedder: Embedder) -> None:
    """A short form of benchmarks/serving.py: every answer is the offline vector."""
    texts = [" ".join(["word"] * (1 + number * 7 % 90)) + f" {number}" for number in range(240)]
    expected = embedder.embed_texts(texts)
    parts = [list(range(start, min(240, start + 1 + start % 11))) for start in range(0, 240, 5)]

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            asked = ([texts[index] for index in part] for part in parts)
            return await asyncio.gather(*(client.post("/v1/embeddings", json={"input": each}) for each in asked))

    for part, answer in zip(parts, asyncio.run(run()), strict=True):
        found = [one["embedding"] for one in answer.json()["data"]]
        np.testing.assert_allclose(found, expected[part], rtol=0, atol=2e-5)
