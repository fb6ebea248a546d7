"""Engines over the imitated driver, for cases that `test_device.py` runs in processes of their own."""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DRIVER: Any
if "IMITATED_DRIVER" in os.environ:  # loaded under the name that cuda.core looks for, and before it does
    DRIVER = ctypes.CDLL(os.environ["IMITATED_DRIVER"], mode=ctypes.RTLD_GLOBAL)
    DRIVER.imitated_log.restype = ctypes.c_char_p
else:
    from real_driver import Driver

    DRIVER = Driver()

import imitated_tensorrt as imitated  # noqa: E402
from imitated_tensorrt import FREE, Checked, Engine, TensorInfo, real  # noqa: E402

from longclip_rt.tensorrt.device import Gpu  # noqa: E402
from longclip_rt.tensorrt.head import KERNELS, HeadFiles, load_head, weights_file  # noqa: E402
from longclip_rt.tensorrt.runner import EngineRunner  # noqa: E402

LIBRARY = imitated.library({})
DIM, WIDTH = 8, 16


@pytest.fixture(autouse=True)
def empty_log() -> Iterator[None]:
    DRIVER.imitated_log_clear()
    yield
    DRIVER.imitated_fail_allocations(-1)
    DRIVER.imitated_fail_waiting(0)


def log(pattern: str = "") -> list[str]:
    return [line for line in DRIVER.imitated_log().decode().splitlines() if re.search(pattern, line)]


def text_engine(head: bool = False, plugin: bool = False) -> Engine:
    tensors = [
        TensorInfo("input_ids", (FREE, FREE), real.DataType.INT32, is_input=True),
        TensorInfo("text_embeds", (FREE, DIM)),
        TensorInfo("last_hidden_state", (FREE, FREE, WIDTH)),
    ]
    if head:
        tensors.append(TensorInfo("text_head_states", (FREE, WIDTH), real.DataType.HALF))
    if plugin:
        tensors.append(TensorInfo("text_pca", (FREE, 5)))
    return Engine(DRIVER, tensors, [((1, 1), (4, 8)), ((2, 1), (6, 20))])


def image_engine() -> Engine:
    pixels = TensorInfo("pixel_values", (FREE, 3, 4, 4), is_input=True)
    return Engine(DRIVER, [pixels, TensorInfo("image_embeds", (FREE, DIM))], [((1, 3, 4, 4), (5, 3, 4, 4))])


def runner(engine: Engine, tower: str = "text", gpu: int = 0, **more: Any) -> EngineRunner:
    return EngineRunner(LIBRARY, Checked(engine, real.ICudaEngine), Gpu(gpu), tower, **more)


def ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 50, (rows, length), dtype=np.int32)


def sums(inputs: np.ndarray) -> np.ndarray:
    flat = inputs.reshape(len(inputs), -1).astype(np.float64)
    return (flat * (np.arange(flat.shape[1]) % 7 + 1)).sum(axis=1)


def expected(inputs: np.ndarray, columns: int = DIM) -> np.ndarray:
    return (sums(inputs)[:, None] + np.arange(columns)).astype(np.float32)


def head_folder(folder: Path, k: int = 5, arch: int = 89) -> Path:
    from safetensors.numpy import save_file

    for code in ("few", "many"):
        (folder / f"{code}.cubin").write_bytes(b"machine code")
    codes = [
        {"file": f"{name}.cubin", "arch": arch, "entry": "_pca_head_kernel", "rows": rows, "warps": warps,
         "shared": shared}
        for name, rows, warps, shared in (("few", 16, 4, 22528), ("many", 64, 8, 40960))
    ]  # fmt: skip
    numbers = {"dim": DIM, "k": k, "eps": 1e-5, "floor": 0.25}
    towers = {"text": numbers, "image": numbers}
    (folder / KERNELS).write_text(json.dumps({"format": 1, "pca": "abc", "codes": codes, "towers": towers}))
    arrays = {
        "weight": np.ones((WIDTH, 32), np.float16),
        "bias": np.zeros(32, np.float32),
        "shift": 100 * np.arange(1, 17, dtype=np.float32),
    }
    save_file(arrays, folder / weights_file("text"))
    return folder


def opened_head(folder: Path, arch: int = 89) -> HeadFiles:
    head = load_head(folder, "text", arch)
    assert head is not None
    return head
