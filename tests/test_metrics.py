from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

import longclip_rt.metrics as metrics
from longclip_rt.errors import LongClipError
from longclip_rt.metrics import pair_accuracy, places, recall, retrieval, unit_rows, zero_shot_accuracy

Array = NDArray[np.floating]


def noisy_pairs(count: int, width: int = 16, dtype: type = np.float64) -> tuple[Array, Array]:
    generator = np.random.default_rng(count + 1)
    image = generator.standard_normal((count, width))
    text = image + generator.standard_normal((count, width))
    # Unequal lengths, so that a missing normalisation changes the ranks.
    return (image * generator.random((count, 1)) * 10).astype(dtype), text.astype(dtype)


def recall_by_sorting(queries: Array, targets: Array, k: int) -> float:
    first = np.argsort(-(unit_rows(queries) @ unit_rows(targets).T), axis=1)[:, :k]
    return float((first == np.arange(len(queries))[:, None]).any(axis=1).mean())


@pytest.mark.parametrize("block", [1, 7 * 101, 1 << 24])
def test_recall_is_that_of_sorting_whatever_the_block(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(metrics, "_BLOCK", block)
    image, text = noisy_pairs(101)
    found = retrieval(image, text)
    assert list(found) == ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"]
    expected = {f"i2t_r{k}": recall_by_sorting(image, text, k) for k in (1, 5, 10)}
    expected |= {f"t2i_r{k}": recall_by_sorting(text, image, k) for k in (1, 5, 10)}
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0.1 < found["i2t_r1"] < found["i2t_r10"] < 1
    assert found["i2t_r1"] != found["t2i_r1"]


def test_any_of_a_querys_own_targets_will_do_and_without_one_it_is_a_miss() -> None:
    axes = np.eye(4)
    # Query 0 owns targets 1 and 2, of which the second is the nearest; query 1's own is third; query 2 has none.
    queries = [axes[0], axes[0] * 2 + axes[1], axes[3]]
    targets = [axes[1], axes[2], axes[0] + axes[1] * 0.1, axes[0] + axes[3] * 0.5]
    own, of = ["a", "b", "c"], ["b", "a", "a", "x"]
    assert recall(queries, targets, own, of, k=(1, 2, 3)) == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 2 / 3})


def test_a_model_that_cannot_tell_rows_apart_scores_at_chance() -> None:
    same = np.ones((40, 8))
    assert retrieval(same, same, k=(1, 10, 100)) == pytest.approx(
        {"i2t_r1": 1 / 40, "i2t_r10": 0.25, "i2t_r100": 1.0, "t2i_r1": 1 / 40, "t2i_r10": 0.25, "t2i_r100": 1.0}
    )
    assert retrieval(np.zeros((4, 8)), np.ones((4, 8)), k=(1,))["i2t_r1"] == 0.25


def test_repeated_captions_share_the_credit() -> None:
    image = np.eye(4)
    text = np.eye(4)
    text[1] = text[0]
    # Images 0 and 1: image 0 finds two equal captions; image 1 has none and takes 0 from its own, as from all others.
    assert retrieval(image, text, k=(1,))["i2t_r1"] == pytest.approx((0.5 + 0.25 + 1 + 1) / 4)
    # Caption 1 says image 0, and image 1 is behind it.
    assert retrieval(image, text, k=(1,))["t2i_r1"] == pytest.approx(3 / 4)


def test_equal_rows_are_a_tie_though_products_round() -> None:
    image, _ = noisy_pairs(1, 512, np.float32)
    scale = np.linspace(0.01, 300, 700, dtype=np.float32)[:, None]
    assert retrieval(image * scale, image * scale[::-1], k=(1,))["i2t_r1"] == pytest.approx(1 / 700, rel=1e-9)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_half_precision_is_ranked_in_float32(dtype: type) -> None:
    image, text = noisy_pairs(300, dtype=dtype)
    expected = retrieval(image.astype(float), text.astype(float))
    assert retrieval(image, text) == pytest.approx(expected, abs=1e-9)


def test_a_diverged_row_is_a_miss() -> None:
    image = np.eye(5)
    broken = image.copy()
    broken[2] = math.nan
    assert retrieval(broken, image, k=(1,)) == pytest.approx({"i2t_r1": 0.8, "t2i_r1": 0.8})
    assert retrieval(broken * math.nan, image, k=(1,)) == {"i2t_r1": 0.0, "t2i_r1": 0.0}
    assert zero_shot_accuracy(broken, image, np.arange(5)) == pytest.approx(0.8)
    assert pair_accuracy(broken, image[::-1], image, image[::-1]).t2i.tolist() == [1, 1, 0, 1, 1]


def test_features_are_left_as_they_were() -> None:
    image, text = noisy_pairs(10)
    copy = image.copy()
    retrieval(image, text)
    zero_shot_accuracy(image, text, np.arange(10))
    np.testing.assert_array_equal(image, copy)


@pytest.mark.parametrize("block", [1, 1 << 24])
def test_zero_shot_takes_the_nearest_class(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(metrics, "_BLOCK", block)
    image, text = noisy_pairs(60)
    classes = text[:7] * np.arange(1, 8)[:, None]
    labels = (unit_rows(image) @ unit_rows(classes).T).argmax(axis=1)
    labels[:15] = (labels[:15] + 1) % 7
    assert zero_shot_accuracy(image, classes, labels) == pytest.approx(0.75)
    assert zero_shot_accuracy(image, np.ones((4, 16)), labels % 4) == pytest.approx(0.25)


def test_pairs_are_judged_a_row_each() -> None:
    axes = np.eye(3)
    image_a, image_b = axes[[0, 0, 0]], axes[[1, 1, 1]] * 9  # length must not matter
    text_a = np.stack([axes[0] * 2 + axes[1], axes[0] + axes[1] * 2, axes[2]])
    text_b = np.stack([axes[0] * 3 + axes[1], axes[1], axes[2]])
    result = pair_accuracy(image_a, image_b, text_a, text_b)
    assert result.t2i.tolist() == [1.0, 0.0, 0.5]
    assert result.i2t.tolist() == [0.0, 1.0, 0.5]


def test_captions_that_are_one_text_score_half() -> None:
    image, text = noisy_pairs(20, dtype=np.float32)
    result = pair_accuracy(image, image[::-1], text, text * np.float32(1.7))
    assert result.i2t.tolist() == [0.5] * 20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrieval(np.ones((3, 4)), np.ones((2, 4))), r"\[3, 4\], \[2, 4\]"),
        (lambda: retrieval(np.ones((0, 4)), np.ones((0, 4))), "at least 1"),
        (lambda: retrieval(np.ones(3), np.ones(3)), r"Give \[N, D\]"),
        (lambda: retrieval(np.ones((3, 4)), np.ones((3, 4)), k=(0,)), "at least 1"),
        (lambda: zero_shot_accuracy(np.ones((3, 4)), np.ones((2, 5)), np.zeros(3, int)), "one D"),
        (lambda: zero_shot_accuracy(np.ones((3, 4)), np.ones((2, 4)), np.zeros(2, int)), "one label an image"),
        (lambda: zero_shot_accuracy(np.ones((3, 4)), np.ones((2, 4)), np.array([0, 1, 2])), "from 0 to 1,"),
        (lambda: pair_accuracy(*[np.ones((3, 4))] * 3, np.ones((3, 5))), "pair_accuracy"),
    ],
)
def test_shapes_that_do_not_fit_are_one_sentence(call: Callable[[], object], message: str) -> None:
    with pytest.raises(LongClipError, match=message):
        call()


def test_places_tell_where_the_own_target_stands_and_what_was_chosen() -> None:
    axes = np.eye(4)
    targets = np.stack([axes[0], axes[0], axes[0] + axes[1], axes[3]])
    # Query 0 ties with target 1 on its own target 0; query 1's own is behind 0 and 1; query 2 has none.
    found = places(axes[[0, 0, 3]], targets, [0, 2, 9], [0, 1, 2, 3])
    assert found.above.tolist()[:2] == [0, 2] and found.tied.tolist()[:2] == [1, 0]
    assert found.ranks().tolist() == [1.5, 3.0, math.inf]
    assert found.best.tolist()[:2] == [0, 2] and found.rival.tolist() == [1, 0, 3]
    assert found.own.tolist()[:2] == pytest.approx([1, 0.5**0.5]) and found.theirs.tolist() == [1, 1, 1]
    assert found.hits(1).tolist() == [0.5, 0, 0] and found.hits(3).tolist() == [1, 1, 0]
