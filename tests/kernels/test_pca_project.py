from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, Case, assert_bounded, embeddings, rows
from torch import Tensor

from longclip_rt.errors import KernelError
from longclip_rt.kernels.pca_project import (
    HALF_CONFIGS,
    HALF_TWIN_CONFIGS,
    SINGLE_CONFIGS,
    pca_project,
    pca_project_reference,
    pca_reconstruct,
    pca_reconstruct_reference,
    pca_weights,
    twin_limit,
)

FEW = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BOTH: list[tuple[Callable[..., Tensor], Callable[..., Tensor]]] = [
    (pca_project, pca_project_reference),
    (pca_reconstruct, pca_reconstruct_reference),
]


def check(case: Case, vectors: Tensor, *, normalize: bool = True, config: str | None = None) -> None:
    dtype = vectors.dtype
    weights = pca_weights(case.mean, case.components, dtype=dtype)
    for kernel, reference in BOTH:
        exact = reference(vectors.double(), case.mean, case.components, normalize=normalize)
        theirs = reference(vectors, case.mean.to(dtype), case.components.to(dtype), normalize=normalize)
        got = kernel(vectors, weights, normalize=normalize, config=config)
        what = f"{kernel.__name__} {list(vectors.shape)} K {weights.k} {dtype} {config}"
        assert_bounded(got, exact, theirs, dtype, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "k"), [(512, 64), (768, 20), (1024, 33), (1, 1), (61, 61), (129, 65), (255, 127)])
def test_the_real_widths_primes_and_neighbours_of_powers_of_two(
    dim: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    case = Case.seeded(1, dim, k, device=device)
    check(case, embeddings(case, 3, dtype))


@FEW
@given(
    count=st.sampled_from([1, 2, 15, 16, 17, 33, 65]),
    dim=st.integers(1, 160),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    normalize=st.booleans(),
)
def test_any_shape(
    count: int, dim: int, data: st.DataObject, dtype: torch.dtype, normalize: bool, device: torch.device
) -> None:
    k = data.draw(st.integers(max(1, dim // 8), dim))
    case = Case.seeded(1, dim, k, seed=dim, device=device)
    check(case, embeddings(case, count, dtype), normalize=normalize and k >= 8)


@pytest.mark.parametrize("config", [config.name for config in (*HALF_CONFIGS, *SINGLE_CONFIGS)])
def test_every_configuration_with_one_tile_and_with_many(config: str, device: torch.device) -> None:
    assert [config.name for config in HALF_CONFIGS] == [config.name for config in HALF_TWIN_CONFIGS]
    for dtype in (torch.float32,) if "single" in config else (torch.float16, torch.bfloat16):
        for k in (16, twin_limit(dtype), twin_limit(dtype) + 1):
            case = Case.seeded(1, 150, k, device=device)
            check(case, embeddings(case, 67, dtype), config=config)


@pytest.mark.parametrize("k", [20, 140])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_and_huge_vectors_give_what_the_reference_gives(k: int, dtype: torch.dtype, device: torch.device) -> None:
    """Rows as large as the dtype holds, whose squares overflow even float32; and rows of zeros."""
    case = Case.seeded(1, 160, k, device=device)
    vectors = rows(5, 160, torch.float64, device=device)
    vectors *= torch.finfo(dtype).max * 0.99 / vectors.abs().amax(dim=1, keepdim=True)
    vectors[0] = 0
    vectors[1] = 0
    vectors[1, 3] = torch.finfo(dtype).max
    vectors[2] *= 1e-3
    check(case, vectors.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_has_no_length_stays_zero(dtype: torch.dtype, device: torch.device) -> None:
    case = Case.seeded(1, 24, 5, device=device)
    weights = pca_weights(torch.zeros_like(case.mean), case.components, dtype=dtype)
    zeros = torch.zeros(3, 24, dtype=dtype, device=device)
    assert not pca_project(zeros, weights).any() and not pca_reconstruct(zeros, weights).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_no_vectors(dtype: torch.dtype, device: torch.device) -> None:
    case = Case.seeded(1, 40, 9, device=device)
    vectors = embeddings(case, 12, dtype)
    check(case, vectors[::3])
    check(case, vectors.T.contiguous().T)
    check(case, vectors[:1].expand(5, 40))
    check(case, vectors[:0])


def test_many_rows_are_many_programs(device: torch.device) -> None:
    case = Case.seeded(1, 16, 8, device=device)
    check(case, embeddings(case, 4097 if device.type == "cpu" else 65536, torch.float16), config="half_many")


def test_what_does_not_fit_is_said(device: torch.device) -> None:
    case = Case.seeded(1, 40, 9, device=device)
    weights = pca_weights(case.mean, case.components, dtype=torch.float16)
    for kernel, _ in BOTH:
        with pytest.raises(KernelError, match=rf"{kernel.__name__} takes rows \[B, 40\]; got \[2, 41\]"):
            kernel(rows(2, 41, torch.float16, device=device), weights)
        with pytest.raises(KernelError, match=r"torch.bfloat16 rows for torch.float16 weights"):
            kernel(rows(2, 40, torch.bfloat16, device=device), weights)
        with pytest.raises(KernelError, match=r"no configuration 'x'; there are half_few"):
            kernel(rows(2, 40, torch.float16, device=device), weights, config="x")
    with pytest.raises(KernelError, match=r"float16, bfloat16 or float32; got torch.int32"):
        pca_weights(case.mean, case.components, dtype=torch.int32)
    with pytest.raises(KernelError, match=r"mean must be \[40\]"):
        pca_weights(case.mean[1:], case.components, dtype=torch.float16)
    with pytest.raises(KernelError, match=r"K from 1 to D; got \[9, 40\]"):
        pca_weights(case.mean, case.components.T, dtype=torch.float16)
    with pytest.raises(KernelError, match=r"not finite"):
        pca_weights(case.mean * float("inf"), case.components, dtype=torch.float16)
