"""Runs the app with uvicorn: one process or several behind one port, ended by SIGTERM after what was begun."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from uvicorn.supervisors import Multiprocess

from longclip_rt.errors import OutputError
from longclip_rt.runtime import Embedder
from longclip_rt.serving.app import create_app
from longclip_rt.serving.server import Options
from longclip_rt.system.closing import closed_after

logger = logging.getLogger("longclip_rt")

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Model:
    """Which model a process opens, as `Embedder.from_bundle` takes it."""

    bundle: Path | None = None
    backend: str = "auto"
    precision: str = "auto"
    devices: tuple[int, ...] | None = None

    def open(self) -> Embedder:
        """The embedder."""
        return Embedder.from_bundle(self.bundle, self.backend, self.precision, devices=self.devices)


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        host: Address or name.
        port: 0 takes a free one.
        workers: Processes behind it, each with the whole model.
        grace: Seconds that begun requests have once SIGTERM came.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    grace: int = 30


def app_of(model: Model, options: Options) -> FastAPI:
    """The app with a model of its own, for a worker process."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    return create_app(model.open(), options)


def serve(model: Model, options: Options, address: Address) -> None:
    """Serves until SIGTERM or SIGINT, and returns once what was begun is answered or the grace time is over.

    Raises:
        LongClipError: The model cannot be opened, as in `Embedder.from_bundle` and `create_app`.
        OutputError: The address cannot be listened at.
    """
    if address.host not in _LOOPBACK and not options.key:
        logger.warning(
            "ANYONE who reaches %s can use this server: it listens beyond this machine, without an API key. Give one "
            "with --api-key-file.",
            address.host,
        )
    with _listening(address) as listening, closed_after(model.open()) as embedder:
        app = create_app(embedder, options)
        host, port = listening.getsockname()[:2]
        logger.info("serving %s at http://%s:%s", embedder.bundle.name, f"[{host}]" if ":" in host else host, port)
        settings = partial(
            uvicorn.Config,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=address.grace,
            limit_concurrency=4 * options.bounds.connections,  # idle ones too; the guard bounds requests, and answers
            ws="none",
        )
        if address.workers == 1:
            with _signals_ignored():
                uvicorn.Server(settings(app)).run(sockets=[listening])
            return
        embedder.close()  # it showed that the model can be opened; each worker opens its own
        with tempfile.TemporaryDirectory(prefix="longclip-metrics-") as folder:
            os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", folder)
            config = settings(partial(app_of, model, options), factory=True, workers=address.workers)
            Multiprocess(config, sockets=[listening]).run()


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """Lets uvicorn alone act on SIGTERM and SIGINT: once it has drained, it raises the signal again."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listening(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=2048)
    except OSError as error:
        where = f"{address.host}, port {address.port}"
        raise OutputError(f"The server cannot listen at {where}: {error.strerror}. Choose another --port.") from error
