"""TensorBoard's event files, written from the calling thread."""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from longclip_rt.errors import MissingExtraError
from longclip_rt.system.extras import require
from longclip_rt.system.files import output_errors

_log = logging.getLogger("longclip_rt")


def open_events(folder: Path, resume_step: int | None) -> Events | None:
    """A writer of TensorBoard events, or None, said once, where it is not installed: the CSV holds the same figures.

    Args:
        folder: Where its file goes.
        resume_step: The step the run goes on after, if it does.

    Raises:
        OutputError: The disk refuses.
    """
    try:
        require("tensorboard", "train")
    except MissingExtraError as error:
        _log.warning(
            "No TensorBoard events will be written; %s has the figures. %s", folder.parent / "metrics.csv", error
        )
        return None
    with output_errors(folder):
        return Events(folder, None if resume_step is None else resume_step + 1)


class Events:
    """Writes TensorBoard's event files from the calling thread.

    TensorBoard's own writer has a thread, in which a full disk ends in a traceback on stderr.

    Args:
        folder: Where the file goes; made when it does not exist.
        purge_step: The viewer passes over earlier files' events from this step on.

    Raises:
        OSError: When the disk refuses; so do the methods.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**9}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=purge_step, session_log=started)
        self.flush()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Adds a figure of a step."""
        self._write(step=step, summary=self._summary(value=[self._summary.Value(tag=name, simple_value=value)]))

    def flush(self) -> None:
        """Hands what was added to the system."""
        self._records.flush()

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
