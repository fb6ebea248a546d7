from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from embed_case import Stop, embed
from hypothesis import given
from hypothesis import strategies as st

from longclip_rt.embedding import cleaners, flow
from longclip_rt.embedding.cleaners import Cleaners
from longclip_rt.embedding.cleaning_process import receive, send
from longclip_rt.errors import InputError
from longclip_rt.model.cleaning import needs_repair, repair_text

REFUSED = "&#" + "1" * 5000 + ";"
AWKWARD = [
    *("Caf\u00e9", "plain", "", "a\nb\r\nc\u2028d", "\x00\x1b[31m", "\u00c3\u00a9t\u00c3\u00a9", "\U0001f469\u200d"),
    *("\ud800", "\udfff lone", "\ud83d\ude00", REFUSED, "&amp;amp;lt;", "&#xd800;", "\u00e9" * 300_000, "+", "-"),
]  # fmt: skip


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes that were started; all must be gone in the end."""
    processes: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def recording(*arguments, **options):
        processes.append(popen(*arguments, **options))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", recording)
    monkeypatch.setattr(cleaners, "_FEWEST_CHARACTERS", 1)
    yield processes
    assert all(process.returncode is not None for process in processes)


def expected(texts: list[str]) -> list[str]:
    """What cleaning gives, errors as their messages."""
    results = []
    for text in texts:
        try:
            results.append(repair_text(text) if needs_repair(text) else text)
        except InputError as error:
            results.append(str(error))
    return results


def words(results: list[str | InputError]) -> list[str]:
    return [str(result) for result in results]


@given(texts=st.lists(st.text(st.characters(exclude_categories=()))))
def test_messages_carry_any_text(texts):
    stream = io.BytesIO()
    send(stream, texts)
    send(stream, ["next"])
    stream.seek(0)
    assert receive(stream) == texts
    assert receive(stream) == ["next"]
    with pytest.raises(EOFError):
        receive(stream)


def test_a_process_cleans_as_this_one_does(started):
    with closing(Cleaners(2, start_after=0.0)) as pool:
        results = pool.clean(AWKWARD)
        assert words(results) == expected(AWKWARD)
        assert [type(result) for result in results].count(InputError) == 1
        assert type(results[AWKWARD.index(REFUSED)]) is InputError
        assert pool.clean([]) == []
    assert len(started) == 1


def test_threads_have_a_process_each(started):
    parts = [[f"Caf\u00e9 {part} {index}" for index in range(20)] for part in range(40)]
    with closing(Cleaners(3, start_after=0.0)) as pool, ThreadPoolExecutor(3) as threads:
        assert list(threads.map(pool.clean, parts)) == list(map(expected, parts))
    assert 1 <= len(started) <= 3


def test_a_single_worker_cleans_by_itself(started):
    with closing(Cleaners(1, start_after=0.0)) as pool:
        assert words(pool.clean(AWKWARD)) == expected(AWKWARD)
    assert started == []


class Clock:
    """Time in which a cleaning takes 0.1 s of the processor, and nothing else takes any."""

    def __init__(self) -> None:
        self.now = self.used = 0.0

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        self.used += 0.1
        return self.used


def test_a_process_is_started_when_cleaning_takes_long(started, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(cleaners, "time", clock)
    with closing(Cleaners(2, start_after=0.25)) as pool:
        # Not when it takes long now and then: a small share of the time is no burden.
        for _ in range(20):
            pool.clean(["Caf\u00e9"])
            clock.now += 1
        for _ in range(3):
            assert started == []
            pool.clean(["Caf\u00e9"])
        pool.clean(["Caf\u00e9"])
        assert len(started) == 1
        # An idle process is used, and no second one needed.
        for _ in range(20):
            pool.clean(["Caf\u00e9"])
        assert len(started) == 1


def test_a_small_job_starts_no_process(started):
    with closing(Cleaners(4)) as pool:
        assert pool.clean(["Caf\u00e9"] * 100) == ["caf\u00e9"] * 100
    assert started == []


def test_few_characters_are_cleaned_here(started, monkeypatch):
    monkeypatch.setattr(cleaners, "_FEWEST_CHARACTERS", 10)
    with closing(Cleaners(2, start_after=0.0)) as pool:
        pool.clean(["Caf\u00e9", "plain " * 100])
        assert started == []
        pool.clean(["Caf\u00e9"] * 3)
        assert len(started) == 1


def test_a_killed_process_loses_nothing(started, caplog):
    texts = ["Caf\u00e9", REFUSED, "\u00e9" * 100_000]
    with caplog.at_level(logging.WARNING, "longclip_rt"), closing(Cleaners(2, start_after=0.0)) as pool:
        for count in (1, 2):
            assert words(pool.clean(texts)) == expected(texts)
            assert len(started) == count
            started[-1].kill()
            assert words(pool.clean(texts)) == expected(texts)
        assert words(pool.clean(texts)) == expected(texts)
        assert len(started) == 2
    assert [record.message for record in caplog.records] == [
        "a process that cleaned texts has ended (status -9): texts are cleaned without it, which is slower"
    ]


def test_a_process_that_ends_amid_its_answer_loses_nothing(started, monkeypatch, caplog):
    half = "from longclip_rt.embedding.cleaning_process import GREETING; import sys; o = sys.stdout.buffer; "
    half += "o.write(GREETING); o.flush(); sys.stdin.buffer.read(8); o.write(bytes([1, 0, 0, 0, 9, 0, 0, 0]) + b'+caf')"
    monkeypatch.setattr(cleaners, "_COMMAND", [sys.executable, "-c", half])
    with caplog.at_level(logging.WARNING, "longclip_rt"), closing(Cleaners(2, start_after=0.0)) as pool:
        assert pool.clean(["Caf\u00e9"]) == ["caf\u00e9"]
    assert [type(process.returncode) for process in started] == [int]
    assert "has ended" in caplog.text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["/absent/python"], r"cannot be started \(No such file or directory\)"),
        ([""], "cannot be started"),
        ([sys.executable, "-c", "print('welcome', flush=True); input()"], "did not start as expected"),
        ([sys.executable, "-c", "raise SystemExit(3)"], "did not start as expected"),
    ],
)
def test_without_processes_texts_are_cleaned_here(started, monkeypatch, caplog, command, message):
    monkeypatch.setattr(cleaners, "_COMMAND", command)
    with caplog.at_level(logging.WARNING, "longclip_rt"), closing(Cleaners(2, start_after=0.0)) as pool:
        for _ in range(4):
            assert pool.clean(["Caf\u00e9", "a"]) == ["caf\u00e9", "a"]
    (record,) = caplog.records
    assert message.replace("\\", "") in record.message


def test_a_process_does_not_heed_control_c(started):
    with closing(Cleaners(2, start_after=0.0)) as pool:
        pool.clean(["Caf\u00e9"])
        started[0].send_signal(signal.SIGINT)
        time.sleep(0.05)
        assert pool.clean(["\u00c9t\u00e9"]) == ["\u00e9t\u00e9"]
        assert os.getsid(started[0].pid) != os.getsid(0)
        assert started[0].poll() is None


def test_modules_in_the_working_directory_are_not_imported(started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("html.py", "ftfy.py", "struct.py", "longclip_rt.py"):
        Path(name).write_text("raise SystemExit('not this one')")
    with closing(Cleaners(2, start_after=0.0)) as pool:
        assert pool.clean(["Caf\u00e9"]) == ["caf\u00e9"]
        assert started[0].poll() is None


def test_the_process_imports_little():
    code = (
        "import sys, longclip_rt.embedding.cleaning_process; "
        "print(sorted({'numpy', 'pyarrow', 'tokenizers', 'openvino', 'subprocess'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture
def eager(tmp_path, monkeypatch, started) -> list[subprocess.Popen[bytes]]:
    """Runs that start processes at once; returns these. The working directory holds a list of texts that need them."""
    monkeypatch.setattr(flow, "Cleaners", partial(Cleaners, start_after=0.0))
    monkeypatch.setattr(flow, "TEXTS_PER_TASK", 7)
    monkeypatch.chdir(tmp_path)
    lines = [f"Caf\u00e9 {index} \u00c3\u00a9 &amp; \u201cso on\u201d {'word ' * (index % 20)}" for index in range(400)]
    lines[13] = "bad " + REFUSED
    lines[27:300:5] = ["plain"] * len(lines[27:300:5])
    Path("texts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return started


def test_the_number_of_workers_changes_no_byte(eager):
    for workers in (1, 2, 5):
        report = embed(f"{workers}.parquet", sources=["texts.txt"], texts=True, workers=workers, shard_size=150)
        assert (report.totals.rows, report.totals.rejects) == (399, 1)
        assert workers == 1 or eager
        for suffix in ("", ".rejects.jsonl"):
            assert Path(f"{workers}.parquet{suffix}").read_bytes() == Path(f"1.parquet{suffix}").read_bytes()
        assert all(process.returncode is not None for process in eager)
    assert 2 <= len(eager) <= 7


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a fault")])
def test_a_run_that_is_stopped_ends_its_processes(eager, error):
    with pytest.raises(type(error)):
        embed(sources=["texts.txt"], texts=True, shard_size=50, progress=Stop(100, error))
    assert eager
    assert all(process.returncode is not None for process in eager)


RUN = """
import functools, subprocess, sys
sys.path.insert(0, sys.argv[1])
from fake_embedder import FakeEmbedder
from longclip_rt.embedding import flow
from longclip_rt.embedding.pipeline import EmbedOptions, embed_files

class Recorded(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        print(self.pid, flush=True)

subprocess.Popen = Recorded
flow.Cleaners = functools.partial(flow.Cleaners, start_after=0.0)
options = EmbedOptions(texts=True, workers=2, shard_size=100)
embed_files(["texts.txt"], "out.parquet", FakeEmbedder(delay=0.05), options)
"""


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("late", [False, True])
def test_a_run_that_is_killed_leaves_no_process(eager, stop, late):
    command = [sys.executable, "-c", RUN, str(Path(__file__).parent)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert int(run.stdout.readline()) > 0
    while late and not Path("out.parquet.parts/000000.json").exists():
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(stop)
    # The processes have the run's standard error, which so comes to its end when the last of them has ended.
    _, err = run.communicate(timeout=30)
    # An interrupt that comes while a thread is being started may end the program as an error of its own.
    assert run.returncode == -stop or (stop == signal.SIGINT and run.returncode == 1), err
    # Python's own word about the interrupt, and nothing of the processes.
    assert err.count("Traceback") == (stop == signal.SIGINT)
