"""Half precision by construction: towers whose weights are fp16, but for the blocks that would overflow there."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from longclip_rt.model.towers import Block, ImageTower, TextTower

FP16_MAX = 65504.0
"""The largest finite number of IEEE half precision."""

HEADROOM = 4.0
"""A block stays in fp32 unless its largest activation on the sample is this many times below FP16_MAX. The sample is
some dozens of texts and photographs; the largest activation of a million inputs is larger than that of the sample."""


@dataclass(frozen=True)
class BlockActivation:
    """The largest magnitude inside one block of the fp32 tower, over the sample.

    Attributes:
        tower: `text` or `image`.
        block: Index of the block, from 0.
        largest: The largest magnitude of any tensor in it: its input, LayerNorms, queries, keys and values, scaled
            attention logits, attention output, MLP and residual sums.
        where: Which tensor that was.
    """

    tower: str
    block: int
    largest: float
    where: str

    @property
    def headroom(self) -> float:
        """How many times larger it could be before fp16 overflows."""
        return FP16_MAX / self.largest if self.largest else float("inf")

    @property
    def keep_fp32(self) -> bool:
        """Whether the block is to stay in fp32; true also for what is not finite to begin with."""
        return not self.headroom >= HEADROOM


class ActivationRecorder:
    """Notes the largest activation inside each block of a tower while it runs; use `record()` around the calls."""

    def __init__(self, tower: TextTower | ImageTower) -> None:
        self._tower = tower
        self._name = "text" if isinstance(tower, TextTower) else "image"
        self._largest: list[tuple[float, str]] = [(0.0, "input")] * len(tower.blocks)

    def _note(self, index: int, where: str, value: Tensor) -> None:
        largest = float(value.detach().abs().max())
        # A NaN compares false with everything; it must win and stay, so both tests are written the other way round.
        known = self._largest[index][0]
        if not largest <= known and known == known:
            self._largest[index] = (largest, where)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Measures every forward pass inside the block, and leaves the tower as it was."""
        handles = [handle for index, block in enumerate(self._tower.blocks) for handle in self._hooks(index, block)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, index: int, block: Block) -> Iterator[Any]:
        def note_block(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._note(index, "input", args[0])
            self._note(index, "output", output)

        def note_logits(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            attn = block.block.attn
            qkv = F.linear(output, attn.in_proj_weight, attn.in_proj_bias)
            self._note(index, "queries, keys, values", qkv)
            q, k, _ = (part.reshape(*part.shape[:2], block.heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
            self._note(index, "attention logits", (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5)

        yield block.register_forward_hook(note_block)
        yield block.block.ln_1.register_forward_hook(note_logits)
        for name in ("ln_1", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.gelu", "mlp.c_proj"):
            module = block.block.get_submodule(name)
            yield module.register_forward_hook(
                lambda module, args, output, name=name: self._note(index, name, output)  # type: ignore[misc]
            )

    def activations(self) -> list[BlockActivation]:
        """One entry a block, first to last."""
        return [
            BlockActivation(self._name, index, largest, where) for index, (largest, where) in enumerate(self._largest)
        ]


def half_tower(tower: TextTower | ImageTower, keep_fp32: Iterable[int] = ()) -> Any:
    """Copies a tower to fp16; inputs and outputs keep their dtypes.

    What stays in fp32 inside: the L2 norm, and the blocks named. LayerNorm's statistics and softmax are fp32 by
    attributes of their ONNX operators (`longclip_rt.export.onnx`).

    Args:
        tower: An fp32 tower; it is not changed.
        keep_fp32: Indices of the blocks that stay in fp32.
    """
    half = copy.deepcopy(tower).half()
    for index in keep_fp32:
        half.blocks[index].float()
    return half
