"""Normalised embeddings [B, D] to their PCA [B, K], and its twin that goes back to D: one launch each.

Centring is moved behind the product, (z - mean) V = z V - mean V, with the last term computed from the rounded V, so
that nothing is lost to rounding but in the float32 sums.
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
    Step,
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
from longclip_rt.kernels.pca_head import EPS, row_scale, scale_stored


def pca_project_reference(embedding: Tensor, mean: Tensor, components: Tensor, *, normalize: bool = True) -> Tensor:
    """(z - mean) V in plain torch, in the dtype of its arguments.

    Args:
        embedding: z, [B, D].
        mean: [D].
        components: V, [D, K].
        normalize: Whether rows are scaled to length 1.

    Returns:
        [B, K].
    """
    reduced = (embedding - mean) @ components
    return F.normalize(reduced, dim=-1, eps=EPS) if normalize else reduced


def pca_reconstruct_reference(embedding: Tensor, mean: Tensor, components: Tensor, *, normalize: bool = True) -> Tensor:
    """mean + (z - mean) V V' in plain torch, in the dtype of its arguments: [B, D] to [B, D]."""
    coarse = mean + (embedding - mean) @ components @ components.T
    return F.normalize(coarse, dim=-1, eps=EPS) if normalize else coarse


HALF_CONFIGS = (
    KernelConfig("half_few", rows=16, columns=128, inner=64, warps=4, stages=4),
    KernelConfig("half_many", rows=64, columns=64, inner=64, warps=8, stages=3),
)
SINGLE_CONFIGS = (KernelConfig("single", rows=16, columns=64, inner=32, warps=4, stages=2),)
# The twin holds all K numbers of its rows in registers, so there is a largest K for it. Beyond, one product with the
# [D, D] matrix V V' takes over, which costs the less extra the larger K is.
HALF_TWIN_CONFIGS = (
    KernelConfig("half_few", rows=16, columns=128, inner=64, warps=4, stages=3),
    KernelConfig("half_many", rows=64, columns=128, inner=32, warps=8, stages=3),
)
SINGLE_TWIN_CONFIGS = (KernelConfig("single", rows=16, columns=64, inner=32, warps=4, stages=3),)


@triton.jit
def _rows_times(  # type: ignore[no-untyped-def]
    row_starts, stride_col, rows, inner, total_rows, scale, weight, stride_weight, columns, last_column,
    WIDE_DOT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """rows [BLOCK_B, inner] * scale, times the weights' `columns`: float32 sums. `scale` is a power of two: exact."""
    sums = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, inner, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (rows < total_rows)[:, None] & (d < inner)[None, :]
        z = tl.load(row_starts[:, None] + d[None, :] * stride_col, mask=inside, other=0.0)
        used = (d < inner)[:, None] & (columns < last_column)[None, :]
        v = tl.load(weight + d[:, None] * stride_weight + columns[None, :], mask=used, other=0.0)
        z = (z.to(tl.float32) * scale[:, None]).to(v.dtype)
        if WIDE_DOT:
            z, v = z.to(tl.float32), v.to(tl.float32)
        sums = tl.dot(z, v, sums, input_precision="ieee")
    return sums


@triton.jit
def _pca_project_kernel(  # type: ignore[no-untyped-def]
    embedding, weight, shift, result,
    total_rows, dim, columns, stride_row, stride_col, stride_weight,
    WIDE: tl.constexpr, WIDE_DOT: tl.constexpr, NORMALIZE: tl.constexpr, ONE_TILE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_B rows of z M - shift, scaled to length 1 if asked.

    embedding [B, D] any float; weight M [D, N'] the same dtype; shift [N'] and result [B, N] float32.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_starts = embedding + rows.to(tl.int64) * stride_row
    scale = tl.full((BLOCK_B,), 1.0, tl.float32)
    if WIDE:
        scale = row_scale(row_starts, stride_col, rows, dim, total_rows, BLOCK_D)
    # The result is computed times `scale`, and so is the least length; both may vanish, and then 0 / 0 must be 0.
    floor = tl.maximum(1e-12 * scale, 1e-30)
    squares = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(0, columns, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        y = _rows_times(row_starts, stride_col, rows, dim, total_rows, scale, weight, stride_weight, n, columns,
                        WIDE_DOT, BLOCK_D)  # fmt: skip
        y -= tl.load(shift + n, mask=n < columns, other=0.0)[None, :] * scale[:, None]
        squares += tl.sum(y * y, axis=1)
        if NORMALIZE and ONE_TILE:
            y = y / tl.maximum(tl.sqrt(squares), floor)[:, None]
        if not NORMALIZE:
            y = y / scale[:, None]
        inside = (rows < total_rows)[:, None] & (n < columns)[None, :]
        tl.store(result + rows.to(tl.int64)[:, None] * columns + n[None, :], y, mask=inside)
    if NORMALIZE and not ONE_TILE:
        scale_stored(result, columns, rows, total_rows, columns, 1.0 / tl.maximum(tl.sqrt(squares), floor), BLOCK_N)


@triton.jit
def _pca_reconstruct_kernel(  # type: ignore[no-untyped-def]
    embedding, weight, back, shift, mean, result,
    total_rows, dim, k, stride_row, stride_col, stride_weight, stride_back,
    WIDE: tl.constexpr, WIDE_DOT: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_B rows of mean + (z V - shift) V', scaled to length 1 if asked; K <= BLOCK_K.

    embedding [B, D] any float; weight V [D, K'] and back V' [K, D'] the same dtype; shift [K'], mean [D] and result
    [B, D] float32.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_starts = embedding + rows.to(tl.int64) * stride_row
    scale = tl.full((BLOCK_B,), 1.0, tl.float32)
    if WIDE:
        scale = row_scale(row_starts, stride_col, rows, dim, total_rows, BLOCK_D)
    floor = tl.maximum(1e-12 * scale, 1e-30)
    kept = tl.arange(0, BLOCK_K)
    y = _rows_times(row_starts, stride_col, rows, dim, total_rows, scale, weight, stride_weight, kept, k,
                    WIDE_DOT, BLOCK_D)  # fmt: skip
    y -= tl.load(shift + kept, mask=kept < k, other=0.0)[None, :] * scale[:, None]
    small = y.to(weight.dtype.element_ty)
    squares = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(0, dim, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        used = (kept < k)[:, None] & (n < dim)[None, :]
        v = tl.load(back + kept[:, None] * stride_back + n[None, :], mask=used, other=0.0)
        if WIDE_DOT:
            r = tl.dot(small.to(tl.float32), v.to(tl.float32), input_precision="ieee")
        else:
            r = tl.dot(small, v, input_precision="ieee")
        r += tl.load(mean + n, mask=n < dim, other=0.0)[None, :] * scale[:, None]
        squares += tl.sum(r * r, axis=1)
        if not NORMALIZE:
            r = r / scale[:, None]
        inside = (rows < total_rows)[:, None] & (n < dim)[None, :]
        tl.store(result + rows.to(tl.int64)[:, None] * dim + n[None, :], r, mask=inside)
    if NORMALIZE:
        scale_stored(result, dim, rows, total_rows, dim, 1.0 / tl.maximum(tl.sqrt(squares), floor), BLOCK_N)


@dataclass(frozen=True, eq=False)
class PcaWeights:
    """A PCA's weights, prepared for the kernels.

    Attributes:
        weight: V [D, K'] in the dtype of the embeddings, padded with zeros.
        shift: mean V [K'] float32, of the rounded V.
        mean: [D] float32.
        back: V' [K, D'] in the dtype of the embeddings.
        square: V V' [D, D'] likewise, for reconstruction with a K beyond the twin's; None below.
        square_shift: mean V V' - mean [D'] float32, of the rounded matrix; None with it.
        k: K.
    """

    weight: Tensor
    shift: Tensor
    mean: Tensor
    back: Tensor
    square: Tensor | None
    square_shift: Tensor | None
    k: int

    @property
    def dim(self) -> int:
        """D."""
        return len(self.mean)


def twin_limit(dtype: torch.dtype) -> int:
    """The largest K that the reconstruction holds in registers."""
    return 64 if dtype == torch.float32 else 128


def pca_weights(mean: Tensor, components: Tensor, *, dtype: torch.dtype) -> PcaWeights:
    """Prepares a PCA for the kernels; once, not once a call.

    Args:
        mean: [D], any float dtype, on the device to run on.
        components: V [D, K], orthonormal columns, K from 1 to D.
        dtype: float16, bfloat16 or float32: that of the embeddings.

    Raises:
        KernelError: Shapes that do not go together, an unknown dtype, or values that are not finite.
    """
    check_dtype(dtype)
    if components.ndim != 2 or not 1 <= components.shape[1] <= components.shape[0]:
        raise KernelError(f"The components must be [D, K], K from 1 to D; got {list(components.shape)}.")
    dim, k = components.shape
    check_shapes({"mean": mean}, {"mean": (dim,)})
    mean, components = mean.detach().double(), components.detach().double()
    if not bool(mean.isfinite().all()) or not bool(components.isfinite().all()):
        raise KernelError("The PCA holds values that are not finite.")
    weight = padded(components).to(dtype)
    square = square_shift = None
    if k > twin_limit(dtype):
        square = padded(components @ components.T).to(dtype)
        square_shift = (mean @ square.double() - padded(mean[None])[0]).float()
    shift = (mean @ weight.double()).float()
    back = padded(components.T).to(dtype).contiguous()
    return PcaWeights(weight.contiguous(), shift, mean.float(), back, square, square_shift, k)


def pca_project(embedding: Tensor, weights: PcaWeights, *, normalize: bool = True, config: str | None = None) -> Tensor:
    """(z - mean) V in one launch.

    Args:
        embedding: z, [B, D], B from 0, in the weights' dtype, with any strides.
        weights: What `pca_weights` made.
        normalize: Whether rows are scaled to length 1.
        config: Name of a configuration; None takes the fastest, found at the first call with such a B.

    Returns:
        [B, K] float32.

    Raises:
        KernelError: A wrong shape, dtype or device, or an unknown configuration.
    """
    return _project("pca_project", embedding, weights, weights.weight, weights.shift, weights.k, normalize, config)


def pca_reconstruct(
    embedding: Tensor, weights: PcaWeights, *, normalize: bool = True, config: str | None = None
) -> Tensor:
    """mean + (z - mean) V V' in one launch: the embedding without what the K directions do not hold.

    Args:
        embedding: z, [B, D], B from 0, in the weights' dtype, with any strides.
        weights: What `pca_weights` made.
        normalize: Whether rows are scaled to length 1.
        config: Name of a configuration; None takes the fastest, found at the first call with such a B.

    Returns:
        [B, D] float32.

    Raises:
        KernelError: A wrong shape, dtype or device, or an unknown configuration.
    """
    if weights.square is not None and weights.square_shift is not None:
        square, shift = weights.square, weights.square_shift
        return _project("pca_reconstruct", embedding, weights, square, shift, weights.dim, normalize, config)
    check_rows("pca_reconstruct", _pca_reconstruct_kernel, embedding, weights.dim, weights.weight)
    embedding = within_int32(embedding)
    rows = embedding.shape[0]
    result = torch.empty(rows, weights.dim, device=embedding.device)

    def run(config: KernelConfig) -> None:
        _pca_reconstruct_kernel[(triton.cdiv(rows, config.rows),)](
            embedding, weights.weight, weights.back, weights.shift, weights.mean, result,
            rows, weights.dim, weights.k, embedding.stride(0), embedding.stride(1),
            weights.weight.stride(0), weights.back.stride(0),
            WIDE=embedding.dtype != torch.float16, WIDE_DOT=wide_dot(_pca_reconstruct_kernel, embedding.dtype),
            NORMALIZE=normalize, BLOCK_B=config.rows, BLOCK_N=config.columns, BLOCK_D=config.inner,
            BLOCK_K=twin_block(weights.k), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    configs = SINGLE_TWIN_CONFIGS if embedding.dtype == torch.float32 else HALF_TWIN_CONFIGS
    key = _key("pca_reconstruct", _pca_reconstruct_kernel, embedding, weights.k)
    chosen = chosen_config(configs, config, run, key)
    if rows:
        run(chosen)
    return result


def twin_block(k: int) -> int:
    """K rounded up to what a tile can hold: a power of two from 16."""
    return max(16, bucket(k))


def _key(name: str, kernel: object, embedding: Tensor, columns: int) -> tuple[object, ...]:
    where = None if interpreted(kernel) or not len(embedding) else embedding.device
    return (name, where, embedding.dtype, bucket(len(embedding)), embedding.shape[1], columns)


def _project(
    name: str,
    embedding: Tensor,
    weights: PcaWeights,
    matrix: Tensor,
    shift: Tensor,
    columns: int,
    normalize: bool,
    config: str | None,
) -> Tensor:
    """z `matrix` - `shift`, the first `columns` of it."""
    check_rows(name, _pca_project_kernel, embedding, weights.dim, matrix)
    embedding = within_int32(embedding)
    rows = embedding.shape[0]
    result = torch.empty(rows, columns, device=embedding.device)

    def run(config: KernelConfig) -> None:
        _pca_project_kernel[(triton.cdiv(rows, config.rows),)](
            embedding, matrix, shift, result,
            rows, weights.dim, columns, embedding.stride(0), embedding.stride(1), matrix.stride(0),
            WIDE=embedding.dtype != torch.float16, WIDE_DOT=wide_dot(_pca_project_kernel, embedding.dtype),
            NORMALIZE=normalize, ONE_TILE=columns <= config.columns,
            BLOCK_B=config.rows, BLOCK_N=config.columns, BLOCK_D=config.inner,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    configs = SINGLE_CONFIGS if embedding.dtype == torch.float32 else HALF_CONFIGS
    chosen = chosen_config(configs, config, run, _key(name, _pca_project_kernel, embedding, columns))
    if rows:
        run(chosen)
    return result


def pca_project_steps(rows: int, dim: int, k: int, size: int) -> dict[str, list[Step]]:
    """What `pca_project` and an operator at a time move and compute; arguments as in `pca_head_steps`."""
    embedding, reduced = rows * dim * size, rows * k * size
    product = 2 * rows * dim * k
    return {
        "kernel": [Step("pca_project", embedding + dim * k * size + 4 * k + 4 * rows * k, product)],
        "unfused": [
            Step("centre", 2 * embedding),
            Step("components", embedding + dim * k * size + reduced, product),
            Step("L2 norm", 2 * reduced),
        ],
    }


def pca_reconstruct_steps(rows: int, dim: int, k: int, size: int) -> dict[str, list[Step]]:
    """What `pca_reconstruct` (K within `twin_limit`) and an operator at a time move and compute."""
    embedding, reduced = rows * dim * size, rows * k * size
    product, weights = 2 * rows * dim * k, dim * k * size
    fused = embedding + 2 * weights + 4 * (dim + k) + 4 * rows * dim
    return {
        "kernel": [Step("pca_reconstruct", fused, 2 * product)],
        "unfused": [
            Step("centre", 2 * embedding),
            Step("components", embedding + weights + reduced, product),
            Step("back", reduced + weights + embedding, product),
            Step("add the mean", 2 * embedding),
            Step("L2 norm", 2 * embedding),
        ],
    }
