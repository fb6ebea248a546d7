"""Ctrl-C ends the program soon, whatever its threads are doing."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

STATUS = 130
"""Of a program that SIGINT ended, as shells have it."""


@contextlib.contextmanager
def ended_by_ctrl_c(message: str, seconds: float = 1.5) -> Iterator[None]:
    """Ends the process when a Ctrl-C within the block has not ended it after some time.

    Python raises `KeyboardInterrupt` in the main thread alone, and only once that runs Python code; and a program does
    not end before its threads do. A thread that hangs in a library would keep it for ever. So the signal also wakes a
    thread that waits and then ends the process. Only for work that may be killed at any moment.

    Args:
        message: Printed on stderr, where the block could not do that itself.
        seconds: Time that the block has to end by itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    pressed = threading.Event()

    def watch() -> None:
        while signals := os.read(reading, 64):
            if signal.SIGINT in signals:
                pressed.set()
                threading.Event().wait(seconds)
                with contextlib.suppress(OSError):
                    os.write(2, f"{message}\n".encode())
                os._exit(STATUS)
        os.close(reading)

    threading.Thread(target=watch, name="longclip-ctrl-c", daemon=True).start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        if not pressed.is_set():  # else the program's end may still hang
            signal.set_wakeup_fd(before)
            os.close(writing)
