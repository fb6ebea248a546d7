"""A run that is killed in the middle of writing its second checkpoint; run by test_loop.py.

python killed_run.py DATA WEIGHTS FOLDER THREADS
"""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO

import torch
from train_case import small_config

from longclip_rt.train.loop import train

_save = torch.save
_written = 0


def save_half(content: Any, file: BinaryIO) -> None:
    """Writes a checkpoint; of the second one only the first half, and then the process is gone."""
    global _written
    _written += 1
    whole = io.BytesIO()
    _save(content, whole)
    if _written == 2:
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    file.write(whole.getvalue())


if __name__ == "__main__":
    data, weights, folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.save = save_half
    train(small_config(data, Path(weights)), Path(folder), device="cpu", quiet=True)
