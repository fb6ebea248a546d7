"""The first embedding of a process, and the last: neither may hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longclip_rt.bundle.bundle import BUILT_IN, load_bundle
from longclip_rt.errors import BackendError
from longclip_rt.opening import open_backend
from longclip_rt.runtime import Embedder

MODEL = BUILT_IN

AT_ONCE = """
import sys, threading
import numpy as np
from longclip_rt.bundle.bundle import load_bundle
from longclip_rt.opening import open_backend

backend = open_backend(load_bundle(sys.argv[1]), sys.argv[2], "fp32")
size = backend.bundle.architecture.image_size
barrier = threading.Barrier(4)
sys.setswitchinterval(1e-6)

def first(number):
    inputs = np.zeros((1, 3, size, size), np.float32)
    barrier.wait()
    backend.run("image", inputs)

threads = [threading.Thread(target=first, args=(number,)) for number in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("done")
"""


@pytest.mark.parametrize(("backend", "count"), [("openvino", 30), ("onnxruntime", 4)])
def test_threads_that_meet_before_their_first_call_all_return(backend: str, count: int) -> None:
    """In OpenVINO two first calls at once deadlocked in 5 of 80 fresh processes; see `Backend.prepare`."""
    waiting = list(range(count))
    running: list[subprocess.Popen[str]] = []
    while waiting or running:
        while waiting and len(running) < 3:
            waiting.pop()
            program = [sys.executable, "-X", "faulthandler", "-c", AT_ONCE, str(MODEL), backend]
            running.append(subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        process = running.pop(0)
        try:
            out, err = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # which prints the stacks of its threads
            pytest.fail(f"a process hung:\n{process.communicate()[1]}")
        assert out == "done\n", err


def child(call: Callable[[], object], answer: object) -> None:
    try:
        call()
        answer.put("ran")  # type: ignore[attr-defined]
    except BackendError as error:
        answer.put(str(error))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("call", ["run", "embed_texts"])
def test_a_fork_of_the_process_says_so_instead_of_hanging(call: str) -> None:
    embedder = Embedder(load_bundle(MODEL), open_backend(load_bundle(MODEL), "onnxruntime", "fp32"))
    embedder.embed_texts(["its threads are made"])
    calls = {
        "run": lambda: embedder.backend.run("text", np.ones((1, 3), np.int32)),
        "embed_texts": lambda: embedder.embed_texts(["they are not in the fork"]),
    }
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=child, args=(calls[call], answer))
    process.start()
    process.join(20)
    assert not process.is_alive() and "is a fork" in (said := answer.get()) and "spawn or forkserver" in said


FORKS = """
import os, sys
from longclip_rt.bundle.bundle import load_bundle
from longclip_rt.opening import open_backend
from longclip_rt.runtime import Embedder

bundle, kind = load_bundle(sys.argv[1]), sys.argv[2]
embedder = Embedder(bundle, open_backend(bundle, kind, "fp32"))
embedder.embed_texts(["its threads are made"] * 300)
for how in ("nothing", "exit", "error", "close", "anew", "let go"):
    if how == "let go":
        embedder.close()
        del embedder
    if process := os.fork():
        print(how, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
        continue
    if how == "exit":
        sys.exit(3)
    elif how == "error":
        embedder.embed_texts(["a text"])
    elif how == "close":
        embedder.close()
    elif how == "anew":
        with Embedder(bundle, open_backend(bundle, kind, "fp32")) as anew:
            print(len(anew.embed_texts(["a text"] * 300)), "texts", end=" ")
    print("the end of", end=" ")  # flushed as Python ends
    sys.exit()
os._exit(0)
"""
ANEW = {"openvino": "anew 1", "onnxruntime": "300 texts the end of anew 0"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
@pytest.mark.parametrize("backend", list(ANEW))
def test_a_fork_ends_with_its_own_status(backend: str) -> None:
    """Destructors waited for threads that the fork lacks, or it died of them."""
    program = [sys.executable, "-W", "ignore", "-c", FORKS, str(MODEL), backend]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the fork too
            pytest.fail(f"a fork hung after:\n{process.communicate()[0]}")
    ends = ["the end of nothing 0", "exit 3", "error 1", "the end of close 0", ANEW[backend], "the end of let go 0"]
    assert out.splitlines() == ends, err
    assert f"BackendError: This {backend} backend was opened by process" in err
    assert ("BackendError: This process is a fork" in err) == (backend == "openvino")


HANGS = """
import ctypes, sys, threading
from longclip_rt import runtime

class Hangs(runtime.Embedder):
    def encode_crops(self, crops):
        print("encoding", flush=True)
        ctypes.PyDLL(None).sleep(60) if how == "holds the lock" else threading.Event().wait()

    def close(self):
        threading.Event().wait()

how = sys.argv.pop(1)
if how != "works":
    runtime.Embedder = Hangs
from longclip_rt.cli import main
main()
"""


@pytest.mark.parametrize("how", ["hangs", "holds the lock", "works"])
def test_ctrl_c_ends_embed_whatever_the_backend_does(how: str, tmp_path: Path) -> None:
    pictures = tmp_path / "files.txt"
    photo = Path(__file__).parents[1] / "examples" / "photos" / "clock.jpg"
    pictures.write_text(f"{photo}\n" * (20_000 if how == "works" else 3))
    command = [sys.executable, "-c", HANGS, how, "embed", str(pictures), "-o", str(tmp_path / "out.parquet")]
    command += ["--bundle", str(MODEL), "--shard-size", "64"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if how != "works":
        assert process.stdout.readline() == "encoding\n"
    else:
        parts = tmp_path / "out.parquet.parts"
        while not (parts / "000001.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (-signal.SIGKILL if how == "holds the lock" else 130)
    assert err.count("Stopped. Give the same command again") == 1 and "Traceback" not in err
    assert time.monotonic() - start < 4  # promised: 2 seconds, on a machine that does nothing else
