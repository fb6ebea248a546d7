"""One run at a time in a folder, by a lock that the system drops when the process ends, however it ends.

Kept here rather than taken from `filelock`: the message must name the holder, and the folder itself goes with the run
that ends, so that a lock counts only on the file that is there then.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import BinaryIO

from longclip_rt.errors import OutputError

logger = logging.getLogger("longclip_rt")


def lock_folder(folder: Path, purpose: str) -> BinaryIO:
    """Makes `folder` where it is absent and takes the lock `lock` in it.

    A lock file left by a killed run is free: what counts is the system's lock on it, not that it exists.

    Args:
        folder: The folder; its parent exists.
        purpose: What the run does, for the message: "is writing 'x.parquet'".

    Returns:
        The open file; closing it gives the lock back.

    Raises:
        OutputError: When another process holds the lock; the message gives its number.
        OSError: When the folder or the file cannot be made.
    """
    path = folder / "lock"
    while True:
        folder.mkdir(exist_ok=True)
        lock = path.open("a+b")
        if not _take(lock):
            lock.seek(0)
            holder = lock.read(20).decode("ascii", "replace").strip() or "unknown"
            lock.close()
            raise OutputError(f"Another run (process {holder}) {purpose}. Wait for it, or stop it.")
        # A run that ended between our opening and our locking has removed this file: then lock its successor.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                lock.truncate(0)
                lock.write(f"{os.getpid()}\n".encode())
                lock.flush()
                return lock
        lock.close()


def _take(lock: BinaryIO) -> bool:
    """Takes the system's lock on an open file; False when another process holds it."""
    try:
        import fcntl
    except ImportError:
        logger.warning("this system has no file locks: make sure that no second run writes the same output")
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("the file system has no locks (%s): make sure that no second run writes the same output", error)
    return True
