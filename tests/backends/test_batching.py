from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longclip_rt.backends.batching import padded_length, plan_batches

LENGTHS = st.lists(st.integers(1, 400), max_size=120)


@given(LENGTHS, st.sampled_from([1, 8, 32]), st.integers(1, 4000), st.integers(1, 40), st.sampled_from([None, 77, 248]))
def test_every_text_is_in_one_batch_that_fits(lengths, pad_multiple, token_budget, max_batch, max_length):
    batches = plan_batches(
        lengths, pad_multiple=pad_multiple, token_budget=token_budget, max_batch=max_batch, max_length=max_length
    )
    assert sorted(itertools.chain.from_iterable(batch.indices for batch in batches)) == list(range(len(lengths)))
    for batch in batches:
        capped = [min(lengths[index], max_length or 10_000) for index in batch.indices]
        assert max(capped) <= batch.length < max(capped) + pad_multiple
        assert batch.length % pad_multiple == 0 or batch.length == max_length
        assert len(batch.indices) <= max_batch
        assert len(batch.indices) * batch.length <= token_budget or len(batch.indices) == 1
        # No text is padded by more than a quarter of the batch and one step.
        assert min(capped) + pad_multiple > 0.75 * batch.length
    assert [batch.length for batch in batches] == sorted((batch.length for batch in batches), reverse=True)


def test_texts_of_one_length_keep_their_order():
    batches = plan_batches([5, 20, 5, 20, 5], pad_multiple=4, token_budget=1000, max_batch=2)
    assert [(batch.indices, batch.length) for batch in batches] == [((1, 3), 20), ((0, 2), 8), ((4,), 8)]


def test_texts_that_pad_to_one_length_keep_their_order_too():
    (batch,) = plan_batches([5, 8, 6, 7], pad_multiple=8, token_budget=1000, max_batch=8)
    assert batch.indices == (0, 1, 2, 3)


def test_shapes_stay_few():
    lengths = [3 + 7 * index % 246 for index in range(20_000)]
    shapes = set()
    for start in range(0, len(lengths), 2048):
        part = lengths[start : start + 2048]
        batches = plan_batches(part, pad_multiple=8, token_budget=8 * 248, max_batch=32, max_length=248)
        shapes |= {(len(batch.indices), batch.length) for batch in batches}
    # One full shape for each of the 31 lengths, and remainders.
    assert len(shapes) <= 2 * 31


def test_padding_is_small_on_a_mix_of_lengths():
    lengths = [12 + index % 20 if index % 2 else 120 + index % 128 for index in range(2048)]
    batches = plan_batches(lengths, pad_multiple=8, token_budget=8 * 248, max_batch=32, max_length=248)
    spent = sum(len(batch.indices) * batch.length for batch in batches)
    assert spent < 1.07 * sum(lengths)


def test_nothing_gives_no_batches():
    assert plan_batches([], pad_multiple=8, token_budget=8, max_batch=1) == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"pad_multiple": 0, "token_budget": 8, "max_batch": 1},
        {"pad_multiple": 1, "token_budget": 0, "max_batch": 1},
        {"pad_multiple": 1, "token_budget": 8, "max_batch": 0},
        {"pad_multiple": 1, "token_budget": 8, "max_batch": 1, "max_length": 0},
    ],
)
def test_limits_below_one_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        plan_batches([3], **arguments)


def test_a_length_below_one_is_refused():
    with pytest.raises(ValueError, match="length of 0"):
        plan_batches([3, 0], pad_multiple=8, token_budget=8, max_batch=1)


def test_padded_length_is_capped():
    assert [padded_length(n, 8) for n in (1, 8, 9)] == [8, 8, 16]
    assert padded_length(77, 8, 77) == 77


def test_with_buckets_batches_have_their_lengths_only() -> None:
    buckets = (32, 77, 128)
    assert [padded_length(n, 8, 248, buckets) for n in (1, 32, 33, 128, 129, 999)] == [32, 32, 77, 128, 136, 248]
    batches = plan_batches([5, 60, 33, 100, 31], pad_multiple=8, token_budget=9999, max_batch=8, buckets=buckets)
    assert [(batch.indices, batch.length) for batch in batches] == [((3,), 128), ((1, 2), 77), ((0, 4), 32)]
