from __future__ import annotations

import numpy as np
import pytest

from longclip_rt.parity.fidelity import LOST, fidelity


def on_a_circle(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_equal_vectors_lose_nothing() -> None:
    vectors = {"text": on_a_circle(0, 40, 100), "image": on_a_circle(5, 50, 110)}
    found = fidelity(vectors, vectors)["text"]
    assert (found.count, found.same_neighbour, found.lost_neighbour, found.same_first, found.lost_first) == (
        3,
        1,
        0,
        1,
        0,
    )
    assert found.mean == pytest.approx(1) and all(check.passed for check in found.checks("openvino", "int8", "text"))


def test_what_turned_away_is_counted_in_each_figure() -> None:
    expected = {"text": on_a_circle(0, 10, 90, 100), "image": on_a_circle(0, 90)}
    got = {"text": on_a_circle(0, 85, 90, 100), "image": on_a_circle(0, 90)}  # the second text turned by 75 degrees
    text, image = (fidelity(got, expected)[tower] for tower in ("text", "image"))
    assert text.worst == pytest.approx(np.cos(np.radians(75)), abs=1e-6)
    assert text.mean == pytest.approx((3 + np.cos(np.radians(75))) / 4, abs=1e-6)
    assert text.same_neighbour == 0.5 and text.lost_neighbour == 0.5  # of the second and third
    assert text.same_first == 0.75 and text.lost_first == 0.25
    assert image.same_first == 1 and image.mean == pytest.approx(1)
    failed = {check.name for check in text.checks("openvino", "int8", "text") if not check.passed}
    assert failed == {
        "mean 1 - cosine", "text_embeds: 1 - cosine", "share of lost neighbours", "share of lost first answers",
    }  # fmt: skip


def test_a_swap_of_candidates_that_are_as_near_is_no_loss() -> None:
    expected = {"text": on_a_circle(0, 45), "image": on_a_circle(3, -3.1)}
    got = {"text": on_a_circle(0, 45), "image": on_a_circle(3.1, -3)}
    found = fidelity(got, expected)["text"]
    assert found.same_first == 0.5 and found.lost_first == 0.0 <= LOST
