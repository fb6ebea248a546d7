"""How fast is the fused PCA head on this GPU, against torch and against the same algebra in two steps?

    python benchmarks/pca_head.py

Needs an NVIDIA GPU. Each way is timed with CUDA events, the level 2 cache flushed before every run, the ways in turns;
the medians, the traffic of the least work in GB/s, and the share of the least time that the card's data sheet allows go
to results/pca_head.csv.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from common import save_table
from torch import Tensor
from torch.nn import functional as F

from longclip_rt.kernels.pca_head import head_weights, pca_head, pca_head_reference

SHAPES = ((512, 512, 64), (768, 512, 64), (768, 768, 128), (1024, 768, 128))
"""W, D, K: B/16's text and image tower, L/14's text and image tower."""

ROWS = (1, 64, 1024, 8192, 65536)

CARDS = {
    "A100": (2039e9, 312e12, 19.5e12),
    "3090": (936e9, 71e12, 35.6e12),
    "4090": (1008e9, 165e12, 82.6e12),
    "L40S": (864e9, 362e12, 91.6e12),
    "H100": (3350e9, 989e12, 67e12),
    "H200": (4800e9, 989e12, 67e12),
    "B200": (8000e9, 2250e12, 75e12),
    "5090": (1792e9, 209e12, 104.8e12),
}
"""Data sheets of SXM and desktop cards: bytes a second of memory; dense operations a second at boost clock, of fp16
tensor cores that sum in fp32, and of fp32 without tensor cores. PCIe, laptop and Ti cards have others."""

_CACHE = 256 << 20  # bytes: more than any level 2 cache there is


def ways(width: int, dim: int, k: int, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """The kernel, torch an operator at a time, torch compiled, and one product with [P | P V] between two others."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    components = torch.linalg.qr(noise(dim, dim))[0][:, :k]
    exact = [1 + 0.1 * noise(width), 0.1 * noise(width), noise(width, dim) * width**-0.5, noise(dim) * dim**-0.5]
    parts = [part.cuda() for part in (*exact, components)]
    head = head_weights(*parts, dtype=dtype)
    gain, bias, projection, mean, directions = (part.to(dtype) for part in parts)
    both = torch.cat([parts[2], parts[2] @ parts[4]], dim=1).to(dtype)
    shift = (parts[3] @ parts[4]).float()

    def eager(states: Tensor) -> Tensor:
        return pca_head_reference(states, gain, bias, projection, mean, directions)[1]

    def two_products(states: Tensor) -> Tensor:
        product = F.layer_norm(states, (width,), gain, bias) @ both
        length = product[:, :dim].float().norm(dim=1, keepdim=True).clamp_min(1e-12)
        return F.normalize(product[:, dim:].float() / length - shift, dim=1)

    return {
        "kernel": lambda states: pca_head(states, head)[0],
        "torch": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
        "two products": two_products,
        "two products, compiled": torch.compile(two_products, dynamic=False),
    }


def milliseconds(runs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The median time of each run, by CUDA events; the runs take turns."""
    flush = torch.empty(_CACHE, dtype=torch.uint8, device="cuda")
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        for _ in range(3):  # compiles, and chooses configurations
            run()
    for _ in range(rounds):
        for index, run in enumerate(runs):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times[index].append(start.elapsed_time(end))
    return [statistics.median(each) for each in times]


def card_rates(name: str) -> tuple[float, float, float] | None:
    """The line of `CARDS` for a driver's device name, such as "NVIDIA H100 80GB HBM3"."""
    words = set(name.upper().replace("-", " ").split())
    if words & {"PCIE", "LAPTOP", "TI", "NVL"}:
        return None
    return next((rates for card, rates in CARDS.items() if card in words), None)


def rows_of_table(shape: tuple[int, int, int], dtype: torch.dtype, count: int, rounds: int) -> list[dict[str, object]]:
    """The table's lines for one launch."""
    width, dim, k = shape
    torch.compiler.reset()  # or the ninth shape would run uncompiled
    named = ways(width, dim, k, dtype)
    states = torch.randn(count, width, device="cuda").to(dtype)
    results = [way(states).float() for way in named.values()]
    for name, result in zip(named, results, strict=True):
        cosine = F.cosine_similarity(result, results[0], dim=1).min().item()
        if cosine < 0.99:
            raise SystemExit(f"{name} disagrees with the kernel: the lowest cosine is {cosine:.4f}")
    times = milliseconds([lambda way=way: way(states) for way in named.values()], rounds)  # type: ignore[misc]
    size = states.element_size()
    both = width * (dim + k)  # numbers of [P | P V]
    traffic = (count * width + both) * size + 4 * (dim + 2 * k) + 4 * count * k  # rows, weights, offsets, result: once
    rates = card_rates(torch.cuda.get_device_name())
    least = rates and max(traffic / rates[0], 2 * count * both / rates[1 if size == 2 else 2])
    return [
        {
            "W": width, "D": dim, "K": k, "B": count, "dtype": str(dtype).removeprefix("torch."), "way": name,
            "microseconds": f"{1e3 * time:.1f}",
            "times the kernel's": f"{time / times[0]:.2f}",
            "GB/s": f"{traffic / time / 1e6:.0f}",
            "share of the least time": f"{1e3 * least / time:.2f}" if least else "card not listed",
        }
        for name, time in zip(named, times, strict=True)
    ]  # fmt: skip


def main() -> None:
    """Times every shape, dtype and number of rows, and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtypes", nargs="+", default=["float16", "float32"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs an NVIDIA GPU, and PyTorch sees none here.")
    # Full precision everywhere, as the kernel computes it: TF32 would be another arithmetic.
    torch.backends.cuda.matmul.allow_tf32 = False
    table = [
        {"gpu": torch.cuda.get_device_name(), **row}
        for shape in SHAPES
        for dtype in arguments.dtypes
        for count in ROWS
        for row in rows_of_table(shape, getattr(torch, dtype), count, arguments.rounds)
    ]
    save_table("pca_head", table)


if __name__ == "__main__":
    main()
