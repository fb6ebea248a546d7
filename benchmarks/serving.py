"""Does the server reach the offline rate, does it stay upright under ten times the load, and how long does one wait?

    python benchmarks/serving.py --bundle demo/vit-b-16

A real `longclip-rt serve` on loopback, in a process of its own; the clients are in this one and share its cores.

- "offline": `Embedder.embed_texts` and `embed_images` on all inputs in one call, in this process, while the server is
  idle. "served": the same inputs, as requests of 1 to 64 texts or 1 to 4 photographs from concurrent clients, token
  lists and raw numbers where the row says so. They take turns. Every served vector is compared with the offline one.
- "overload": ten times as many clients as the queue has room for, each asking again at once; "right" counts answers
  that equal the offline vector, and the times are those of the requests that were let in.
- "lone": one text at a time on an idle server; "beside a large one": one text while a request of 1,024 is served.
- "soak": mixed requests for `--soak` seconds, some of whose clients hang up in the middle.

Memory is the server's resident set at the beginning and the end. Writes results/serving.csv.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from common import median_ratio, rates_in_turns, save_table

from longclip_rt import Embedder
from longclip_rt.bundle.samples import example_photos

WORDS = ("red", "cup", "wooden table", "two small birds", "long shadow of a tree", "beside the window", "in the light")
RAW = {"Accept": "application/octet-stream"}
CLIENTS = 32
_WAIT = '{kind="text",stage="wait"}'
Ask = Callable[[httpx.AsyncClient], Awaitable[None]]


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 5 to 200 words, most of them short."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=min(200, 5 + int(rng.expovariate(1 / 30))))) for _ in range(count)]


class Running:
    """A server process."""

    def __init__(self, bundle: Path, *options: str) -> None:
        command = [sys.executable, "-m", "longclip_rt", "serve", "--bundle", str(bundle), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        found = next(filter(None, (re.search(r"http://\S+", line) for line in self.process.stderr)))
        self.url = found[0]
        atexit.register(self.process.kill)
        while httpx.get(f"{self.url}/ready").status_code != 200:
            time.sleep(0.1)

    def mib(self) -> float:
        """Its resident memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def waited(self) -> tuple[float, float]:
        """Seconds that texts waited for their batch so far, and how many texts."""
        page = httpx.get(f"{self.url}/metrics").text.splitlines()
        starts = (f"longclip_stage_seconds_{what}{_WAIT}" for what in ("sum", "count"))
        total, count = (float(next(line.split()[1] for line in page if line.startswith(start))) for start in starts)
        return total, count

    def stop(self) -> None:
        """Ends it as a service manager does."""
        self.process.terminate()
        assert self.process.wait(60) == 0


def at_once(url: str, asks: Sequence[Ask], clients: int) -> None:
    """Runs requests from concurrent clients."""

    async def run() -> None:
        waiting = list(reversed(asks))
        limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

            async def one() -> None:
                while waiting:
                    await waiting.pop()(client)

            async with asyncio.TaskGroup() as group:
                for _ in range(clients):
                    group.create_task(one())

    asyncio.run(run())


class Checked:
    """Requests whose answers are compared with offline vectors, and counted."""

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.right = self.wrong = self.refused = 0
        self.worst = 0.0
        self.seconds: list[float] = []
        self.answered: list[float] = []

    def ask(self, expected: np.ndarray, **content: Any) -> Ask:
        """A request for raw vectors [n, D]."""

        async def send(client: httpx.AsyncClient) -> None:
            started = time.perf_counter()
            answer = await client.post("/v1/embeddings", headers=RAW, **content)
            took = time.perf_counter() - started
            self.answered.append(took)
            if answer.status_code in (429, 503):
                assert int(answer.headers["Retry-After"]) >= 1
                self.refused += 1
                return
            assert answer.status_code == 200, answer.text
            self.seconds.append(took)
            found = np.frombuffer(answer.content, "<f4").reshape(expected.shape)
            error = float(np.abs(found - expected).max())
            self.worst = max(self.worst, error)
            self.right += error <= self.bound
            self.wrong += error > self.bound

        return send


def parts_of(count: int, largest: int, seed: int = 1) -> list[range]:
    """Cuts `count` inputs into requests of 1 to `largest`."""
    rng = random.Random(seed)
    parts, start = [], 0
    while start < count:
        stop = min(count, start + rng.randint(1, largest))
        parts.append(range(start, stop))
        start = stop
    return parts


def percentile(seconds: Sequence[float], share: float) -> str:
    """In milliseconds."""
    return f"{1000 * float(np.quantile(seconds, share)):.1f}" if seconds else ""


def main() -> None:
    """Measures and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak", type=float, default=600, metavar="SECONDS")
    parser.add_argument("--bound", type=float, default=1e-2, help="Largest difference of a number in a right vector.")
    given = parser.parse_args()
    rows: list[dict[str, object]] = []

    def note(case: str, what: str, value: object) -> None:
        rows.append({"case": case, "what": what, "value": value})
        print(case, what, value, flush=True)

    lines = texts(given.texts)
    photos = [example_photos()[number % len(example_photos())].read_bytes() for number in range(given.photos)]
    embedder = Embedder.from_bundle(given.bundle)
    server = Running(given.bundle)
    text_vectors, image_vectors = embedder.embed_texts(lines), embedder.embed_images(photos)
    note("setting", "backend", f"{embedder.backend.name} {embedder.backend.precision}")
    checked = Checked(given.bound)

    def asks(kind: str) -> list[Ask]:
        if kind == "texts":
            return [
                checked.ask(text_vectors[part], json={"input": [lines[index] for index in part]})
                for part in parts_of(len(lines), 64)
            ]
        return [
            checked.ask(image_vectors[part], files=[("image", photos[index]) for index in part])
            for part in parts_of(len(photos), 4)
        ]

    for kind, items, offline in (
        ("texts", len(lines), lambda: embedder.embed_texts(lines)),
        ("photographs", len(photos), lambda: embedder.embed_images(photos)),
    ):
        served = asks(kind)
        runs = {
            "offline": (offline, items),
            "served": (lambda served=served: at_once(server.url, served, CLIENTS), items),
        }
        rates = rates_in_turns(runs, given.rounds)
        for way, rate in rates.items():
            note(kind, f"{way}, a second", f"{statistics.median(rate):.2f}")
        note(kind, "served by offline (target 0.90)", f"{median_ratio(rates['served'], rates['offline']):.3f}")
    note("answers", "right, wrong, refused", f"{checked.right}, {checked.wrong}, {checked.refused}")
    note("answers", "largest difference of a number", f"{checked.worst:.2g}")

    lone = Checked(given.bound)
    before = server.waited()
    at_once(server.url, [lone.ask(text_vectors[:1], json={"input": lines[0]})] * 200, 1)
    after = server.waited()
    waited = (after[0] - before[0]) / (after[1] - before[1])
    note("lone", "wait for the batch, ms, mean (bound 5)", f"{1000 * waited:.2f}")
    alone = []
    ids = embedder.tokenizer.encode([lines[0]])[0].ids[None]
    for _ in range(200):
        started = time.perf_counter()
        embedder.encode_tokens(ids)
        alone.append(time.perf_counter() - started)
    note("lone", "served, ms, p50 and p99", f"{percentile(lone.seconds, 0.5)}, {percentile(lone.seconds, 0.99)}")
    note("lone", "encoder alone, ms, p50 and p99", f"{percentile(alone, 0.5)}, {percentile(alone, 0.99)}")
    large = Checked(given.bound)
    beside = Checked(given.bound)
    many = [lines[number % len(lines)] for number in range(1024)]
    expected = text_vectors[[number % len(lines) for number in range(1024)]]
    at_once(
        server.url,
        [large.ask(expected, json={"input": many}), *[beside.ask(text_vectors[:1], json={"input": lines[0]})] * 10],
        2,
    )
    note("beside a large one", "the one of 1,024, ms", percentile(large.seconds, 0.5))
    note(
        "beside a large one",
        "one text, ms, p50 and largest",
        f"{percentile(beside.seconds, 0.5)}, {percentile(beside.seconds, 1)}",
    )
    server.stop()

    server = Running(given.bundle, "--max-queue", "64", "--max-requests", "64")
    over = Checked(given.bound)
    flood = [
        over.ask(text_vectors[part], json={"input": [lines[at] for at in part]}) for part in parts_of(len(lines), 4)
    ]
    at_once(server.url, flood[:50], 8)
    at_first = server.mib()
    over = Checked(given.bound)
    flood = [
        over.ask(text_vectors[part], json={"input": [lines[at] for at in part]}) for part in parts_of(len(lines), 4)
    ]
    at_once(server.url, flood * 10, 640)
    note("overload", "right, wrong, refused", f"{over.right}, {over.wrong}, {over.refused}")
    note("overload", "let in, ms, p50 and p99", f"{percentile(over.seconds, 0.5)}, {percentile(over.seconds, 0.99)}")
    note("overload", "memory before and after, MiB", f"{at_first:.0f}, {server.mib():.0f}")
    server.stop()

    server = Running(given.bundle)
    soaked = Checked(given.bound)
    at_once(server.url, asks("texts")[:40], 8)
    at_first = server.mib()
    until = time.monotonic() + given.soak
    mixed = [
        *(
            soaked.ask(text_vectors[part], json={"input": [lines[at] for at in part]})
            for part in parts_of(len(lines), 8)
        ),
        *(
            soaked.ask(image_vectors[part], files=[("image", photos[at]) for at in part])
            for part in parts_of(len(photos), 2)
        ),
    ]
    random.Random(2).shuffle(mixed)
    gone = 0

    async def hang_up(client: httpx.AsyncClient) -> None:
        nonlocal gone
        try:
            await client.post("/v1/embeddings", json={"input": lines[:64]}, timeout=httpx.Timeout(5, read=0.02))
        except httpx.TimeoutException:
            gone += 1

    while time.monotonic() < until:
        at_once(server.url, [*mixed[:200], *[hang_up] * 5], 16)
        mixed = mixed[200:] + mixed[:200]
    note("soak", "seconds", f"{given.soak:g}")
    note("soak", "right, wrong, refused, hung up", f"{soaked.right}, {soaked.wrong}, {soaked.refused}, {gone}")
    note("soak", "ms, p50 and p99", f"{percentile(soaked.seconds, 0.5)}, {percentile(soaked.seconds, 0.99)}")
    note("soak", "memory before and after, MiB", f"{at_first:.0f}, {server.mib():.0f}")
    waiting = httpx.get(f"{server.url}/metrics").text
    assert "longclip_admitted_inputs 0.0" in waiting
    server.stop()
    embedder.close()
    save_table("serving", rows)


if __name__ == "__main__":
    main()
