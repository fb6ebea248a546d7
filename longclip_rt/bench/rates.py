"""What this machine can do: matrix products a second in each precision, and bytes a second through its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from longclip_rt.system.extras import require

_SIZE = {"cuda": 8192, "cpu": 1024}
_COPIED = {"cuda": 1 << 30, "cpu": 256 << 20}


def machine_rates(precisions: list[str], on_gpu: bool, seconds: float = 0.3) -> dict[str, float]:
    """The best of several runs each.

    Args:
        precisions: `fp32` (without TF32), `bf16`, `fp16`.
        on_gpu: On the first GPU, else on the CPU.
        seconds: Of each measurement.

    Returns:
        `gemm PRECISION`: operations a second of a square product; `copy`: bytes a second, read and written, of a copy
        inside the memory; on a GPU also `to GPU` and `from GPU`, from and to page-locked memory.

    Raises:
        MissingExtraError: PyTorch is not installed.
    """
    torch: Any = require("torch", "bench")
    device = "cuda" if on_gpu else "cpu"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    torch.backends.cuda.matmul.allow_tf32 = False
    rates = {}
    size = _SIZE[device]
    for precision in precisions:
        dtype = dtype_of(torch, precision)
        first, second = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
        out = torch.empty_like(first)
        rates[f"gemm {precision}"] = 2 * size**3 / _best(lambda: torch.mm(first, second, out=out), wait, seconds)  # noqa: B023
    source = torch.ones(_COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates["copy"] = 2 * source.numel() / _best(lambda: target.copy_(source), wait, seconds)
    if on_gpu:
        host = torch.empty(_COPIED[device] // 4, dtype=torch.uint8, pin_memory=True)
        there = source[: host.numel()]
        rates["to GPU"] = host.numel() / _best(lambda: there.copy_(host), wait, seconds)
        rates["from GPU"] = host.numel() / _best(lambda: host.copy_(there), wait, seconds)
    return rates


def dtype_of(torch: Any, precision: str) -> Any:
    """PyTorch's number format of a precision."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _best(run: Callable[[], object], wait: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest run, after two that do not count."""
    for _ in range(2):
        run()
    wait()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - started)
    return float(np.min(times))
