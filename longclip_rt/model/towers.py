"""The two encoders as torch modules, on open_clip's blocks: ids or pixels to embeddings and other outputs."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longclip_rt.errors import LongClipError
from longclip_rt.model.architecture import Architecture
from longclip_rt.system.extras import require

if TYPE_CHECKING:
    from longclip_rt.model.pca_head import PcaHead
    from longclip_rt.pca.basis import Pca

AnyTower = TypeVar("AnyTower", bound="_Tower")
Pick = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """One of open_clip's residual attention blocks, with its attention computed as one fused operation.

    open_clip calls `nn.MultiheadAttention` with a mask of -inf. The exporter makes an ONNX `Attention` node of
    `scaled_dot_product_attention`, and `is_causal` needs no mask, which would otherwise have to be cut to the text.

    The input is cast to the block's own dtype, and the output stays in it: the next consumer casts in its turn, so that
    a single block can be held in another precision (`.float()`) without more.
    """

    block: Any

    def __init__(self, block: nn.Module, *, causal: bool) -> None:
        super().__init__()
        self.block = block
        self.causal = causal
        self.heads = int(self.block.attn.num_heads)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the block's weights, and of its output."""
        dtype: torch.dtype = self.block.ln_1.weight.dtype
        return dtype

    def forward(self, x: Tensor, pick: Pick | None = None) -> Tensor:
        """Maps tokens [B, S, W] of any float dtype to tokens in the block's dtype.

        Args:
            x: The tokens.
            pick: Takes the one token of each row that will be used, [B, S, W] to [B, W]. What follows the attention
                acts on each token alone, so three quarters of the block are then computed for that token only.

        Returns:
            [B, S, W], or [B, W] with `pick`.
        """
        x = x.to(self.dtype)
        mixed = self._mixed(self.block.ln_1(x))
        if pick is not None:
            x, mixed = pick(x), pick(mixed)
        x = x + self.block.attn.out_proj(mixed)
        mlp: Tensor = self.block.mlp(self.block.ln_2(x))
        return x + mlp

    def _mixed(self, x: Tensor) -> Tensor:
        """Attention up to its output projection, [B, S, W] to [B, S, W]."""
        attn = self.block.attn
        qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)  # three of [B, S, W]
        batch, length, width = x.shape
        split = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.reshape(split).transpose(1, 2) for part in qkv)  # [B, heads, S, W / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return mixed.transpose(1, 2).flatten(2)  # [B, S, W]


class _Tower(nn.Module):
    """What the two towers share: blocks, outputs chosen by name, and fp32 at the border.

    Attributes:
        architecture: The model's numbers.
        blocks: The transformer's blocks, first to last.
        outputs: Names of what `forward` returns, in order.
        pca_head: What gives the embedding and its PCA where `with_pca` made the tower; else None.
        fused_head: What gives both at once from states before the final LayerNorm, [B, W], in its place; or None.
    """

    kind: str
    embedding: str
    blocks: Sequence[Block]

    def __init__(self, architecture: Architecture, transformer: Any, *, causal: bool) -> None:
        super().__init__()
        self.architecture = architecture
        self.blocks = nn.ModuleList(Block(block, causal=causal) for block in transformer.resblocks)  # type: ignore[assignment]
        self.outputs: tuple[str, ...] = (self.embedding,)
        self.pca_head: PcaHead | None = None
        self.fused_head: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    @property
    def final_norm(self) -> nn.LayerNorm:
        """The LayerNorm of the pooled state."""
        raise NotImplementedError

    @property
    def projection(self) -> Tensor:
        """From the tower's width W to an embedding, [W, D]."""
        raise NotImplementedError

    @property
    def output_names(self) -> tuple[str, ...]:
        """Every output this tower can give; `hidden_states.-1` comes out of the last block."""
        hidden = (f"hidden_states.-{n}" for n in range(1, len(self.blocks) + 2))
        reduced = () if self.pca_head is None else (f"{self.kind}_pca",)
        return (self.embedding, "pooler_output", "last_hidden_state", *hidden, *reduced)

    def with_outputs(self: AnyTower, outputs: Sequence[str]) -> AnyTower:
        """A tower on the same weights (shared: casting one casts both) that returns other outputs.

        Args:
            outputs: Names out of `output_names`, in the order in which `forward` is to return them.

        Raises:
            LongClipError: A name is unknown or repeated, or there is none.
        """
        tower = copy.copy(self)
        tower.outputs = self._check(outputs)
        return tower

    def with_pca(self: AnyTower, pca: Pca, mode: str = "project") -> AnyTower:
        """A tower on the same weights with one more output, `text_pca` or `image_pca`: the embedding's PCA.

        Args:
            pca: Fitted to this model's embeddings.
            mode: `project` for [B, K], `reconstruct` for [B, D]; both float32 and of length 1.
        """
        from longclip_rt.model.pca_head import PcaHead

        tower = copy.copy(self)
        tower._modules = dict(self._modules)  # or the head would become this tower's too
        tower.pca_head = PcaHead(self.projection, pca.basis(self.kind), mode)
        tower.outputs = (*self.outputs, f"{self.kind}_pca")
        return tower

    def _pooled(self, last: Tensor) -> dict[str, Callable[[], Tensor]]:
        """What comes of pooled states [B, W]: normalised, the embedding, and its PCA where there is a head."""

        def pooled() -> Tensor:
            return _norm(self.final_norm, last)

        return {"pooler_output": pooled, **self._embeddings(last, pooled)}

    def _embeddings(self, last: Tensor, pooled: Callable[[], Tensor]) -> dict[str, Callable[[], Tensor]]:
        head, fused = self.pca_head, self.fused_head
        if head is None:
            return {self.embedding: lambda: _normalized(pooled(), self.projection)}
        # Both out of one product.
        both = functools.cache(lambda: head(pooled()) if fused is None else fused(last))
        return {self.embedding: lambda: both()[0], f"{self.kind}_pca": lambda: both()[1]}

    def _check(self, outputs: Sequence[str]) -> tuple[str, ...]:
        names = tuple(outputs)
        known = self.output_names
        for name in names:
            if name not in known:
                raise LongClipError(
                    f"The {type(self).__name__} has no output named {name!r}. It has: {', '.join(known[:3])}, and "
                    f"hidden_states.-1 to hidden_states.-{len(self.blocks) + 1} (counted from the last block)."
                )
        if not names or len(set(names)) < len(names):
            raise LongClipError(f"Outputs are named once each, and at least one; got {list(names)}.")
        return names

    def _run_blocks(self, x: Tensor, pick: Pick) -> tuple[list[Tensor], Tensor]:
        """Runs the blocks on tokens [B, S, W].

        Returns:
            The blocks' inputs and, last, the output: one state more than blocks, or as many where no chosen output
            holds all of the last block's tokens. And the token of each row that `pick` takes from the output, [B, W].
        """
        states = [x]
        for block in self.blocks[:-1]:
            states.append(block(states[-1]))
        last = self.blocks[-1]
        if not {"last_hidden_state", "hidden_states.-1"}.isdisjoint(self.outputs):
            states.append(last(states[-1]))
            return states, pick(states[-1])
        return states, last(states[-1], pick)

    def _named(self, states: list[Tensor], parts: dict[str, Callable[[], Tensor]]) -> tuple[Tensor, ...]:
        """The chosen outputs in order, each float32; what is not chosen is not computed."""
        chosen: list[Tensor] = []
        for name in self.outputs:
            hidden = re.fullmatch(r"hidden_states\.-(\d+)", name)
            # The list may lack the last state, so states are counted from the first, the blocks' input.
            chosen.append((states[len(self.blocks) + 1 - int(hidden[1])] if hidden else parts[name]()).float())
        return tuple(chosen)


def _normalized(pooled: Tensor, projection: Tensor) -> Tensor:
    """Projects [B, W] by [W, D] in the projection's dtype; scales to length 1 in fp32, where eps 1e-12 is not 0."""
    return F.normalize((pooled.to(projection.dtype) @ projection).float(), dim=-1)


def _norm(norm: Any, x: Tensor) -> Tensor:
    out: Tensor = norm(x.to(norm.weight.dtype))
    return out


class TextTower(_Tower):
    """Token ids to text embeddings.

    Outputs, as Hugging Face's CLIP defines them: `text_embeds` [B, D] (normalised), `pooler_output` [B, W] (the EOT
    token after the final LayerNorm, not projected), `last_hidden_state` [B, S, W] (after the final LayerNorm),
    `hidden_states.-N` [B, S, W] (without it). All float32.
    """

    kind = "text"
    embedding = "text_embeds"

    def __init__(self, architecture: Architecture, model: Any) -> None:
        """Takes the text tower out of an open_clip `CLIP` of this architecture; weights are shared, not copied."""
        super().__init__(architecture, model.transformer, causal=True)
        self.token_embedding = model.token_embedding
        self.positional_embedding = model.positional_embedding
        self.ln_final = model.ln_final
        self.text_projection = model.text_projection

    def positions(self, length: int) -> Tensor:
        """The first `length` rows of the position table, [length, W]; training has two tables and overrides this."""
        table: Tensor = self.positional_embedding
        return table[:length]

    @property
    def final_norm(self) -> nn.LayerNorm:
        """`ln_final`."""
        norm: nn.LayerNorm = self.ln_final
        return norm

    @property
    def projection(self) -> Tensor:
        """From the text width W to an embedding, [W, D]."""
        projection: Tensor = self.text_projection
        return projection

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Encodes texts.

        Args:
            ids: Token ids [B, S], int32 or int64, 1 <= S <= context length; what follows a text's first EOT
                (`architecture.eot_id`) cannot reach its pooled outputs. A text without EOT is pooled at its last slot.

        Returns:
            The tensors that `outputs` names, float32.
        """
        length = ids.shape[1]
        x = self.token_embedding(ids) + self.positions(length)  # [B, S, W]
        # Found by equality on integers: in half precision 49406 (SOT) and 49407 (EOT) are the same number.
        slots = torch.arange(length, device=ids.device)
        eot = torch.where(ids == self.architecture.eot_id, slots, length - 1).amin(dim=-1)  # [B]

        rows = torch.arange(ids.shape[0], device=ids.device)
        states, last = self._run_blocks(x, lambda tokens: tokens[rows, eot])
        return self._named(
            states, {**self._pooled(last), "last_hidden_state": lambda: _norm(self.ln_final, states[-1])}
        )


class ImageTower(_Tower):
    """Pixels to image embeddings.

    Outputs, as Hugging Face's CLIP defines them: `image_embeds` [B, D] (normalised), `pooler_output` [B, W] (the class
    token after the post LayerNorm, not projected), `last_hidden_state` [B, T, W] (every token, without the post
    LayerNorm), `hidden_states.-N` [B, T, W]. All float32.
    """

    kind = "image"
    embedding = "image_embeds"

    def __init__(self, architecture: Architecture, model: Any) -> None:
        """Takes the image tower out of an open_clip `CLIP` of this architecture; weights are shared, not copied."""
        visual = model.visual
        super().__init__(architecture, visual.transformer, causal=False)
        self.conv1 = visual.conv1
        self.class_embedding = visual.class_embedding
        self.positional_embedding = visual.positional_embedding
        self.ln_pre = visual.ln_pre
        self.ln_post = visual.ln_post
        self.proj = visual.proj

    @property
    def final_norm(self) -> nn.LayerNorm:
        """`ln_post`."""
        norm: nn.LayerNorm = self.ln_post
        return norm

    @property
    def projection(self) -> Tensor:
        """From the vision width W to an embedding, [W, D]."""
        projection: Tensor = self.proj
        return projection

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Encodes images.

        Args:
            pixels: Normalised pixels [B, 3, H, W], float32 whatever the tower's dtype, H = W = `image_size`.

        Returns:
            The tensors that `outputs` names, float32.
        """
        patches = self.conv1(pixels.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)  # [B, T - 1, W]
        first = self.class_embedding.expand(pixels.shape[0], 1, -1)  # [B, 1, W]
        x = torch.cat([first, patches], dim=1) + self.positional_embedding  # [B, T, W]
        states, last = self._run_blocks(_norm(self.ln_pre, x), lambda tokens: tokens[:, 0])
        return self._named(states, {**self._pooled(last), "last_hidden_state": lambda: states[-1]})


def open_clip_model(architecture: Architecture, state_dict: dict[str, Tensor]) -> nn.Module:
    """Builds open_clip's own `CLIP` around a canonical state dict, without copying a weight.

    Args:
        architecture: The model's numbers.
        state_dict: Every tensor of `architecture.shapes()`.

    Returns:
        An `open_clip.model.CLIP` in eval mode whose parameters are the given tensors, without gradients. Its buffers
        (the causal mask) hold no data: it serves to take towers from, not to be run.

    Raises:
        MissingExtraError: open_clip is not installed.
    """
    model_module = require("open_clip.model", "export")
    arch = architecture
    # open_clip computes int(width * ratio), which must not fall short of the MLP's width by rounding.
    with torch.device("meta"):
        model: nn.Module = model_module.CLIP(
            embed_dim=arch.embed_dim,
            quick_gelu=arch.quick_gelu,
            vision_cfg={
                "layers": arch.vision_layers,
                "width": arch.vision_width,
                "head_width": arch.vision_head_width,
                "mlp_ratio": (arch.vision_mlp_width + 0.5) / arch.vision_width,
                "patch_size": arch.patch_size,
                "image_size": arch.image_size,
            },
            text_cfg={
                "context_length": arch.context_length,
                "vocab_size": arch.vocab_size,
                "width": arch.text_width,
                "heads": arch.text_heads,
                "layers": arch.text_layers,
                "mlp_ratio": (arch.text_mlp_width + 0.5) / arch.text_width,
            },
        )
    model.load_state_dict(state_dict, strict=True, assign=True)
    return model.requires_grad_(False).eval()
