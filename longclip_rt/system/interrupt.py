"""Ctrl-C ends the program soon, whatever its threads are doing."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import IO

logger = logging.getLogger("longclip_rt")

STATUS = 130
"""Of a program that SIGINT ended, as shells have it."""

# A process of its own: a thread could not run while native code holds the interpreter's lock. It says when SIGINT came
# and when the time is over; a thread of the program ends that then, with the right status, or else this does.
_WATCH = """
import os, select, signal, sys, time

def rest(seconds):
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([0], [], [], left)[0] and not os.read(0, 64):
            sys.exit()  # the program is no more

signal.signal(signal.SIGPIPE, signal.SIG_DFL)
program, seconds, message = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
while signals := os.read(0, 64):
    if signal.SIGINT in signals:
        os.write(1, b"!")
        rest(seconds)
        os.write(1, b"!")
        rest(0.25)
        if os.getppid() == program:
            os.write(2, message.encode() + b"\\n")
            os.kill(program, signal.SIGKILL)
        break
"""


@contextlib.contextmanager
def ended_by_ctrl_c(message: str, seconds: float = 1.5) -> Iterator[None]:
    """Ends the process when a Ctrl-C within the block has not ended it after some time.

    Python raises `KeyboardInterrupt` in the main thread alone, and only once that runs Python code; and a program does
    not end before its threads do. A thread that hangs in a library would keep it for ever. So the signal also wakes a
    process that waits, and then has this one end with `STATUS`; where native code holds the interpreter's lock, nothing
    here can run, and it is killed. Only for work that may be killed at any moment.

    Args:
        message: Printed on stderr, where the block could not do that itself.
        seconds: Time that the block has to end by itself.
    """
    if threading.current_thread() is not threading.main_thread() or os.name != "posix" or not sys.executable:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        watch = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCH, str(os.getpid()), str(seconds), message],
            stdin=reading,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a terminal sends Ctrl-C to every process in its foreground
            bufsize=0,
        )
    except OSError as error:  # no process more may be had: the work itself can go on
        logger.debug("nothing watches for Ctrl-C: %s", error)
        os.close(writing)
        yield
        return
    finally:
        os.close(reading)
    assert watch.stdout is not None
    pressed = threading.Event()
    threading.Thread(target=_heed, args=(watch.stdout, pressed, message), name="longclip-ctrl-c", daemon=True).start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        if not pressed.is_set():  # else the program's end may still hang
            signal.set_wakeup_fd(before)
            os.close(writing)
            watch.kill()
            watch.wait()


def _heed(told: IO[bytes], pressed: threading.Event, message: str) -> None:
    """Ends the process when the one that watches has told of Ctrl-C twice."""
    with told:
        if not told.read(1):
            return
        pressed.set()
        if told.read(1):
            with contextlib.suppress(OSError):
                os.write(2, f"{message}\n".encode())
            os._exit(STATUS)
