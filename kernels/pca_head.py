"""Pooled state -> LayerNorm -> projection -> L2 norm -> centre -> PCA -> L2 norm, in one launch.

The linear parts are multiplied out beforehand: with x' the normalised state without LayerNorm's scale and shift,

    h P  = x' (g P) + b P          h P V = x' (g P V) + b P V          y = h P V / |h P| - mean V

so one product with [g P | g P V] runs through the rows once for the length |h P| and once for the K columns, and the
[B, D] embedding need not exist anywhere. Against the same algebra without a kernel it saves LayerNorm's trip through
memory, and that of the [B, D + K] product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from longclip_rt.errors import KernelError
from longclip_rt.kernels.launch import (
    KernelConfig,
    bucket,
    check_dtype,
    check_rows,
    check_shapes,
    chosen_config,
    interpreted,
    padded,
    wide_dot,
    within_int32,
)

LAYER_NORM_EPS = 1e-5
EPS = 1e-12  # of torch.nn.functional.normalize


def pca_head_reference(
    pooled: Tensor,
    gain: Tensor,
    bias: Tensor,
    projection: Tensor,
    mean: Tensor,
    components: Tensor,
    *,
    eps: float = LAYER_NORM_EPS,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """The head in plain torch, in the dtype of its arguments; in float64 it is what the kernel is held against.

    Args:
        pooled: Pooled states before the final LayerNorm, [B, W].
        gain: LayerNorm's weight, [W].
        bias: LayerNorm's bias, [W].
        projection: [W, D].
        mean: The PCA's mean, [D].
        components: The PCA's components V, [D, K].
        eps: LayerNorm's.
        normalize: Whether the PCA vectors are scaled to length 1.

    Returns:
        Embeddings [B, D] of length 1, and their PCA [B, K].
    """
    states = F.layer_norm(pooled, pooled.shape[-1:], gain, bias, eps)
    embedding = F.normalize(states @ projection, dim=-1, eps=EPS)
    reduced = (embedding - mean) @ components
    return embedding, F.normalize(reduced, dim=-1, eps=EPS) if normalize else reduced


# Few rows: as few as a tile can hold, so that more programs share the work.
# Many rows: each program reads all weights, from the level 2 cache, so a program should have many rows to use them on.
# Twice as many columns or one more stage spill registers on one architecture or another, and shared memory must stay
# below the 99 KiB of compute capability 8.6, 8.9 and 12.0.
HALF_CONFIGS = (
    KernelConfig("half_few", rows=16, columns=64, inner=64, warps=4, stages=3),
    KernelConfig("half_many", rows=64, columns=64, inner=64, warps=8, stages=3),
)
# Full precision has no tensor cores: the products run in registers, and larger tiles than these spill.
SINGLE_CONFIGS = (
    KernelConfig("single_few", rows=16, columns=64, inner=32, warps=4, stages=2),
    KernelConfig("single_many", rows=32, columns=64, inner=32, warps=4, stages=2),
)


@triton.jit
def _row_scale(row_starts, stride_col, rows, width, total_rows, BLOCK_W: tl.constexpr):  # type: ignore[no-untyped-def]
    """For each row the power of two 1 / 2^e, 2^e <= its largest magnitude, e from 0 to 126: [BLOCK_B] float32.

    `row_starts` are pointers to the rows' first entries, [BLOCK_B].

    bfloat16 and float32 hold numbers whose squares, and even sums, overflow float32; times a power of two they are
    exact and do not.
    """
    largest = tl.zeros(rows.shape, tl.float32)
    for start in range(0, width, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        inside = (rows < total_rows)[:, None] & (w < width)[None, :]
        x = tl.load(row_starts[:, None] + w[None, :] * stride_col, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 127), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _row_moments(row_starts, stride_col, rows, width, total_rows, scale, BLOCK_W: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean and variance of each row times `scale`, [BLOCK_B] float32: pieces about their own means, then merged.

    Rounded divisions: with a GPU's approximate one the mean of a constant row misses the constant by a bit or two,
    which eps does not hide (an H100 gave errors of 0.006).
    """
    mean = tl.zeros(rows.shape, tl.float32)
    scatter = tl.zeros(rows.shape, tl.float32)
    for start in range(0, width, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        inside = (rows < total_rows)[:, None] & (w < width)[None, :]
        x = tl.load(row_starts[:, None] + w[None, :] * stride_col, mask=inside, other=0.0)
        x = x.to(tl.float32) * scale[:, None]
        seen = start * 1.0
        new = tl.minimum(width - start, BLOCK_W) * 1.0
        piece_mean = tl.div_rn(tl.sum(x, axis=1), tl.full(rows.shape, 0.0, tl.float32) + new)
        from_mean = tl.where(inside, x - piece_mean[:, None], 0.0)
        shift = piece_mean - mean
        part = tl.div_rn(
            tl.full(rows.shape, 0.0, tl.float32) + new, tl.full(rows.shape, 0.0, tl.float32) + (seen + new)
        )
        scatter += tl.sum(from_mean * from_mean, axis=1) + shift * shift * (seen * part)
        mean += shift * part
    return mean, scatter / width


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    row_starts, stride_col, rows, width, total_rows, scale, mean, rstd,
    weight, stride_weight, columns, last_column, WIDE_DOT: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """(row * scale - mean) * rstd, rounded to the weights' dtype, times the weights' `columns`: float32 sums."""
    sums = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, width, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        inside = (rows < total_rows)[:, None] & (w < width)[None, :]
        x = tl.load(row_starts[:, None] + w[None, :] * stride_col, mask=inside, other=0.0).to(tl.float32)
        x = (x * scale[:, None] - mean[:, None]) * rstd[:, None]
        used = (w < width)[:, None] & (columns < last_column)[None, :]
        p = tl.load(weight + w[:, None] * stride_weight + columns[None, :], mask=used, other=0.0)
        x = x.to(p.dtype)
        if WIDE_DOT:
            x, p = x.to(tl.float32), p.to(tl.float32)
        sums = tl.dot(x, p, sums, input_precision="ieee")
    return sums


@triton.jit
def _scale_stored(stored, stride, rows, total_rows, columns, factor, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiplies the rows [BLOCK_B, columns] that this program has stored by `factor` [BLOCK_B]."""
    tl.debug_barrier()  # other threads of the program may have written what this one reads
    for start in range(0, columns, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (rows < total_rows)[:, None] & (n < columns)[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride + n[None, :]
        tl.store(stored + offsets, tl.load(stored + offsets, mask=inside) * factor[:, None], mask=inside)


@triton.jit
def _pca_head_kernel(  # type: ignore[no-untyped-def]
    pooled, weight, bias, shift, embedding, reduced,
    total_rows, width, dim, k, k_start, stride_row, stride_col, stride_weight, eps, floor,
    WIDE: tl.constexpr, WIDE_DOT: tl.constexpr, WITH_EMBEDDING: tl.constexpr, NORMALIZE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_B rows, all columns.

    pooled [B, W] any float; weight [W, D' + K'] the same dtype, D' and K' padded with zeros; bias [D' + K'], shift
    [K'], embedding [B, D], reduced [B, K] float32. K's columns begin at k_start = D'.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_starts = pooled + rows.to(tl.int64) * stride_row
    if WIDE:
        scale = _row_scale(row_starts, stride_col, rows, width, total_rows, BLOCK_W)
    else:
        scale = tl.full((BLOCK_B,), 1.0, tl.float32)
    mean, variance = _row_moments(row_starts, stride_col, rows, width, total_rows, scale, BLOCK_W)
    # eps times a tiny scale may vanish, and then a constant row has nothing under the root.
    rstd = 1.0 / tl.sqrt(tl.maximum(variance + eps * scale * scale, 1e-30))

    squares = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(0, dim, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        z = _product(row_starts, stride_col, rows, width, total_rows, scale, mean, rstd,
                     weight, stride_weight, n, dim, WIDE_DOT, BLOCK_W)  # fmt: skip
        z += tl.load(bias + n, mask=n < dim, other=0.0)[None, :]
        squares += tl.sum(z * z, axis=1)
        if WITH_EMBEDDING:
            inside = (rows < total_rows)[:, None] & (n < dim)[None, :]
            tl.store(embedding + rows.to(tl.int64)[:, None] * dim + n[None, :], z, mask=inside)
    inverse = 1.0 / tl.maximum(tl.sqrt(squares), floor)
    if WITH_EMBEDDING:
        _scale_stored(embedding, dim, rows, total_rows, dim, inverse, BLOCK_N)

    squares = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(0, k, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        y = _product(row_starts, stride_col, rows, width, total_rows, scale, mean, rstd,
                     weight + k_start, stride_weight, n, k, WIDE_DOT, BLOCK_W)  # fmt: skip
        y = (y + tl.load(bias + k_start + n, mask=n < k, other=0.0)[None, :]) * inverse[:, None]
        y -= tl.load(shift + n, mask=n < k, other=0.0)[None, :]
        squares += tl.sum(y * y, axis=1)
        if NORMALIZE and ONE_TILE:
            y = y / tl.maximum(tl.sqrt(squares), 1e-12)[:, None]
        inside = (rows < total_rows)[:, None] & (n < k)[None, :]
        tl.store(reduced + rows.to(tl.int64)[:, None] * k + n[None, :], y, mask=inside)
    if NORMALIZE and not ONE_TILE:
        _scale_stored(reduced, k, rows, total_rows, k, 1.0 / tl.maximum(tl.sqrt(squares), 1e-12), BLOCK_N)


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """A head's weights, multiplied out for the kernel.

    Attributes:
        weight: [W, D' + K'] in the dtype of the states: [g P | g P V] times a power of two, each padded with zeros.
        bias: [D' + K'] float32: [b P | b P V], likewise.
        shift: [K'] float32: mean V.
        floor: The least length that h P, so scaled, is divided by.
        dim: D.
        k: K.
        eps: LayerNorm's.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor
    floor: float
    dim: int
    k: int
    eps: float

    @property
    def width(self) -> int:
        """W."""
        return int(self.weight.shape[0])

    @property
    def k_start(self) -> int:
        """D', where the columns of K begin."""
        return len(self.bias) - len(self.shift)


def head_weights(
    gain: Tensor,
    bias: Tensor,
    projection: Tensor,
    mean: Tensor,
    components: Tensor,
    *,
    dtype: torch.dtype,
    eps: float = LAYER_NORM_EPS,
) -> HeadWeights:
    """Multiplies a head's weights out, in float64; once a model, not once a call.

    Args:
        gain: As `pca_head_reference` takes them, and so the rest; of any float dtype, on the device to run on.
        bias: [W].
        projection: [W, D].
        mean: [D].
        components: [D, K].
        dtype: float16, bfloat16 or float32: that of the states.
        eps: LayerNorm's.

    Raises:
        KernelError: Shapes that do not go together, an unknown dtype, or values that are not finite.
    """
    check_dtype(dtype)
    if projection.ndim != 2 or components.ndim != 2 or not 1 <= components.shape[-1] <= projection.shape[-1]:
        raise KernelError(
            "The projection must be [W, D] and the components [D, K], K from 1 to D; got "
            f"{list(projection.shape)} and {list(components.shape)}."
        )
    (width, dim), k = projection.shape, components.shape[1]
    given = {"gain": gain, "bias": bias, "projection": projection, "mean": mean, "components": components}
    expected = {"gain": (width,), "bias": (width,), "mean": (dim,), "components": (dim, k)}
    check_shapes(given, expected)
    exact = {name: tensor.detach().double() for name, tensor in given.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in exact.values()):
        raise KernelError("The head's weights hold values that are not finite.")
    first = exact["gain"][:, None] * exact["projection"]
    offset = exact["bias"] @ exact["projection"]
    # The embedding's length is divided out, so a common factor changes nothing, and keeps half precision from
    # overflowing and from losing digits.
    largest = float(first.abs().max())
    factor = 2.0 ** -torch.frexp(torch.tensor(largest, dtype=torch.float64)).exponent.item() if largest else 1.0
    first, offset = first * factor, offset * factor
    second = first @ exact["components"]
    weight = torch.cat([padded(first), padded(second)], dim=1).to(dtype).contiguous()
    offsets = torch.cat([padded(offset[None])[0], padded((offset @ exact["components"])[None])[0]]).float()
    shift = padded((exact["mean"] @ exact["components"])[None])[0].float()
    # Not below what float32 can invert: a zero row is then 0 and not 0 / 0.
    return HeadWeights(weight, offsets, shift, max(EPS * factor, 1e-37), int(dim), int(k), eps)


def pca_head(
    pooled: Tensor,
    head: HeadWeights,
    *,
    with_embedding: bool = False,
    normalize: bool = True,
    config: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Runs the head on pooled states in one launch.

    Args:
        pooled: States before the final LayerNorm, [B, W], B from 0, in the weights' dtype. Any strides will do;
            where the distance of neighbours in a row times W is beyond 32 bits, it is copied first.
        head: What `head_weights` made.
        with_embedding: Whether the embedding is written too.
        normalize: Whether the PCA vectors are scaled to length 1.
        config: Name of a configuration; None takes the fastest, found at the first call with such a B.

    Returns:
        PCA vectors [B, K] float32; and embeddings [B, D] float32 of length 1, or None.

    Raises:
        KernelError: A wrong shape, dtype or device, or an unknown configuration.
    """
    check_rows("pca_head", _pca_head_kernel, pooled, head.width, head.weight)
    pooled = within_int32(pooled)
    rows, device = pooled.shape[0], pooled.device
    reduced = torch.empty(rows, head.k, device=device)
    embedding = torch.empty(rows, head.dim, device=device) if with_embedding else None
    half = pooled.dtype != torch.float32

    def run(config: KernelConfig) -> None:
        _pca_head_kernel[(triton.cdiv(rows, config.rows),)](
            pooled, head.weight, head.bias, head.shift, reduced if embedding is None else embedding, reduced,
            rows, head.width, head.dim, head.k, head.k_start, pooled.stride(0), pooled.stride(1), head.weight.stride(0),
            head.eps, head.floor,
            WIDE=pooled.dtype != torch.float16, WIDE_DOT=wide_dot(_pca_head_kernel, pooled.dtype),
            WITH_EMBEDDING=with_embedding, NORMALIZE=normalize,
            ONE_TILE=head.k <= config.columns,
            BLOCK_B=config.rows, BLOCK_N=config.columns, BLOCK_W=config.inner,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    where = None if interpreted(_pca_head_kernel) or not rows else device
    key = ("pca_head", where, pooled.dtype, bucket(rows), head.width, head.dim, head.k, with_embedding)
    chosen = chosen_config(HALF_CONFIGS if half else SINGLE_CONFIGS, config, run, key)
    if rows:
        run(chosen)
    return reduced, embedding
