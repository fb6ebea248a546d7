"""Text position tables: knowledge-preserved stretching from 77 to 248 rows, and folding two tables into one.

Source: Long-CLIP (arXiv 2403.15378), section "Knowledge-Preserved Stretching", and the reference code for the edge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from longclip_rt.errors import WeightsError

if TYPE_CHECKING:
    import torch

Table = TypeVar("Table", "np.ndarray[Any, np.dtype[Any]]", "torch.Tensor")

KEPT_ROWS = 20
"""Rows that training on short captions has shaped well: the paper's "actual effective length" of CLIP."""

STRETCH_RATIO = 4
"""Length of a step between two old rows, in new rows: 20 + 4 * (77 - 20) = 248."""


def stretch_positions(table: Table, keep: int = KEPT_ROWS, ratio: int = STRETCH_RATIO) -> Table:
    """Stretches a position table, leaving its first rows as they are (Long-CLIP, "Knowledge-Preserved Stretching").

    With p the given table of n rows, the result holds
    - rows 0 .. keep - 1: copies of p's;
    - for i = 0 .. n - keep - 2 and k = 0 .. ratio - 1, row keep + ratio * i + k:
      `((ratio - k) * p[keep + i] + k * p[keep + i + 1]) / ratio`;
    - the edge, for k = 0 .. ratio - 1, the last `ratio` rows: `p[n - 1] + k * (p[n - 1] - p[n - 2]) / ratio`.
      There is no next row to interpolate towards, so the last step is continued in a straight line.

    Args:
        table: Position table [n, W], any float type, numpy array or torch tensor (on any device).
        keep: How many leading rows to copy.
        ratio: How many new rows replace each of the others.

    Returns:
        The table [keep + ratio * (n - keep), W], float32, of the kind (and on the device) that was given.

    Raises:
        WeightsError: The table is no array of numbers, is not two-dimensional, or has fewer than keep + 2 rows: the
            edge needs two.
    """
    if not isinstance(keep, int) or not isinstance(ratio, int) or keep < 0 or ratio < 1:
        raise WeightsError(
            f"Stretching needs whole numbers keep >= 0 and ratio >= 1; got keep={keep!r} and ratio={ratio!r}."
        )
    if not hasattr(table, "ndim"):
        raise WeightsError(f"A position table is a numpy array or a torch tensor; got {type(table).__name__}.")
    if table.ndim != 2 or table.shape[0] < keep + 2:
        raise WeightsError(
            f"A position table to stretch has the shape [rows, width] with at least {keep + 2} rows "
            f"({keep} kept, and two for the last step); got {list(table.shape)}."
        )
    rows = _float32(table)
    steps = np.arange(ratio, dtype=np.float32)[None, :, None]  # k: [1, ratio, 1]
    here, after = rows[keep:-1, None], rows[keep + 1 :, None]  # [n - keep - 1, 1, W]
    inner = ((ratio - steps) * here + steps * after) / np.float32(ratio)  # [n - keep - 1, ratio, W]
    edge = rows[-1] + steps[0] * (rows[-1] - rows[-2]) / np.float32(ratio)  # [ratio, W]
    stretched: Table = _like(np.concatenate([rows[:keep], inner.reshape(-1, rows.shape[1]), edge]), table)
    return stretched


def fold_positions(base: Table, res: Table, keep: int = KEPT_ROWS) -> Table:
    """Folds Long-CLIP's two position tables into the one that they amount to.

    The reference adds `base * mask1 + res * mask2`, where mask1 is 1 on rows < keep and mask2 on the others.

    Args:
        base: The frozen table [n, W] (`positional_embedding`).
        res: The trained table [n, W] (`positional_embedding_res`).
        keep: The first row that comes from `res`.

    Returns:
        The table [n, W], float32, of the kind (and on the device) of `base`.

    Raises:
        WeightsError: The two tables differ in shape, are not two-dimensional, or have fewer than `keep` rows.
    """
    if base.ndim != 2 or base.shape != res.shape or base.shape[0] < keep:
        raise WeightsError(
            f"The two position tables must have one shape [rows >= {keep}, width]; "
            f"got {list(base.shape)} and {list(res.shape)}."
        )
    folded: Table = _like(np.concatenate([_float32(base)[:keep], _float32(res)[keep:]]), base)
    return folded


def _float32(table: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    try:
        given = table if isinstance(table, np.ndarray) else table.detach().float().cpu().numpy()
        return np.asarray(given).astype(np.float32, casting="same_kind", copy=False)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"A position table holds real numbers; got one of {table.dtype} ({error}).") from error


def _like(rows: np.ndarray[Any, np.dtype[np.float32]], table: Any) -> Any:
    if isinstance(table, np.ndarray):
        return rows
    import torch

    return torch.from_numpy(np.ascontiguousarray(rows)).to(table.device)
