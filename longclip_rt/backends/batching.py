"""Which texts share a batch: sorted by length and trimmed, so that little is spent on padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A batch is closed early when its next text would be padded by more than this share of the batch's length. One more
# batch then costs less than the padding; and since each closing shrinks the length by a quarter, at most a dozen
# batches of odd size arise however many texts there are, which keeps the engine's set of shapes small.
_MAX_WASTE = 0.25

TEXTS_PER_IMAGE = 4
"""Short texts share batches this many times larger than images do."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts that are encoded together.

    Attributes:
        indices: Positions in the sequence given to `plan_batches`, longest text first.
        length: Tokens that every row is padded to.
    """

    indices: tuple[int, ...]
    length: int


def padded_length(length: int, pad_multiple: int, max_length: int | None = None, buckets: Sequence[int] = ()) -> int:
    """Rounds a token count up to a bucket, else to a multiple of `pad_multiple`, and down to `max_length`."""
    if max_length is not None:
        length = min(length, max_length)
    padded = next((bucket for bucket in buckets if bucket >= length), -(-length // pad_multiple) * pad_multiple)
    return padded if max_length is None else min(padded, max_length)


def plan_batches(
    lengths: Sequence[int],
    *,
    pad_multiple: int,
    token_budget: int,
    max_batch: int,
    max_length: int | None = None,
    buckets: Sequence[int] = (),
) -> list[Batch]:
    """Groups texts of similar length into batches, longest first. Pure: equal arguments give equal batches.

    Trimming to the longest text of a batch is exact for pooled outputs: the text tower is causal and pools at EOT, so
    the slots after it cannot reach the result.

    Args:
        lengths: Tokens of each text, SOT and EOT included.
        pad_multiple: Batch lengths are rounded up to a multiple of this.
        token_budget: Rows times length of a batch stay within this, except that one text always makes a batch.
        max_batch: Most texts in a batch.
        max_length: The context length; longer texts count as this long. None: no limit.
        buckets: The only lengths that batches may have, shortest first, where the engine wants that; texts longer than
            the last one are padded as if there were none.

    Returns:
        Batches that hold each position of `lengths` exactly once. The full ones of one length have one size.

    Raises:
        ValueError: When a length or a limit is below 1.
    """
    if min(pad_multiple, token_budget, max_batch, 1 if max_length is None else max_length) < 1:
        raise ValueError("pad_multiple, token_budget, max_batch and max_length must be at least 1")
    if lengths and min(lengths) < 1:
        raise ValueError(f"a text has at least 1 token; got a length of {min(lengths)}")
    padded = [padded_length(length, pad_multiple, max_length, buckets) for length in lengths]
    # By padded length and then position: within a bucket the input order stays, so neighbours in the input stay
    # neighbours in the batch whatever their exact lengths.
    order = sorted(range(len(padded)), key=lambda index: (-padded[index], index))
    batches: list[Batch] = []
    start = 0
    while start < len(order):
        length = padded[order[start]]
        size = max(1, min(max_batch, token_budget // length))
        stop = start + 1
        while stop < min(start + size, len(order)) and padded[order[stop]] >= (1 - _MAX_WASTE) * length:
            stop += 1
        batches.append(Batch(tuple(order[start:stop]), length))
        start = stop
    return batches
