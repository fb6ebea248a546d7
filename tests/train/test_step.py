from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from train_case import batch_of, small_model

from longclip_rt.train.data.training_data import Batch
from longclip_rt.train.distributed import Processes
from longclip_rt.train.loss import Objective, branch_losses, longclip_loss
from longclip_rt.train.model import TrainableClip
from longclip_rt.train.step import backward

ALONE = Processes(0, 1, torch.device("cpu"))
ROWS = 20
OBJECTIVE = Objective("longclip", components=4)

Gradients = tuple[dict[str, Tensor], Tensor]
"""Gradients by name, and the loss."""


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Long texts of many lengths, some shorter than the rows that stay frozen; one beyond CLIP's 77 tokens."""
    return batch_of([100, *(3 + place * 37 % 58 for place in range(ROWS - 1))])


@pytest.fixture(scope="module")
def whole(batch: Batch) -> Gradients:
    return in_one_piece(batch)


def gradients(model: TrainableClip) -> dict[str, Tensor]:
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def in_one_piece(batch: Batch, objective: Objective = OBJECTIVE) -> Gradients:
    """Gradients as autograd gives them when the whole batch goes through the towers at once."""
    model = small_model("kps", logit_scale=math.log(100))
    features = (
        model.encode_image(batch.pixels),
        model.encode_text(batch.long_ids),
        model.encode_text(batch.short_ids),
    )
    long, short = branch_losses(objective, *features, model.logit_scale)
    (long + short).backward()
    return gradients(model), (long + short).detach()


def by_steps(batch: Batch, objective: Objective = OBJECTIVE, **options: Any) -> Gradients:
    model = small_model("kps", logit_scale=math.log(100))
    losses = backward(model, batch, objective, ALONE, **options)
    return gradients(model), losses.total


def assert_same(found: Gradients, expected: Gradients) -> None:
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=0)
    assert found[0].keys() == expected[0].keys()
    assert "logit_scale" in expected[0]
    for name, one in expected[0].items():
        largest = one.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(found[0][name], one, atol=2e-5 * largest, rtol=1e-4, msg=name)


# None holds all activations, in pieces on a CPU; 7 leaves a smaller last chunk; 20 and 64 are the whole batch.
@pytest.mark.parametrize("chunk", [None, 1, 7, 20, 64])
def test_chunks_give_the_gradients_of_one_big_batch(batch: Batch, whole: Gradients, chunk: int | None) -> None:
    assert_same(by_steps(batch, chunk=chunk), whole)


@pytest.mark.parametrize("name", ["long+short", "long", "clip"])
def test_the_other_objectives_too(batch: Batch, name: str) -> None:
    objective = Objective(name)  # type: ignore[arg-type]
    assert_same(by_steps(batch, objective, chunk=7), in_one_piece(batch, objective))


def test_one_big_batch_is_the_public_loss(batch: Batch, whole: Gradients) -> None:
    model = small_model("kps", logit_scale=math.log(100))
    features = (
        model.encode_image(batch.pixels),
        model.encode_text(batch.long_ids),
        model.encode_text(batch.short_ids),
    )
    loss = longclip_loss(*features, model.logit_scale, components=4)
    torch.testing.assert_close(loss.detach(), whole[1])


def test_chunks_are_not_small_batches(batch: Batch, whole: Gradients) -> None:
    """The mean of the losses of chunks is another loss: fewer wrong texts for an image, and another PCM."""
    parts = []
    for rows in torch.arange(ROWS).split(5):
        part = Batch(batch.pixels[rows], batch.long_ids[rows], batch.short_ids[rows])
        parts.append(in_one_piece(part)[1])
    assert abs(torch.stack(parts).mean() - whole[1]) > 0.5


def test_chunks_hold_the_activations_of_one_chunk_at_a_time(batch: Batch) -> None:
    """The most numbers that wait for a backward pass at one time."""

    def most(**options: Any) -> int:
        held = {"now": 0, "most": 0}

        class Kept:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor
                held["now"] += tensor.numel()
                held["most"] = max(held.values())

            def __del__(self) -> None:
                held["now"] -= self.tensor.numel()

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            by_steps(batch, **options)
        return held["most"]

    assert most(chunk=4) < most() / 4


def test_rows_may_come_in_any_order(batch: Batch, whole: Gradients) -> None:
    """Texts go through the tower by length; their features must come back to their own images."""
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    other = Batch(batch.pixels[order], batch.long_ids[order], batch.short_ids[order])
    assert_same(by_steps(other, chunk=7), whole)


def test_the_scale_multiplies_gradients_and_not_the_reported_loss(batch: Batch) -> None:
    plain, loss = by_steps(batch, chunk=16)
    scaled, same = by_steps(batch, chunk=16, scale=lambda loss: loss * 1024)
    assert torch.equal(loss, same)
    for name in plain:
        torch.testing.assert_close(scaled[name] / 1024, plain[name], atol=1e-7, rtol=1e-4, msg=name)


@pytest.mark.parametrize("chunk", [None, 7])
def test_bf16_autocast_is_near_fp32(batch: Batch, whole: Gradients, chunk: int | None) -> None:
    exact, exact_loss = whole
    found, loss = by_steps(batch, chunk=chunk, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert loss.dtype == torch.float32 and loss != exact_loss
    assert abs(loss - exact_loss) < 0.05 * exact_loss
    for name in ("_second", "_clip.visual.proj", "_clip.token_embedding.weight"):
        similarity = torch.cosine_similarity(found[name].flatten(), exact[name].flatten(), dim=0)
        assert similarity > 0.97, name


@pytest.mark.parametrize("chunk", [None, 6])
def test_a_frozen_text_tower_gets_no_gradients_and_the_rest_the_same(
    batch: Batch, whole: Gradients, chunk: int | None
) -> None:
    model = small_model("kps", logit_scale=math.log(100), frozen="text")
    losses = backward(model, batch, OBJECTIVE, ALONE, chunk=chunk)
    trained = {name: one for name, one in whole[0].items() if "visual" in name or "logit_scale" in name}
    assert 2 < len(trained) < len(whole[0])
    assert_same((gradients(model), losses.total), (trained, whole[1]))
