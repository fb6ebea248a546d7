from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from longclip_rt import Embedder
from longclip_rt.serving.app import create_app
from longclip_rt.serving.server import Options

DEFAULT = Options()
Serve = Callable[..., contextlib.AbstractContextManager[str]]


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """A real server on loopback, in a thread of this process."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            until = time.monotonic() + 20
            while httpx.get(f"{url}/ready").status_code != 200 and time.monotonic() < until:
                time.sleep(0.02)
            yield url
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def embedder(tiny_bundle: Path) -> Iterator[Embedder]:
    with Embedder.from_bundle(tiny_bundle, "openvino", "fp32") as opened:
        yield opened


@pytest.fixture(scope="session")
def serve(embedder: Embedder) -> Serve:
    """Starts a server of the small model with options."""
    return lambda options=DEFAULT, of=embedder: served(create_app(of, options))


@pytest.fixture(scope="session")
def url(serve: Serve) -> Iterator[str]:
    """A server with the default bounds that the tests share."""
    with serve() as address:
        yield address


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as opened:
        yield opened
