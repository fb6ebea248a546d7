"""Small models and files for tests: CLIP-shaped, seeded, made on the spot."""

from __future__ import annotations

import dataclasses
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longclip_rt.model.architecture import VOCAB_SIZE, Architecture
from longclip_rt.weights.checkpoint import Checkpoint
from longclip_rt.weights.random import random_state_dict

# Two heads in one tower and one in the other; an MLP that is not four times as wide; 9 patches and a class token.
TINY = Architecture(
    image_size=24,
    patch_size=8,
    vision_width=128,
    vision_layers=2,
    text_width=64,
    text_layers=3,
    embed_dim=32,
    vision_mlp_width=192,
)


def tiny_checkpoint(seed: int = 0, **changes: Any) -> Checkpoint:
    """A checkpoint of `TINY`, or of a variation of it."""
    architecture = dataclasses.replace(TINY, **changes)
    return Checkpoint(random_state_dict(architecture, seed), architecture, "tiny", None, trained=True)


def tiny_tensors(seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    """The state dict of `tiny_checkpoint`, with OpenAI's names and one position table of 248 rows."""
    return random_state_dict(dataclasses.replace(TINY, **changes), seed)


def long_clip_tensors(seed: int = 0) -> dict[str, Tensor]:
    """A state dict as the Long-CLIP repository writes it: two position tables, which differ everywhere."""
    tensors = tiny_tensors(seed)
    second = torch.randn(tensors["positional_embedding"].shape, generator=torch.Generator().manual_seed(seed + 100))
    return tensors | {"positional_embedding_res": 0.01 * second}


def token_ids(
    lengths: list[int], width: int = 248, pad: int = 0, seed: int = 0, vocab_size: int = VOCAB_SIZE
) -> Tensor:
    """Texts of the given lengths in tokens (SOT and EOT included), int32 [B, width], padded behind."""
    sot, eot = vocab_size - 2, vocab_size - 1
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), width), pad, dtype=torch.int32)
    for row, length in enumerate(lengths):
        ids[row, 0] = sot
        ids[row, 1 : length - 1] = torch.randint(1, sot, (length - 2,), generator=generator, dtype=torch.int32)
        ids[row, length - 1] = eot
    return ids


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does to a listing of a repository's files, and to requests for one of them."""

    server: Any

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if self.server.refusal:
            status, code = self.server.refusal
            return self._send(status, b"{}", {"X-Error-Code": code} if code else {}, body)
        for repository, folder in self.server.repositories.items():
            if path == f"/api/models/{repository}":
                names = sorted(one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file())
                info = {
                    "id": repository,
                    "sha": self.server.commit,
                    "siblings": [{"rfilename": name} for name in names],
                }
                return self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
            prefix = f"/{repository}/resolve/"
            if path.startswith(prefix):
                revision, _, name = path.removeprefix(prefix).partition("/")
                if revision in ("main", self.server.commit) and (folder / name).is_file():
                    content = (folder / name).read_bytes()
                    headers = {
                        "ETag": f'"{name.replace("/", "-")}-{len(content)}"',
                        "X-Repo-Commit": self.server.commit,
                    }
                    return self._send(200, content, headers, body)
                return self._send(
                    404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.server.commit}, body
                )
        self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps stderr for the code under test."""


@contextmanager
def local_hub(repositories: dict[str, Path], refusal: tuple[int, str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serves folders as repositories of a hub on 127.0.0.1, or refuses everything with a status and error code.

    Yields the hub's address, and the list of requests, which grows as they come in.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.repositories, server.requests = repositories, []  # type: ignore[attr-defined]
    server.commit, server.refusal = "c" * 40, refusal  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.requests  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
