"""What a model costs and what cards allow, computed from numbers on paper. Nothing here was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from longclip_rt.bench.cost import Cost
from longclip_rt.bench.summary import bound
from longclip_rt.model.architecture import Architecture

BATCH = 64
LENGTHS = (20, 77, 248)
PAIRS = (10_000_000, 1_000_000_000, 5_000_000_000)
SHARE = 0.22
"""Of the bound that a fleet is reckoned to reach: what `--backend torch` reached on an H100 in fp16, docs/gpu.md."""
DECODE_SECONDS = 0.008
"""Of one core for a photograph, an assumption: sizes differ, and `longclip-rt bench` measures it."""
PHOTO_BYTES = 100_000
"""Likewise."""


@dataclass(frozen=True)
class Card:
    """A graphics card by its data sheet.

    Attributes:
        name: As people say it.
        tflops: fp16 with tensor cores, dense, 10^12 operations a second.
        bandwidth: Of its memory, 10^9 bytes a second.
    """

    name: str
    tflops: float
    bandwidth: float


CARDS = (
    Card("T4", 65, 320),
    Card("A10", 125, 600),
    Card("L4", 121, 300),
    Card("A100 80 GB", 312, 2039),
    Card("H100 SXM", 989, 3350),
    Card("H200", 989, 4800),
)


def tower_cost(architecture: Architecture, tower: str, rows: int, tokens: int | None = None) -> Cost:
    """What `graph_cost` counts, by formula: the last block's MLP and output projection act on the pooled token alone.

    Args:
        architecture: The model's numbers.
        tower: `text` or `image`.
        rows: The batch's size B.
        tokens: Length S of the texts; None for images.
    """
    arch = architecture
    if tower == "text":
        assert tokens is not None
        width, layers, mlp, length = arch.text_width, arch.text_layers, arch.text_mlp_width, tokens
        flops, given = 0, rows * tokens
        # The taken rows of the table, positions, and the last norm.
        weights = min(rows * tokens, arch.vocab_size) * width + arch.context_length * width + 2 * width
    else:
        patches, pixels = (arch.image_size // arch.patch_size) ** 2, 3 * arch.patch_size**2
        width, layers, mlp, length = arch.vision_width, arch.vision_layers, arch.vision_mlp_width, patches + 1
        flops, given = 2 * rows * patches * pixels * width, rows * 3 * arch.image_size**2
        weights = pixels * width + width + (patches + 1) * width + 4 * width  # patches, class, positions, two norms
    block = 4 * width**2 + 2 * width * mlp
    attention = 4 * rows * length**2 * width
    last = 3 * width**2 * length + (block - 3 * width**2)
    flops += (layers - 1) * (2 * rows * length * block + attention) + 2 * rows * last + attention
    flops += 2 * rows * width * arch.embed_dim
    weights += layers * (block + 9 * width + mlp) + width * arch.embed_dim  # with biases and the norms
    return Cost(flops, weights, given + rows * arch.embed_dim)


def fastest(architecture: Architecture, card: Card, tower: str, tokens: int | None = None, batch: int = BATCH) -> float:
    """Rows a second that a card's data sheet allows in fp16."""
    cost = tower_cost(architecture, tower, batch, tokens)
    least = bound(cost.flops, cost.bytes("fp16"), 1e12 * card.tflops, 1e9 * card.bandwidth)
    return batch / (float(least["ms"]) / 1e3)


def tables(architecture: Architecture) -> Iterator[str]:
    """Three tables in Markdown: what a model costs, what cards allow, and how long one card takes for many pairs."""
    things: list[tuple[str, str, int | None]] = [("1 image", "image", None)]
    things += [(f"1 text of {tokens} tokens", "text", tokens) for tokens in LENGTHS]
    yield "| | GFLOP | MB that are read and written, fp16 |"
    yield "|---|---|---|"
    for name, tower, tokens in things:
        cost = tower_cost(architecture, tower, 1, tokens)
        yield f"| {name} | {cost.flops / 1e9:.1f} | {cost.bytes('fp16') / 1e6:.0f} |"
    yield ""
    yield "| card | images/s | " + " | ".join(f"texts/s, {tokens} tokens" for tokens in LENGTHS) + " | 1 image, ms |"
    yield f"|---|---|{'---|' * len(LENGTHS)}---|"
    for card in CARDS:
        rates = [fastest(architecture, card, tower, tokens) for _, tower, tokens in things]
        alone = 1e3 / fastest(architecture, card, "image", batch=1)
        yield f"| {card.name} | {' | '.join(f'{rate:,.0f}' for rate in rates)} | {alone:.2f} |"
    yield ""
    counts = " | ".join(f"{pairs:,} pairs" for pairs in PAIRS)
    yield f"| card | pairs/s | {counts} | cores to decode | Gbit/s |"
    yield f"|---|---|{'---|' * len(PAIRS)}---|---|"
    for card in CARDS:
        rate = pairs_per_second(architecture, card)
        days = " | ".join(_days(pairs / rate / 86_400) for pairs in PAIRS)
        decoding, network = rate * DECODE_SECONDS, rate * PHOTO_BYTES * 8 / 1e9
        yield f"| {card.name} | {rate:,.0f} | {days} | {decoding:.0f} | {network:.1f} |"


def pairs_per_second(architecture: Architecture, card: Card) -> float:
    """Images with a text of 248 tokens each, at `SHARE` of the bound."""
    image, text = fastest(architecture, card, "image"), fastest(architecture, card, "text", LENGTHS[-1])
    return SHARE / (1 / image + 1 / text)


def _days(days: float) -> str:
    return f"{24 * days:.1f} hours" if days < 1 else f"{days:,.1f} days"
