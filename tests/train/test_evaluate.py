from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import longclip_rt.train.evaluate as evaluate
from longclip_rt.errors import LongClipError
from longclip_rt.train.evaluate import pair_accuracy, retrieval, zero_shot_accuracy


def noisy_pairs(count: int, width: int = 16, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    image = torch.randn(count, width, generator=generator, dtype=torch.float64)
    text = image + torch.randn(count, width, generator=generator, dtype=torch.float64)
    # Unequal lengths, so that a missing normalisation changes the ranks.
    return (image * torch.rand(count, 1, generator=generator) * 10).to(dtype), text.to(dtype)


def recall_by_sorting(queries: torch.Tensor, targets: torch.Tensor, k: int) -> float:
    similarity = F.normalize(queries, dim=1) @ F.normalize(targets, dim=1).T
    first = similarity.argsort(1, descending=True)[:, :k]
    return (first == torch.arange(len(queries))[:, None]).any(1).double().mean().item()


@pytest.mark.parametrize("block", [1, 7 * 101, 1 << 24])
def test_recall_is_that_of_sorting_whatever_the_block(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(evaluate, "_BLOCK", block)
    image, text = noisy_pairs(101)
    found = retrieval(image, text)
    assert list(found) == ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"]
    expected = {f"i2t_r{k}": recall_by_sorting(image, text, k) for k in (1, 5, 10)}
    expected |= {f"t2i_r{k}": recall_by_sorting(text, image, k) for k in (1, 5, 10)}
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0.1 < found["i2t_r1"] < found["i2t_r10"] < 1
    assert found["i2t_r1"] != found["t2i_r1"]


def test_more_rows_than_one_block_of_own_similarities() -> None:
    image, text = noisy_pairs(600)
    assert retrieval(image, text, k=(1,))["t2i_r1"] == pytest.approx(recall_by_sorting(text, image, 1), abs=1e-12)


def test_a_model_that_cannot_tell_rows_apart_scores_at_chance() -> None:
    same = torch.ones(40, 8)
    assert retrieval(same, same, k=(1, 10, 100)) == pytest.approx(
        {"i2t_r1": 1 / 40, "i2t_r10": 0.25, "i2t_r100": 1.0, "t2i_r1": 1 / 40, "t2i_r10": 0.25, "t2i_r100": 1.0}
    )
    assert retrieval(torch.zeros(4, 8), torch.ones(4, 8), k=(1,))["i2t_r1"] == 0.25


def test_repeated_captions_share_the_credit() -> None:
    image = torch.eye(4)
    text = torch.eye(4)
    text[1] = text[0]
    # Images 0 and 1: image 0 finds two equal captions; image 1 has none and takes 0 from its own, as from all others.
    assert retrieval(image, text, k=(1,))["i2t_r1"] == pytest.approx((0.5 + 0.25 + 1 + 1) / 4)
    # Caption 1 says image 0, and image 1 is behind it.
    assert retrieval(image, text, k=(1,))["t2i_r1"] == pytest.approx(3 / 4)


def test_equal_rows_are_a_tie_though_products_round() -> None:
    image, _ = noisy_pairs(1, 512, torch.float32)
    scale = torch.linspace(0.01, 300, 700)[:, None]
    assert retrieval(image * scale, image * scale.flip(0), k=(1,))["i2t_r1"] == pytest.approx(1 / 700, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_under_autocast_is_ranked_in_float32(dtype: torch.dtype) -> None:
    image, text = noisy_pairs(300, dtype=dtype)
    expected = retrieval(image.double(), text.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert retrieval(image, text) == pytest.approx(expected, abs=1e-9)


def test_a_diverged_row_is_a_miss() -> None:
    image = torch.eye(5)
    broken = image.clone()
    broken[2] = math.nan
    assert retrieval(broken, image, k=(1,)) == pytest.approx({"i2t_r1": 0.8, "t2i_r1": 0.8})
    assert retrieval(broken * math.nan, image, k=(1,)) == {"i2t_r1": 0.0, "t2i_r1": 0.0}
    assert zero_shot_accuracy(broken, image, torch.arange(5)) == pytest.approx(0.8)
    assert pair_accuracy(broken, image.flip(0), image, image.flip(0)).t2i.tolist() == [1, 1, 0, 1, 1]


def test_features_are_left_as_they_were_and_need_no_gradient() -> None:
    image, text = noisy_pairs(10)
    copy = image.clone()
    retrieval(image.requires_grad_(), text)
    zero_shot_accuracy(image, text, torch.arange(10))
    torch.testing.assert_close(image.detach(), copy, rtol=0, atol=0)
    assert image.grad is None


@pytest.mark.parametrize("block", [1, 1 << 24])
def test_zero_shot_takes_the_nearest_class(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(evaluate, "_BLOCK", block)
    image, text = noisy_pairs(60)
    classes = text[:7] * torch.arange(1, 8)[:, None]
    nearest = (F.normalize(image, dim=1) @ F.normalize(classes, dim=1).T).argmax(1)
    labels = nearest.clone()
    labels[:15] = (labels[:15] + 1) % 7
    assert zero_shot_accuracy(image, classes, labels) == pytest.approx(0.75)
    assert zero_shot_accuracy(image, torch.ones(4, 16).double(), labels % 4) == pytest.approx(0.25)


def test_pairs_are_judged_a_row_each() -> None:
    axes = torch.eye(3)
    image_a, image_b = axes[[0, 0, 0]], axes[[1, 1, 1]] * 9  # length must not matter
    text_a = torch.stack([axes[0] * 2 + axes[1], axes[0] + axes[1] * 2, axes[2]])
    text_b = torch.stack([axes[0] * 3 + axes[1], axes[1], axes[2]])
    result = pair_accuracy(image_a, image_b, text_a, text_b)
    assert result.t2i.tolist() == [1.0, 0.0, 0.5]
    assert result.i2t.tolist() == [0.0, 1.0, 0.5]
    assert result.t2i.dtype == torch.float32


def test_captions_that_are_one_text_score_half() -> None:
    image, text = noisy_pairs(20, dtype=torch.float32)
    result = pair_accuracy(image, image.flip(0), text, text * 1.7)
    assert result.i2t.tolist() == [0.5] * 20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrieval(torch.ones(3, 4), torch.ones(2, 4)), r"\[3, 4\], \[2, 4\]"),
        (lambda: retrieval(torch.ones(0, 4), torch.ones(0, 4)), "at least 1"),
        (lambda: retrieval(torch.ones(3), torch.ones(3)), r"Give \[N, D\]"),
        (lambda: retrieval(torch.ones(3, 4), torch.ones(3, 4), k=(0,)), "at least 1"),
        (lambda: zero_shot_accuracy(torch.ones(3, 4), torch.ones(2, 5), torch.zeros(3).long()), "one D"),
        (lambda: zero_shot_accuracy(torch.ones(3, 4), torch.ones(2, 4), torch.zeros(2).long()), "one label an image"),
        (lambda: zero_shot_accuracy(torch.ones(3, 4), torch.ones(2, 4), torch.tensor([0, 1, 2])), "from 0 to 1,"),
        (lambda: pair_accuracy(*[torch.ones(3, 4)] * 3, torch.ones(3, 5)), "pair_accuracy"),
    ],
)
def test_shapes_that_do_not_fit_are_one_sentence(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(LongClipError, match=message):
        call()
