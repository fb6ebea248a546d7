"""The model in training: both towers over one set of weights, with Long-CLIP's frozen and trained position tables."""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from longclip_rt.errors import WeightsError
from longclip_rt.model.architecture import CLIP_CONTEXT_LENGTH, LONG_CONTEXT_LENGTH, Architecture
from longclip_rt.model.positions import KEPT_ROWS, stretch_positions
from longclip_rt.model.towers import Block, ImageTower, Pick, TextTower, open_clip_model
from longclip_rt.weights.naming import SECOND_TABLE

Stretch = Literal["kps", "interpolate", "none"]
Frozen = Literal["none", "text"]
"""How 77 positions become 248: knowledge-preserved stretching, plain interpolation, or not at all."""


class _Recomputed(nn.Module):
    """A block whose activations are not kept for the backward pass but computed again."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, pick: Pick | None = None) -> Tensor:
        out: Tensor = recomputed(self.block, x, pick, use_reentrant=False)  # type: ignore[no-untyped-call]
        return out


class _TwoTableTower(TextTower):
    """A text tower whose positions are the kept rows of one table and the others of a second one."""

    def __init__(self, architecture: Architecture, model: Any, second: nn.Parameter, kept: int) -> None:
        super().__init__(architecture, model)
        self.second = second
        self.kept = kept

    def positions(self, length: int) -> Tensor:
        """Rows < kept of the frozen table, the others of the trained one; [length, W]."""
        # Of a short text nothing is trained, but a gradient of zeros says so: every process then has the same ones.
        table: Tensor = torch.cat(
            [self.positional_embedding[: min(length, self.kept)], self.second[self.kept : length]]
        )
        return table


class TrainableClip(nn.Module):
    """CLIP or Long-CLIP with gradients. Features are given as the loss takes them: projected, not normalised.

    With `kps`, the first 20 position rows belong to a frozen table and the others to a trained one, as in the
    reference; otherwise the single table is trained.

    Attributes:
        architecture: The model's numbers, with the context length that it has after stretching.
        stretch: How the position table came to its length.
        logit_scale: Scalar parameter, the logarithm of the inverse temperature.
    """

    def __init__(
        self,
        architecture: Architecture,
        state_dict: dict[str, Tensor],
        *,
        stretch: Stretch = "none",
        logit_scale: float | None = None,
        frozen: Frozen = "none",
        gradient_checkpointing: bool = False,
    ) -> None:
        """Copies weights into a model that is ready to train, in float32.

        Args:
            architecture: The numbers that `state_dict` is of, its position table's length included.
            state_dict: Every tensor of `architecture.shapes()`; for `kps` and `interpolate` with a table of CLIP's 77
                rows, or of 248 already (which a resumed run has), and then, for `kps`, with the second table too where
                there is one.
            stretch: What to do with the position table; `none` takes one of any length.
            logit_scale: What to set the logarithm of the inverse temperature to; None keeps the weights' own.
            frozen: Whether the text tower stays as it is.
            gradient_checkpointing: Whether to compute activations again in the backward pass instead of keeping them.

        Raises:
            WeightsError: The position table is of another length.
            MissingExtraError: open_clip is not installed.
        """
        super().__init__()
        tensors = {name: tensor.detach().clone().float() for name, tensor in state_dict.items()}
        second = tensors.pop(SECOND_TABLE, None)
        table = stretched(tensors["positional_embedding"], stretch)
        tensors["positional_embedding"] = table
        if logit_scale is not None:
            tensors["logit_scale"] = torch.tensor(float(logit_scale))
        fields = architecture.to_dict() | {"context_length": len(table)}
        self.architecture = Architecture.from_dict(fields)
        self.stretch = stretch
        clip = cast(Any, open_clip_model(self.architecture, tensors))
        clip.attn_mask = None  # without data, and of no use to the towers
        clip.requires_grad_(True).train()
        self._clip = clip
        self.logit_scale: nn.Parameter = clip.logit_scale
        self.kept_rows = KEPT_ROWS if stretch == "kps" else 0
        if stretch == "kps":
            self._second = nn.Parameter((table if second is None else second).clone())
            clip.positional_embedding.requires_grad_(False)
            text: TextTower = _TwoTableTower(self.architecture, clip, self._second, self.kept_rows)
        else:
            text = TextTower(self.architecture, clip)
        if frozen == "text":
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name == "logit_scale" or name.startswith("_clip.visual."))
        image = ImageTower(self.architecture, clip)
        if gradient_checkpointing:
            for tower in (text, image):
                tower.blocks = nn.ModuleList(_Recomputed(block) for block in tower.blocks)  # type: ignore[assignment, arg-type]
        # In a tuple, out of nn.Module's sight: their parameters are the model's above and must not count twice.
        self._towers = (text.with_outputs(["pooler_output"]), image.with_outputs(["pooler_output"]))

    def compile_towers(self) -> None:
        """Compiles both towers with `torch.compile`, for batches whose text length changes."""
        text, image = self._towers
        self._towers = (torch.compile(text, dynamic=True), torch.compile(image))  # type: ignore[assignment]

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids [B, S] int32, S <= context length, to features [B, D], not normalised."""
        (pooled,) = self._towers[0](ids)
        features: Tensor = pooled @ self._clip.text_projection
        return features

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] float32 to features [B, D], not normalised."""
        (pooled,) = self._towers[1](pixels)
        features: Tensor = pooled @ self._clip.visual.proj
        return features

    def weights(self) -> dict[str, Tensor]:
        """The weights with Long-CLIP's names (OpenAI's, and `positional_embedding_res`), float32 on the CPU, copied.

        With `kps` both tables are as they were trained. A single table of 248 rows is given as both, so that folding
        them gives it back; one of another length, as CLIP's 77, stands alone.
        """
        weights = {name: tensor.detach().float().cpu().clone() for name, tensor in self._clip.state_dict().items()}
        table = weights["positional_embedding"]
        if self.stretch == "kps":
            weights[SECOND_TABLE] = self._second.detach().float().cpu().clone()
        elif len(table) == LONG_CONTEXT_LENGTH:
            weights[SECOND_TABLE] = table.clone()
        return weights

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Sets the parameters to what `weights()` gave, for a resumed run."""
        tensors = dict(weights)
        second = tensors.pop(SECOND_TABLE, None)
        with torch.no_grad():
            self._clip.load_state_dict(tensors, strict=True)
            if self.stretch == "kps":
                assert second is not None
                self._second.copy_(second)


def stretched(table: Tensor, stretch: Stretch) -> Tensor:
    """Lengthens a position table of 77 rows to 248; one of 248 rows, or any with `none`, is returned as it is.

    Args:
        table: [77, W] or [248, W] float.
        stretch: `kps` (Long-CLIP, section 3.1: the first 20 rows kept, the others stretched four times) or
            `interpolate` (the whole table stretched evenly, the ends staying ends: the paper's direct fine-tuning).

    Raises:
        WeightsError: The table has another number of rows.
    """
    if stretch == "none" or len(table) == LONG_CONTEXT_LENGTH:
        return table
    if len(table) != CLIP_CONTEXT_LENGTH:
        raise WeightsError(
            f"The text position table has {len(table)} rows; to train Long-CLIP it must have 77, as CLIP has, or 248. "
            "To train with another context length, leave the positions as they are: --positions none."
        )
    if stretch == "kps":
        return stretch_positions(table)
    rows = table.detach().double().cpu().numpy()
    at = np.linspace(0, len(rows) - 1, LONG_CONTEXT_LENGTH)
    even = [np.interp(at, np.arange(len(rows)), column) for column in rows.T]
    return torch.from_numpy(np.stack(even, axis=1)).to(table)
