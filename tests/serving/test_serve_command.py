"""`longclip-rt serve` as its own process."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from longclip_rt.cli import main


@contextlib.contextmanager
def running(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, its address, and the lines that it says."""
    command = [sys.executable, "-m", "longclip_rt", "serve", "--bundle", str(bundle), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    found = threading.Event()

    def listen() -> None:
        for line in process.stderr or ():
            lines.append(line)
            if "serving" in line:
                found.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        assert found.wait(60), lines
        url = re.search(r"http://\S+", "".join(lines))
        assert url
        with httpx.Client(transport=httpx.HTTPTransport(retries=5)) as client:
            for _ in range(600):
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{url[0]}/ready").status_code == 200:
                        break
                threading.Event().wait(0.1)
        yield process, url[0], lines
    finally:
        process.kill()
        process.wait()


def test_sigterm_drains_and_exits_0(tiny_bundle: Path) -> None:
    with running(tiny_bundle, "--max-wait", "1500") as (process, url, lines), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{url}/v1/embeddings", json={"input": "a cup"}, timeout=30)
        for _ in range(500):  # until the request waits for its batch
            if "longclip_admitted_inputs 1.0" in httpx.get(f"{url}/metrics").text:
                break
            threading.Event().wait(0.01)
        process.send_signal(signal.SIGTERM)
        assert answer.result().status_code == 200
        assert process.wait(30) == 0
        assert not any("Traceback" in line for line in lines), lines


def test_two_workers_behind_one_port_with_a_key(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret-key\n")
    options = ("--workers", "2", "--host", "0.0.0.0", "--api-key-file", str(tmp_path / "key"))
    headers = {"Authorization": "Bearer secret-key"}
    with running(tiny_bundle, *options) as (process, url, lines):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        for number in range(8):  # each on a connection of its own
            answer = httpx.post(f"{url}/v1/embeddings", json={"input": f"{number}"}, timeout=30, headers=headers)
            assert answer.status_code == 200
        counted = httpx.get(f"{url}/metrics", headers=headers).text  # of both
        assert 'longclip_requests_total{route="/v1/embeddings",status="200"} 8.0' in counted
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert not any(word in line for line in lines for word in ("Traceback", "ANYONE", "secret-key")), lines


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--api-key-file", "absent"], "absent cannot be read"),
        (["--api-key-file", "empty"], "an API key on one line"),
        ([], "LONGCLIP_RT_API_KEY should hold an API key of ASCII characters"),
        (["--index", "absent.parquet"], "'absent.parquet' cannot be read"),
        (["--bundle", "absent"], "absent"),
        (["--host", "203.0.113.1"], "cannot listen at 203.0.113.1, port 8000"),
    ],
)
def test_a_slip_is_a_sentence(
    options: list[str],
    said: str,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    if not options:
        monkeypatch.setenv("LONGCLIP_RT_API_KEY", "two words")
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--bundle", str(tiny_bundle), "--backend", "onnxruntime", *options])
    assert caught.value.code == 1
    err = capsys.readouterr().err
    assert "Error: " in err and said in err
    assert ("ANYONE" in caplog.text) == ("--host" in options)  # without a key
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
