from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longclip_rt.train.loss import (
    Objective,
    branch_losses,
    contrastive_loss,
    longclip_loss,
    normalized,
    pcm_is_identity,
    pcm_reconstruct,
)

LN_100 = torch.tensor(math.log(100))


def features(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images, long and short captions that agree as far as those of a trained model do; rows of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    image, long_noise, short_noise = (torch.randn(rows, width, generator=generator) for _ in range(3))
    # As in CLIP: all images share a direction, and some directions vary more than others.
    image = image * torch.linspace(2, 0.3, width) + 2
    lengths = torch.rand(rows, 1, generator=generator) * 9 + 1
    return image * lengths, image + long_noise, (image + 2 * short_noise) * lengths.flip(0)


def reference_reconstruction(image: Tensor, components: int) -> Tensor:
    mean = image.mean(0, keepdim=True)
    _, _, vectors = torch.linalg.svd(image - mean, full_matrices=False)
    kept = vectors[:components]
    return (image - mean) @ kept.T @ kept + mean


def reference_cross_entropy(logits: Tensor, smoothing: float) -> Tensor:
    log_probability = logits.log_softmax(1)
    return -((1 - smoothing) * log_probability.diagonal() + smoothing * log_probability.mean(1)).mean()


def reference_loss(
    image: Tensor, long: Tensor, short: Tensor, scale: Tensor, components: int = 32, smoothing: float = 0.1
) -> Tensor:
    """The reference's forward, in the dtype of what is given."""
    image, long, short = (rows / rows.norm(dim=1, keepdim=True) for rows in (image, long, short))
    total = image.new_zeros(())
    for left, right in ((image, long), (reference_reconstruction(image, components), short)):
        logits = scale.exp() * left @ right.T
        for one in (logits, logits.T):
            total = total + reference_cross_entropy(one, smoothing) / 2
    return total


@pytest.mark.parametrize(
    ("rows", "width", "options"),
    [(128, 96, {}), (64, 512, {}), (40, 48, {"components": 5, "label_smoothing": 0.0}), (33, 64, {}), (2, 40, {})],
)
def test_the_loss_is_the_reference_s(rows: int, width: int, options: dict[str, float]) -> None:
    given = features(rows, width)
    exact = reference_loss(
        *(one.double() for one in given),
        LN_100.double(),
        int(options.get("components", 32)),
        options.get("label_smoothing", 0.1),
    )
    found = longclip_loss(*given, LN_100, **options)  # type: ignore[arg-type]
    assert found.dtype == torch.float32 and found.shape == ()
    assert exact > 0.05
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)


def test_what_the_loss_is_made_of_matters() -> None:
    """Without this the comparison above could pass with a part left out."""
    given = features(128, 96)
    whole = longclip_loss(*given, LN_100)
    assert abs(whole - longclip_loss(*given, LN_100, components=95)) > 1e-2
    assert abs(whole - longclip_loss(*given, LN_100, label_smoothing=0)) > 1e-2
    rescaled = F.normalize(pcm_reconstruct(normalized(given[0])), dim=1)
    short = contrastive_loss(rescaled, normalized(given[2]), LN_100)
    fine, coarse = branch_losses(Objective(), *given, LN_100)
    torch.testing.assert_close(fine + coarse, whole)
    assert abs(coarse - short) > 1e-3  # the reconstruction is not scaled to length 1


def test_gradients_are_those_of_float64_autograd() -> None:
    given = [one.requires_grad_() for one in (*features(128, 96), LN_100.clone())]
    exact = [one.detach().double().requires_grad_() for one in given]
    longclip_loss(*given).backward()
    reference_loss(*exact).backward()
    for found, expected in zip(given, exact, strict=True):
        assert found.grad is not None and expected.grad is not None
        largest = expected.grad.abs().max().item()
        assert largest > 1e-4
        torch.testing.assert_close(found.grad.double(), expected.grad, atol=2e-4 * largest, rtol=0)


def test_the_choice_of_components_has_a_gradient() -> None:
    """Rows that turn the kept directions change the reconstruction of all the others."""
    image = normalized(features(64, 48)[0]).requires_grad_()
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    (pcm_reconstruct(image, 8) * weight).sum().backward()
    exact = image.detach().double().requires_grad_()
    (reference_reconstruction(exact, 8) * weight).sum().backward()
    assert image.grad is not None and exact.grad is not None
    torch.testing.assert_close(image.grad.double(), exact.grad, atol=1e-3, rtol=1e-3)
    fixed = image.detach().double()
    mean = fixed.mean(0)
    kept = torch.linalg.svd(fixed - mean, full_matrices=False)[2][:8]
    centred = (weight - weight.mean(0)).double()
    without = centred @ kept.T @ kept + weight.mean(0)  # the derivative if the directions were constants
    assert (image.grad.double() - without).abs().max() > 0.5


def equal_rows() -> Tensor:
    return torch.randn(1, 64, generator=torch.Generator().manual_seed(2)).expand(48, 64).clone()


def two_rows() -> Tensor:
    return torch.randn(2, 64, generator=torch.Generator().manual_seed(3)).repeat(24, 1)


def equal_singular_values() -> Tensor:
    return torch.eye(64)[:48]


def gap_at_the_cut() -> Tensor:
    """The 32nd and the 33rd singular value are the same, and all others differ."""
    basis, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(4)))
    values = torch.linspace(2, 0.5, 47)
    values[32] = values[31]
    left = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(5)) - 0)[0][:, :47]
    return left * values @ basis[:47]


def zeros_among_them() -> Tensor:
    rows = torch.randn(48, 64, generator=torch.Generator().manual_seed(6))
    rows[5] = rows[30] = 0
    return rows


@pytest.mark.parametrize(
    "make",
    [equal_rows, two_rows, equal_singular_values, gap_at_the_cut, zeros_among_them, lambda: torch.zeros(48, 64)],
)
def test_degenerate_batches_have_a_finite_loss_and_gradients(make: object) -> None:
    image = make()  # type: ignore[operator]
    given = [one.clone().requires_grad_() for one in (image, image + 0, image.roll(1, 0), LN_100)]
    loss = longclip_loss(*given)
    loss.backward()
    assert torch.isfinite(loss)
    for one in given:
        assert one.grad is not None and torch.isfinite(one.grad).all()
    exact = reference_reconstruction(normalized(image).double(), 32) if make is two_rows else None
    if exact is not None:
        torch.testing.assert_close(pcm_reconstruct(normalized(image)).double(), exact, atol=1e-5, rtol=0)


def test_directions_without_a_gap_do_not_blow_the_gradient_up() -> None:
    image = gap_at_the_cut().requires_grad_()
    pcm_reconstruct(image).square().sum().backward()
    assert image.grad is not None
    assert image.grad.abs().max() < 100


@pytest.mark.parametrize("rows", [1, 2, 32, 33])
def test_a_batch_of_no_more_directions_than_components_stays_as_it_is(rows: int) -> None:
    image = features(rows, 64)[0].requires_grad_()
    assert pcm_is_identity(rows, 64)
    rebuilt = pcm_reconstruct(image)
    assert torch.equal(rebuilt, image)
    rebuilt.sum().backward()
    assert image.grad is not None and torch.equal(image.grad, torch.ones_like(image))


def test_one_row_more_is_not_an_identity() -> None:
    image = features(34, 64)[0]
    assert not pcm_is_identity(34, 64)
    assert (pcm_reconstruct(image) - image).abs().max() > 1e-2
    assert pcm_is_identity(34, 32) and not pcm_is_identity(34, 33)
    assert not pcm_is_identity(34, 64, components=32) and pcm_is_identity(34, 64, components=33)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_gives_nan_and_no_exception(bad: float) -> None:
    image, long, short = features(48, 64)
    image[3, 7] = bad
    image.requires_grad_()
    loss = longclip_loss(image, long, short, LN_100)
    assert torch.isnan(loss)
    loss.backward()
    assert image.grad is not None and torch.isnan(image.grad).any()
    assert torch.isnan(pcm_reconstruct(image)).all()


@pytest.mark.parametrize("failure", ["raises", "gives NaN"])
@pytest.mark.parametrize("rows", [48, 80])
def test_a_decomposition_that_fails_is_done_another_way(
    monkeypatch: pytest.MonkeyPatch, failure: str, rows: int
) -> None:
    image = normalized(features(rows, 64)[0])
    leaf, other = image.clone().requires_grad_(), image.clone().requires_grad_()
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    expected = pcm_reconstruct(leaf)
    (expected * weight).sum().backward()

    def svd(x: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        if failure == "raises":
            raise torch._C._LinAlgError("linalg.svd: The algorithm failed to converge")
        rank = min(x.shape)
        return x[:, :rank], x.new_full((rank,), torch.nan), x.new_full((rank, x.shape[1]), torch.nan)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    found = pcm_reconstruct(other)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    (found * weight).sum().backward()
    torch.testing.assert_close(other.grad, leaf.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_under_autocast_is_computed_in_float32(dtype: torch.dtype) -> None:
    image, long, short = (one.to(dtype) for one in features(64, 48))
    expected = image.float().requires_grad_()
    loss = longclip_loss(expected, long.float(), short.float(), LN_100)
    loss.backward()
    leaf = image.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = longclip_loss(leaf, long, short, LN_100)
    found.backward()
    assert torch.equal(found, loss)
    assert leaf.grad is not None and expected.grad is not None
    assert torch.equal(leaf.grad, expected.grad.to(dtype))


@pytest.mark.parametrize("name", ["long+short", "long", "clip"])
def test_the_other_objectives_leave_parts_out(name: str) -> None:
    image, long, short = features(64, 48)
    objective = Objective(name)  # type: ignore[arg-type]
    fine, coarse = branch_losses(objective, image, long, short if name == "long+short" else None, LN_100)
    torch.testing.assert_close(fine, contrastive_loss(normalized(image), normalized(long), LN_100))
    if name == "long+short":
        torch.testing.assert_close(coarse, contrastive_loss(normalized(image), normalized(short), LN_100))
    else:
        assert coarse == 0
