"""Cleaning of texts in processes of their own, beside the threads that tokenize them.

Cleaning is pure Python, so that threads cannot share it out. The processes are plain children that read from a pipe:
unlike those of `multiprocessing` they end with their parent however it ends, and import nothing of it.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import longclip_rt
from longclip_rt.embedding import cleaning_process
from longclip_rt.embedding.cleaning_process import CLEANED, GREETING, receive, send
from longclip_rt.errors import InputError
from longclip_rt.model.cleaning import needs_repair, repair_text

logger = logging.getLogger("longclip_rt")

# A process takes 0.1 s to start and some 20 MB. It is worth that once cleaning here has taken this many seconds of
# processor time, less a share of the time that passes, which cleaning may take without holding up the other threads.
_START_AFTER = 0.25
_FREE_SHARE = 0.1
# With fewer characters to repair, the way to a process and back takes longer than the repair.
_FEWEST_CHARACTERS = 1000

_COMMAND = [sys.executable or "", "-m", cleaning_process.__name__]
# Python looks for modules in the working directory first: there it finds this package, and not the user's files.
_FOLDER = Path(longclip_rt.__file__).resolve().parents[1]


class Cleaners:
    """Cleans texts, with so many processes at most as there are threads that call. To be closed.

    A process is started when there is enough to clean that it saves time; a single worker needs none. Should one be
    killed, its texts are cleaned by the thread that asked, and those that follow by the processes that are left.

    Args:
        workers: Threads that call `clean`.
        start_after: Seconds of cleaning after which a process is started.
    """

    def __init__(self, workers: int, start_after: float = _START_AFTER) -> None:
        self._start_after = start_after
        self._to_start = workers if workers > 1 else 0
        self._lock = threading.Lock()
        self._all: list[subprocess.Popen[bytes]] = []
        self._idle: list[subprocess.Popen[bytes]] = []
        self._load = 0.0
        self._load_time = time.monotonic()
        self._warned = False

    def clean(self, texts: Sequence[str]) -> list[str | InputError]:
        """Cleans texts as far as `Tokenizer.encode_cleaned` asks for; in place of a text that cannot be, says why."""
        cleaned: list[str | InputError] = list(texts)
        places = [place for place, text in enumerate(texts) if needs_repair(text)]
        for place, repaired in zip(places, self._repair([texts[place] for place in places]), strict=True):
            cleaned[place] = repaired
        return cleaned

    def close(self) -> None:
        """Ends the processes. No other thread may be cleaning."""
        self._to_start = 0
        self._idle.clear()
        while self._all:
            _end(self._all.pop())

    def _repair(self, texts: list[str]) -> list[str | InputError]:
        if sum(map(len, texts)) >= _FEWEST_CHARACTERS and (process := self._take()) is not None:
            with contextlib.suppress(OSError, EOFError):
                assert process.stdin is not None and process.stdout is not None
                send(process.stdin, texts)
                answers = receive(process.stdout)
                with self._lock:
                    self._idle.append(process)
                return [a[1:] if a[0] == CLEANED else InputError(a[1:]) for a in answers]
            _end(process)
            self._warn(f"a process that cleaned texts has ended (status {process.returncode})")
        start = time.thread_time()
        repaired = [_repair_one(text) for text in texts]
        self._add_load(time.thread_time() - start)
        return repaired

    def _take(self) -> subprocess.Popen[bytes] | None:
        """A process for the calling thread alone; None where the thread should clean by itself."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
            if not self._to_start or self._load < self._start_after:
                return None
            self._to_start -= 1
            self._load = 0.0
        return self._start()

    def _start(self) -> subprocess.Popen[bytes] | None:
        try:
            # A session of its own keeps the terminal's Ctrl-C from it also while Python is starting.
            process = subprocess.Popen(
                _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=_FOLDER, start_new_session=True
            )
        except OSError as error:
            self._warn(f"a process to clean texts cannot be started ({error.strerror})")
            return None
        self._all.append(process)
        assert process.stdout is not None
        if process.stdout.readline() == GREETING:
            return process
        _end(process)
        self._warn("a process to clean texts did not start as expected")
        return None

    def _add_load(self, seconds: float) -> None:
        with self._lock:
            now = time.monotonic()
            self._load = max(0.0, self._load - _FREE_SHARE * (now - self._load_time)) + seconds
            self._load_time = now

    def _warn(self, trouble: str) -> None:
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            logger.warning("%s: texts are cleaned without it, which is slower", trouble)


def _repair_one(text: str) -> str | InputError:
    try:
        return repair_text(text)
    except InputError as error:
        return error


def _end(process: subprocess.Popen[bytes]) -> None:
    """Makes sure that a process, which has nothing to lose, is gone."""
    process.kill()
    # Closing its input tries to write what it has left unread.
    with contextlib.suppress(OSError), process:
        pass
