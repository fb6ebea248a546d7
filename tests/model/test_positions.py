from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from longclip_rt.errors import WeightsError
from longclip_rt.model.positions import fold_positions, stretch_positions


def table_of(rows: int = 77, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def stretched_in_float64(p: np.ndarray) -> np.ndarray:
    """The three rules of longclip's stretching from 77 rows to 248, one row at a time."""
    p = p.astype(np.float64)
    rows = np.full((248, p.shape[1]), np.nan)
    for r in range(20):
        rows[r] = p[r]
    for i in range(56):
        for k in range(4):
            rows[20 + 4 * i + k] = (1 - k / 4) * p[20 + i] + (k / 4) * p[21 + i]
    for k in range(4):
        rows[244 + k] = p[76] + (k / 4) * (p[76] - p[75])
    return rows


def test_stretching_follows_the_definition_row_by_row() -> None:
    table = table_of()
    expected = stretched_in_float64(table)
    assert not np.isnan(expected).any()
    np.testing.assert_allclose(stretch_positions(table), expected, rtol=0, atol=5e-7)


def test_first_rows_are_copied_and_every_fourth_later_row_is_an_old_one() -> None:
    table = table_of()
    stretched = stretch_positions(table)
    np.testing.assert_array_equal(stretched[:20], table[:20])
    np.testing.assert_array_equal(stretched[20::4], table[20:])


def test_the_edge_continues_the_last_step_in_a_straight_line() -> None:
    table = table_of()
    edge = stretch_positions(table)[244:]
    step = (table[76] - table[75]) / 4
    np.testing.assert_array_equal(edge[0], table[76])
    np.testing.assert_allclose(np.diff(edge, axis=0), np.broadcast_to(step, (3, 6)), rtol=0, atol=5e-7)


def test_rows_between_the_first_and_the_edge_equal_torchs_interpolation() -> None:
    table = torch.from_numpy(table_of(width=16))
    # With align_corners, 4 * 56 + 1 samples between the 57 stretched rows fall exactly on quarters.
    samples = F.interpolate(table[20:].T[None], size=225, mode="linear", align_corners=True)[0].T
    torch.testing.assert_close(stretch_positions(table)[20:245], samples, rtol=0, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 40), keep=st.integers(0, 12), ratio=st.integers(1, 6), width=st.sampled_from([1, 3, 8]))
def test_a_straight_line_stays_one(rows: int, keep: int, ratio: int, width: int) -> None:
    slope = np.arange(1, width + 1, dtype=np.float32)
    line = np.arange(keep + rows, dtype=np.float32)[:, None] * slope
    stretched = stretch_positions(line, keep=keep, ratio=ratio)
    assert stretched.shape == (keep + ratio * rows, width)
    position = np.concatenate([np.arange(keep), keep + np.arange(ratio * rows) / ratio])
    np.testing.assert_allclose(stretched, position[:, None] * slope, rtol=1e-5, atol=1e-5)


def test_ratio_one_changes_nothing() -> None:
    table = table_of()
    np.testing.assert_array_equal(stretch_positions(table, ratio=1), table)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_stretched_in_fp32(dtype: torch.dtype) -> None:
    table = torch.from_numpy(table_of()).to(dtype)
    stretched = stretch_positions(table)
    assert stretched.dtype == torch.float32
    expected = torch.from_numpy(stretched_in_float64(table.double().numpy()))
    # The error of fp32; in the table's own half precision it would be a thousand times larger.
    torch.testing.assert_close(stretched.double(), expected, rtol=0, atol=5e-7)


def test_arrays_give_arrays_and_tensors_give_tensors_with_the_same_numbers() -> None:
    table = table_of()
    from_array, from_tensor = stretch_positions(table), stretch_positions(torch.from_numpy(table))
    assert isinstance(from_array, np.ndarray) and from_array.dtype == np.float32
    assert isinstance(from_tensor, torch.Tensor) and from_tensor.is_contiguous()
    np.testing.assert_array_equal(from_array, from_tensor.numpy())


def test_the_given_table_is_neither_changed_nor_shared() -> None:
    table = torch.from_numpy(table_of(width=12))[:, ::2].requires_grad_()
    before = table.detach().clone()
    stretched = stretch_positions(table)
    stretched.zero_()
    torch.testing.assert_close(table.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(21, 4), (77,), (1, 77, 4), (0, 4)])
def test_tables_that_cannot_be_stretched_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightsError, match=r"at least 22 rows .* got \["):
        stretch_positions(np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize(("keep", "ratio"), [(-1, 4), (20, 0)])
def test_senseless_numbers_are_refused(keep: int, ratio: int) -> None:
    with pytest.raises(WeightsError, match=f"got keep={keep} and ratio={ratio}"):
        stretch_positions(table_of(), keep=keep, ratio=ratio)


def test_folding_takes_the_first_rows_of_the_base_and_the_others_of_the_second_table() -> None:
    base, res = table_of(248, seed=1), table_of(248, seed=2)
    folded = fold_positions(base, res)
    mask = (np.arange(248) < 20)[:, None]
    np.testing.assert_array_equal(folded, base * mask + res * ~mask)


def test_folding_gives_fp32_of_the_kind_given() -> None:
    base, res = (torch.from_numpy(table_of(248, seed=seed)).half() for seed in (1, 2))
    folded = fold_positions(base, res, keep=5)
    torch.testing.assert_close(folded, torch.cat([base[:5], res[5:]]).float(), rtol=0, atol=0)


def test_tables_of_different_shapes_are_not_folded() -> None:
    with pytest.raises(WeightsError, match=r"got \[248, 6\] and \[77, 6\]"):
        fold_positions(table_of(248), table_of(77))
