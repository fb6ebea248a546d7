from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, Case, assert_bounded, rows

from longclip_rt.errors import KernelError
from longclip_rt.kernels.pca_head import (
    HALF_CONFIGS,
    SINGLE_CONFIGS,
    HeadWeights,
    head_weights,
    pca_head,
    pca_head_reference,
)

FEW = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def check(case: Case, states: torch.Tensor, *, normalize: bool = True, config: str | None = None) -> None:
    head = head_weights(*case.parts(), dtype=states.dtype)
    what = f"{list(states.shape)} D {head.dim} K {head.k} {states.dtype} {config}"
    exact = pca_head_reference(states.double(), *case.parts(), normalize=normalize)
    theirs = pca_head_reference(states, *case.parts(states.dtype), normalize=normalize)
    reduced, embedding = pca_head(states, head, with_embedding=True, normalize=normalize, config=config)
    assert embedding is not None
    assert_bounded(embedding, exact[0], theirs[0], states.dtype, f"embedding {what}")
    assert_bounded(reduced, exact[1], theirs[1], states.dtype, f"PCA {what}")
    alone, nothing = pca_head(states, head, normalize=normalize, config=config)
    assert nothing is None
    # On a GPU the two may have been given different configurations.
    torch.testing.assert_close(alone, reduced, rtol=0, atol=0 if states.device.type == "cpu" else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "dim", "k"), [(1, 1, 1), (97, 61, 61), (127, 129, 65)])
def test_one_primes_and_neighbours_of_powers_of_two(
    width: int, dim: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(Case.seeded(width, dim, k, device=device), rows(3, width, dtype, device=device))


@pytest.mark.parametrize(
    ("width", "dim", "k", "cpu_dtype"),
    [
        (512, 512, 64, torch.float16),
        (768, 512, 100, torch.bfloat16),
        (768, 768, 32, torch.float32),
        (1024, 768, 127, torch.float16),
    ],
)
def test_the_real_widths(width: int, dim: int, k: int, cpu_dtype: torch.dtype, device: torch.device) -> None:
    # The interpreter takes seconds for each, so there each width has one dtype.
    for dtype in (cpu_dtype,) if device.type == "cpu" else DTYPES:
        check(Case.seeded(width, dim, k, device=device), rows(3, width, dtype, device=device))


@FEW
@given(
    count=st.sampled_from([1, 2, 15, 16, 17, 33, 65]),
    width=st.integers(1, 160),
    dim=st.integers(1, 150),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    normalize=st.booleans(),
    spread=st.sampled_from([1e-3, 1.0, 100.0]),
    offset=st.sampled_from([0.0, 3.0, -20.0]),
)
def test_any_shape(
    count: int,
    width: int,
    dim: int,
    data: st.DataObject,
    dtype: torch.dtype,
    normalize: bool,
    spread: float,
    offset: float,
    device: torch.device,
) -> None:
    # A PCA that keeps next to nothing of a vector cannot be normalised in half precision, by anybody.
    k = data.draw(st.integers(max(1, dim // 8), dim))
    states = (rows(count, width, torch.float64, seed=count, device=device) * spread + offset).to(dtype)
    check(Case.seeded(width, dim, k, seed=dim, device=device), states, normalize=normalize or k < 8)


@pytest.mark.parametrize("config", [config.name for config in (*HALF_CONFIGS, *SINGLE_CONFIGS)])
@pytest.mark.parametrize("k", [16, 130])
def test_every_configuration_with_one_tile_and_with_many(config: str, k: int, device: torch.device) -> None:
    for dtype in (torch.float32,) if "single" in config else (torch.float16, torch.bfloat16):
        check(Case.seeded(70, 140, k, device=device), rows(67, 70, dtype, device=device), config=config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_constant_and_huge_rows_give_what_the_reference_gives(dtype: torch.dtype, device: torch.device) -> None:
    largest = torch.finfo(dtype).max
    states = rows(8, 64, torch.float64, device=device)
    states[0] = 0
    states[1] = 3.0
    states[2] = states[2] / states[2].abs().max() * largest * 0.99
    states[3] = largest
    states[4] = 1e-7 * states[4]
    states[5, :] = 0
    states[5, 7] = largest
    check(Case.seeded(64, 48, 20, device=device), states.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_embedding_is_divided_by_eps_and_not_by_zero(dtype: torch.dtype, device: torch.device) -> None:
    case = Case.seeded(40, 24, 5, device=device)
    case.bias.zero_()
    states = torch.zeros(3, 40, dtype=dtype, device=device)
    check(case, states)
    case.mean.zero_()
    reduced, embedding = pca_head(states, head_weights(*case.parts(), dtype=dtype), with_embedding=True)
    assert embedding is not None and not reduced.any() and not embedding.any()


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_weights_of_any_size_keep_their_digits(factor: float, device: torch.device) -> None:
    """The projection is scaled by a power of two, and eps with it: half precision would overflow, or hold zeros."""
    case = Case.seeded(64, 48, 20, device=device)
    states = rows(5, 64, torch.float16, device=device)
    exact = pca_head_reference(states.double(), *case.parts())
    case.projection *= factor
    if factor == 1e-30:  # then every embedding is shorter than eps
        exact = pca_head_reference(states.double(), *case.parts())
    got = pca_head(states, head_weights(*case.parts(), dtype=torch.float16), with_embedding=True)
    for ours, wanted in zip((got[1], got[0]), exact, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=1e-3)
    case.bias.zero_()
    nothing = torch.zeros(2, 64, dtype=torch.float16, device=device)
    _, embedding = pca_head(nothing, head_weights(*case.parts(), dtype=torch.float16), with_embedding=True)
    assert embedding is not None and not embedding.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_states_are_read_where_they_are(dtype: torch.dtype, device: torch.device) -> None:
    case = Case.seeded(48, 40, 9, device=device)
    tokens = rows(6 * 5, 48, dtype, device=device).reshape(6, 5, 48)
    check(case, tokens[:, 3])  # the rows of a [B, S, W] tensor
    check(case, rows(48, 6, dtype, device=device).T)
    check(case, rows(1, 48, dtype, device=device).expand(4, 48))
    check(case, rows(6, 96, dtype, device=device)[::2, ::2])


def test_no_rows_give_no_rows(device: torch.device) -> None:
    case = Case.seeded(48, 40, 9, device=device)
    check(case, rows(0, 48, torch.float16, device=device))


def test_many_rows_are_many_programs(device: torch.device) -> None:
    case = Case.seeded(16, 16, 4, device=device)
    states = rows(16385 if device.type == "cpu" else 65536, 16, torch.float16, device=device)
    reduced, _ = pca_head(states, head_weights(*case.parts(), dtype=torch.float16), config="half_many")
    exact = pca_head_reference(states.double(), *case.parts(), normalize=True)[1]
    theirs = pca_head_reference(states, *case.parts(torch.float16))[1]
    assert_bounded(reduced, exact, theirs, torch.float16)


def head(device: torch.device, dtype: torch.dtype = torch.float16) -> HeadWeights:
    return head_weights(*Case.seeded(48, 40, 9, device=device).parts(), dtype=dtype)


def test_what_does_not_fit_is_said(device: torch.device) -> None:
    with pytest.raises(KernelError, match=r"takes rows \[B, 48\]; got \[2, 47\]"):
        pca_head(rows(2, 47, torch.float16, device=device), head(device))
    with pytest.raises(KernelError, match=r"takes rows \[B, 48\]; got \[48\]"):
        pca_head(rows(2, 48, torch.float16, device=device)[0], head(device))
    with pytest.raises(KernelError, match=r"torch.float32 rows for torch.float16 weights"):
        pca_head(rows(2, 48, torch.float32, device=device), head(device))
    with pytest.raises(KernelError, match=r"rows on meta and weights on"):
        pca_head(torch.empty(2, 48, dtype=torch.float16, device="meta"), head(device))
    with pytest.raises(KernelError, match=r"no configuration 'fast'; there are half_few, half_many"):
        pca_head(rows(2, 48, torch.float16, device=device), head(device), config="fast")


def test_weights_that_do_not_go_together_are_said(device: torch.device) -> None:
    case = Case.seeded(48, 40, 9, device=device)
    gain, bias, projection, mean, components = case.parts()
    with pytest.raises(KernelError, match=r"float16, bfloat16 or float32; got torch.float64"):
        head_weights(*case.parts(), dtype=torch.float64)
    with pytest.raises(KernelError, match=r"bias must be \[48\] beside the other weights; got \[40\]"):
        head_weights(gain, mean, projection, mean, components, dtype=torch.float16)
    with pytest.raises(KernelError, match=r"components \[D, K\], K from 1 to D"):
        head_weights(gain, bias, projection, mean, components[:, :0], dtype=torch.float16)
    with pytest.raises(KernelError, match=r"components must be \[40, 9\]"):
        head_weights(gain, bias, projection, mean, components[:30], dtype=torch.float16)
    projection[3, 3] = float("nan")
    with pytest.raises(KernelError, match=r"not finite"):
        head_weights(gain, bias, projection, mean, components, dtype=torch.float16)
