"""What the kernels share: configurations, checks of what they are given, and the choice among configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from longclip_rt.errors import KernelError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Weights are padded to a multiple of this many columns, so that rows stay aligned for 16-byte loads whatever K is.
PAD = 16


@dataclass(frozen=True)
class KernelConfig:
    """How a kernel cuts its work.

    Attributes:
        name: For tables and for choosing it by hand.
        rows: Rows of the input that one program handles.
        columns: Columns of a product in one tile.
        inner: Length of one step along the summed dimension.
        warps: Warps of a program.
        stages: Steps whose loads are under way at a time.
    """

    name: str
    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


_fastest: dict[tuple[object, ...], KernelConfig] = {}


def interpreted(kernel: object) -> bool:
    """Whether Triton was told to interpret (TRITON_INTERPRET=1) when `kernel` was defined: it then runs on the CPU."""
    return not isinstance(kernel, triton.JITFunction)


def wide_dot(kernel: object, dtype: torch.dtype) -> bool:
    """Whether products must be made of float32 copies: Triton 3.8's interpreter multiplies bfloat16's bit patterns."""
    return interpreted(kernel) and dtype == torch.bfloat16


def check_rows(name: str, kernel: object, rows: Tensor, width: int, weight: Tensor) -> None:
    """Refuses an input that a kernel does not take.

    Raises:
        KernelError: The shape, dtype or device is not what the weights call for, or there is no device to run on.
    """
    if rows.ndim != 2 or rows.shape[1] != width:
        raise KernelError(f"{name} takes rows [B, {width}]; got {list(rows.shape)}.")
    if rows.dtype != weight.dtype:
        raise KernelError(
            f"{name} was given {rows.dtype} rows for {weight.dtype} weights. Prepare these with dtype={rows.dtype}."
        )
    if rows.device != weight.device:
        raise KernelError(f"{name} was given rows on {rows.device} and weights on {weight.device}. Move one.")
    if rows.device.type != "cuda" and not interpreted(kernel):
        raise KernelError(
            f"{name} runs on an NVIDIA GPU; the rows are on {rows.device}. Move them with .cuda(), or set "
            "TRITON_INTERPRET=1 before Python starts to run it on the CPU, slowly."
        )


def check_dtype(dtype: torch.dtype) -> None:
    """Refuses a dtype that the kernels are not written for.

    Raises:
        KernelError: It is none of float16, bfloat16 and float32.
    """
    if dtype not in DTYPES:
        raise KernelError(f"The kernels compute in float16, bfloat16 or float32; got {dtype}.")


def check_shapes(given: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses weights whose shapes do not go together.

    Raises:
        KernelError: One has another shape than expected.
    """
    for name, shape in expected.items():
        if tuple(given[name].shape) != shape:
            raise KernelError(f"{name} must be {list(shape)} beside the other weights; got {list(given[name].shape)}.")


def within_int32(rows: Tensor) -> Tensor:
    """[B, N] whose offsets inside a row fit 32 bits, as the kernels compute them; a copy where they do not."""
    return rows if abs(rows.stride(1)) * rows.shape[1] < 2**31 else rows.contiguous()


def padded(matrix: Tensor) -> Tensor:
    """[R, C] with columns of zeros up to a multiple of `PAD`."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % PAD))


def chosen_config(
    configs: Sequence[KernelConfig], name: str | None, run: Callable[[KernelConfig], None], key: tuple[object, ...]
) -> KernelConfig:
    """The configuration to launch with.

    Args:
        configs: Those for the dtype.
        name: One of theirs; None takes the fastest, timed at the first call with a `key` and remembered.
        run: Launches with a configuration.
        key: What the choice depends on: kernel, device, dtype, sizes. None on the device (the interpreter) takes the
            first.

    Raises:
        KernelError: There is none of this name.
    """
    if name is not None:
        for config in configs:
            if config.name == name:
                return config
        raise KernelError(f"There is no configuration {name!r}; there are {', '.join(each.name for each in configs)}.")
    if len(configs) == 1 or None in key:
        return configs[0]
    if key not in _fastest:
        from triton.testing import do_bench

        _fastest[key] = min(configs, key=lambda config: do_bench(lambda: run(config), warmup=5, rep=20))
    return _fastest[key]


def bucket(rows: int) -> int:
    """The next power of two: numbers of rows up to it share one choice of configuration."""
    return 1 << max(0, rows - 1).bit_length()
