"""Seeded weights and rows for the kernels, and the bound that their error must keep to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# What a few roundings of a number near 1 come to, where torch happens to hit the reference exactly.
ABSOLUTE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-6}


@dataclass
class Case:
    """A head's weights in float64."""

    gain: Tensor
    bias: Tensor
    projection: Tensor
    mean: Tensor
    components: Tensor

    @staticmethod
    def seeded(width: int, dim: int, k: int, seed: int = 0, device: torch.device | str = "cpu") -> Case:
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        parts = (
            1 + 0.3 * noise(width),
            0.1 * noise(width),
            noise(width, dim) * width**-0.5,
            0.7 * noise(dim) * dim**-0.5,
            torch.linalg.qr(noise(dim, dim))[0][:, :k],
        )
        return Case(*(part.to(device) for part in parts))

    def parts(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        return tuple(part.to(dtype) for part in (self.gain, self.bias, self.projection, self.mean, self.components))


def rows(count: int, width: int, dtype: torch.dtype, seed: int = 1, device: torch.device | str = "cpu") -> Tensor:
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).to(device)


def assert_bounded(got: Tensor, exact: Tensor, torch_result: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """The error is at most twice that of torch in the same precision, plus a small absolute term; never NaN."""
    assert got.dtype == torch.float32 and got.shape == exact.shape, what
    assert bool(got.isfinite().all()), what
    if not got.numel():
        return
    theirs = (torch_result.double() - exact).abs().max().item()
    # Where torch itself overflows it excuses nothing.
    bound = ABSOLUTE[dtype] + 2 * (theirs if theirs < 0.05 else 0.0)
    error = (got.double() - exact).abs().max().item()
    assert error <= bound, f"{what}: the error is {error:.3g}, and may be {bound:.3g} (torch's is {theirs:.3g})"
