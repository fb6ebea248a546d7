"""A bundle that a `longclip-rt serve` runs: texts are tokenized and images cropped here, and encoded there."""

from __future__ import annotations

import io
import logging
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import EMBEDDINGS, Backend, Float32
from longclip_rt.bundle.bundle import TOKENIZER, Bundle, bundles_home
from longclip_rt.bundle.manifest import MANIFEST, read_fields
from longclip_rt.errors import BackendError, BundleError
from longclip_rt.system.files import sha256_of_file, write_text_atomically

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger("longclip_rt")

_RAW = "application/octet-stream"
# What passes: too many requests, a restart, a proxy without its server.
_PASSING = (429, 502, 503, 504)
_LONGEST_WAIT = 30.0


class Connection:
    """Requests to one server, tried again where the fault may pass.

    Args:
        url: The server's address, such as `http://127.0.0.1:8000`.
        key: Its API key; empty: none.
        patience: Seconds after which a request is given up.
    """

    def __init__(self, url: str, key: str = "", patience: float = 300.0) -> None:
        import httpx

        self.url, self._patience = url.rstrip("/"), patience
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if not _is_address(self.url):
            raise BackendError(f"{url!r} is no address of a server. Write http://HOST:PORT.")
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(120.0, connect=10.0))

    def send(self, method: str, path: str, **content: Any) -> httpx.Response:
        """The answer to a request, after as many tries as it takes.

        Raises:
            BackendError: The server refuses it, or cannot be reached for as long as the patience lasts.
        """
        import httpx

        until = time.monotonic() + self._patience
        wait = 0.25
        while True:
            asked = 0.0
            try:
                answer = self._client.request(method, path, **content)
                if answer.status_code not in _PASSING:
                    break
                trouble = _message(answer)
                after = answer.headers.get("Retry-After", "")
                asked = float(after) if after.isascii() and after.isdigit() else 0.0
            except httpx.TransportError as error:
                trouble = str(error) or type(error).__name__
            # Clients that were refused together must not come back together.
            pause = min(_LONGEST_WAIT, max(wait, asked)) * random.uniform(1, 1.5)
            if time.monotonic() + pause > until:
                raise BackendError(f"The server {self.url} does not answer: {trouble}. Is it running?")
            logger.debug("%s: %s; again in %.1f s", self.url, trouble, pause)
            time.sleep(pause)
            wait *= 2
        if answer.status_code != 200:
            raise BackendError(f"The server {self.url} refuses the request: {_message(answer)}")
        return answer

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # brackets that do not close, a port that is no number
        return False


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {answer.status_code}"


def remote_bundle(connection: Connection) -> tuple[Bundle, Mapping[str, Any]]:
    """The served bundle without its graphs, kept in the cache folder, and what the server says of the model.

    Raises:
        BackendError: The server does not answer, or is none of `longclip-rt serve`.
        BundleError: What it sends is no bundle.
    """
    told = connection.send("GET", "/v1/models").json()
    try:
        model = told["data"][0]
        identity = str(model["bundle"])
        model["backend"], model["batch_size"], model["concurrency"]
    except (KeyError, IndexError, TypeError) as error:
        raise BackendError(f"{connection.url} is not a server of longclip-rt serve.") from error
    if not (identity.isascii() and identity.isalnum()):
        raise BackendError(f"{connection.url} names its bundle {identity!r}, which is no hash.")
    folder = bundles_home().parent / "served" / identity
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, TOKENIZER):
        if not (folder / name).is_file():
            write_text_atomically(folder / name, connection.send("GET", f"/v1/bundle/{name}").text)
    bundle = Bundle(folder, read_fields(folder, {"all": [TOKENIZER], "fp32": [], "fp16": [], "pca": []}))
    expected = bundle.manifest["files"][TOKENIZER]["sha256"]
    if bundle.sha256 != identity or sha256_of_file(bundle.file(TOKENIZER)) != expected:
        for name in (MANIFEST, TOKENIZER):
            bundle.file(name).unlink()
        raise BundleError(f"What {connection.url} sent of its bundle is damaged. Try again.")
    return bundle, model


class RemoteBackend(Backend):
    """The encoders of a server. The vectors' metadata name the server's backend, version, precision and device.

    Args:
        connection: To the server; closed with the backend.
        bundle: What `remote_bundle` gave.
        model: Likewise.
    """

    takes_crops = True
    opens_in_forks = True

    def __init__(self, connection: Connection, bundle: Bundle, model: Mapping[str, Any]) -> None:
        super().__init__(bundle, str(model["precision"]))
        self.name = str(model["backend"])
        self._connection, self._model = connection, model
        self.batch_size, self.pad_multiple = int(model["batch_size"]), int(model["pad_multiple"])
        # One more on its way than the server encodes at a time.
        self.concurrency = int(model["concurrency"]) + 1
        self._pool = ThreadPoolExecutor(2, "longclip-png")

    @property
    def version(self) -> str:
        """Of the server's backend."""
        return str(self._model["backend_version"])

    @property
    def device(self) -> str:
        """The server's."""
        return str(self._model["device"])

    @property
    def buckets(self) -> tuple[int, ...]:
        """The server's."""
        return tuple(self._model["buckets"])

    def prepare(self) -> None:
        """Does nothing: the server is prepared."""

    def _run(self, tower: str, inputs: NDArray[np.generic], outputs: Sequence[str]) -> list[Float32]:
        if list(outputs) != [EMBEDDINGS[tower]]:
            raise BackendError(f"A server gives {EMBEDDINGS[tower]} alone; got {', '.join(outputs)}.")
        if tower == "text":
            content: dict[str, Any] = {"json": {"input": [self._unpadded(row) for row in inputs]}}
        elif inputs.dtype != np.uint8:
            raise BackendError("A server takes cropped images, uint8 [B, n, n, 3], and not normalised pixels.")
        else:
            pictures = self._pool.map(_png, inputs)
            content = {"files": [("image", ("crop.png", picture, "image/png")) for picture in pictures]}
        answer = self._connection.send("POST", "/v1/embeddings", headers={"Accept": _RAW}, **content)
        vectors = np.frombuffer(answer.content, "<f4")
        if vectors.size != len(inputs) * self.bundle.architecture.embed_dim:
            raise BackendError(
                f"{self._connection.url} answered with {vectors.size} numbers, which are too few or many."
            )
        return [vectors.reshape(len(inputs), -1).astype(np.float32)]

    def _unpadded(self, row: NDArray[np.generic]) -> list[int]:
        """The ids up to the first end token, at which the tower pools; those after it cannot reach the result."""
        ids: list[int] = row.tolist()
        eot = self.bundle.architecture.eot_id
        return ids[: ids.index(eot) + 1] if eot in ids else ids

    def _close(self) -> None:
        self._pool.shutdown()
        self._connection.close()


def _png(crop: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(crop).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
