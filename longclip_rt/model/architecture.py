"""The shape of a CLIP model: its numbers, where they come from, and the tensors that they call for."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from longclip_rt.errors import WeightsError

HEAD_WIDTH = 64
"""Channels of one attention head in every CLIP that OpenAI released; weights do not show it, so it must be known."""

VOCAB_SIZE = 49408
"""Entries of CLIP's byte-pair vocabulary: the byte symbols, the merges, and the two special tokens."""

UNMERGED = 514
"""Entries of it that are no merges: 256 bytes, the same at the end of a word, and the two special tokens."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Means of red, green and blue in CLIP's training images, of values from 0 to 1."""

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Their standard deviations."""

CLIP_CONTEXT_LENGTH = 77
LONG_CONTEXT_LENGTH = 248

# patch, vision width and layers, text width and layers, embedding width -> name; the image size only adds a suffix.
_NAMES = {
    (32, 768, 12, 512, 12, 512): "ViT-B-32",
    (16, 768, 12, 512, 12, 512): "ViT-B-16",
    (14, 1024, 24, 768, 12, 768): "ViT-L-14",
    (14, 1280, 32, 1024, 24, 1024): "ViT-H-14",
    (14, 1664, 48, 1280, 32, 1280): "ViT-bigG-14",
}

# Image towers of open_clip's with heads of other than 64 channels: width and layers -> channels of a head.
_OTHER_HEADS = {(1280, 32): 80, (1408, 40): 88, (1664, 48): 104, (1792, 56): 112}


@dataclass(frozen=True)
class Architecture:
    """The numbers that determine a CLIP model with a Vision Transformer.

    Attributes:
        image_size: Height and width of an image in pixels.
        patch_size: Height and width of a patch in pixels.
        vision_width: Channels of the image tower.
        vision_layers: Blocks of the image tower.
        text_width: Channels of the text tower.
        text_layers: Blocks of the text tower.
        embed_dim: Length D of an embedding.
        vocab_size: Rows of the token table. Fewer than CLIP's 49408 mean CLIP's vocabulary without its last merges.
        context_length: Rows of the text position table, in tokens.
        quick_gelu: Whether the activation is x * sigmoid(1.702 x) (OpenAI's and Long-CLIP's) rather than exact GELU.
        vision_mlp_width: Channels inside an MLP of the image tower; 0 stands for 4 * vision_width.
        text_mlp_width: Channels inside an MLP of the text tower; 0 stands for 4 * text_width.
        vision_head_width: Channels of an attention head of the image tower.
        text_head_width: Channels of an attention head of the text tower.
    """

    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    text_width: int
    text_layers: int
    embed_dim: int
    vocab_size: int = VOCAB_SIZE
    context_length: int = LONG_CONTEXT_LENGTH
    quick_gelu: bool = True
    vision_mlp_width: int = 0
    text_mlp_width: int = 0
    vision_head_width: int = HEAD_WIDTH
    text_head_width: int = HEAD_WIDTH

    def __post_init__(self) -> None:
        object.__setattr__(self, "vision_mlp_width", self.vision_mlp_width or 4 * self.vision_width)
        object.__setattr__(self, "text_mlp_width", self.text_mlp_width or 4 * self.text_width)
        for field in dataclasses.fields(self):
            if field.name != "quick_gelu" and getattr(self, field.name) < 1:
                raise WeightsError(f"An architecture's {field.name} must be positive; got {getattr(self, field.name)}.")
        for tower, width, head in (
            ("vision", self.vision_width, self.vision_head_width),
            ("text", self.text_width, self.text_head_width),
        ):
            if width % head:
                raise WeightsError(
                    f"The {tower} width must be a multiple of its heads' {head} channels; got {width}. "
                    "CLIP models have heads of 64 channels unless their configuration says otherwise."
                )
        if self.image_size % self.patch_size:
            raise WeightsError(
                f"The image size must be a multiple of the patch size; got {self.image_size} and {self.patch_size}."
            )

    @property
    def vision_heads(self) -> int:
        """Attention heads of the image tower."""
        return self.vision_width // self.vision_head_width

    @property
    def text_heads(self) -> int:
        """Attention heads of the text tower."""
        return self.text_width // self.text_head_width

    @property
    def sot_id(self) -> int:
        """Id of the start-of-text token, the vocabulary's last entry but one: 49406 in CLIP's whole vocabulary."""
        return self.vocab_size - 2

    @property
    def eot_id(self) -> int:
        """Id of the end-of-text token, the vocabulary's last entry: 49407 in CLIP's whole vocabulary."""
        return self.vocab_size - 1

    @property
    def image_tokens(self) -> int:
        """Tokens of an image: one a patch, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def name(self) -> str:
        """open_clip's name for this shape, such as `ViT-L-14-336`, or `ViT-w128-l2-p16` where it has none."""
        key = (
            self.patch_size,
            self.vision_width,
            self.vision_layers,
            self.text_width,
            self.text_layers,
            self.embed_dim,
        )
        size = "" if self.image_size == 224 else f"-{self.image_size}"
        return _NAMES.get(key, f"ViT-w{self.vision_width}-l{self.vision_layers}-p{self.patch_size}") + size

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for a manifest; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Architecture:
        """Builds an architecture from `to_dict`'s values; fields of a newer version are ignored.

        Raises:
            WeightsError: A field is missing, or its value makes no architecture.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        try:
            return cls(**{name: value for name, value in fields.items() if name in names})
        except TypeError as error:
            raise WeightsError(
                f"These fields do not describe a CLIP architecture: {dict(fields)} ({error})."
            ) from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors this architecture consists of: OpenAI's names (which are open_clip's too), and their shapes."""
        vision, text = self.vision_width, self.text_width
        shapes: dict[str, tuple[int, ...]] = {
            "positional_embedding": (self.context_length, text),
            "text_projection": (text, self.embed_dim),
            "logit_scale": (),
            "token_embedding.weight": (self.vocab_size, text),
            "ln_final.weight": (text,),
            "ln_final.bias": (text,),
            "visual.class_embedding": (vision,),
            "visual.positional_embedding": (self.image_tokens, vision),
            "visual.proj": (vision, self.embed_dim),
            "visual.conv1.weight": (vision, 3, self.patch_size, self.patch_size),
        }
        for norm in ("ln_pre", "ln_post"):
            shapes |= {f"visual.{norm}.weight": (vision,), f"visual.{norm}.bias": (vision,)}
        shapes |= _block_shapes("visual.transformer", vision, self.vision_mlp_width, self.vision_layers)
        shapes |= _block_shapes("transformer", text, self.text_mlp_width, self.text_layers)
        return shapes


def _block_shapes(prefix: str, width: int, mlp_width: int, layers: int) -> dict[str, tuple[int, ...]]:
    one: dict[str, tuple[int, ...]] = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "mlp.c_fc.weight": (mlp_width, width),
        "mlp.c_fc.bias": (mlp_width,),
        "mlp.c_proj.weight": (width, mlp_width),
        "mlp.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
    }
    return {f"{prefix}.resblocks.{layer}.{name}": shape for layer in range(layers) for name, shape in one.items()}


def architecture_from_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
    *,
    quick_gelu: bool = True,
    vision_head_width: int | None = None,
    text_head_width: int | None = None,
    vocab_size: int | None = None,
) -> Architecture:
    """Recognises the architecture that a canonical state dict was made for, and checks every shape against it.

    Args:
        shapes: Tensor names and shapes, with OpenAI's names and one position table.
        source: What the user named, for error messages.
        quick_gelu: The activation; shapes do not show it.
        vision_head_width: Channels of an attention head of the image tower, where known; else 64, or what open_clip's
            larger models of that width and depth have.
        text_head_width: Channels of an attention head of the text tower, where known; else 64.
        vocab_size: Entries of the vocabulary, where the weights are known to be made for CLIP's cut to its first
            merges; else CLIP's whole vocabulary is expected. A table's size alone does not show whose tokens it holds.

    Returns:
        The architecture, whose `shapes()` equal the given ones.

    Raises:
        WeightsError: Tensors are missing, unexpected or of a wrong shape (named), or the shapes make no CLIP.
    """
    lacking = [name for name in _TELLING if len(shapes.get(name, ())) != _TELLING[name]]
    if lacking:
        raise WeightsError(f"{source} lacks these tensors of a CLIP, or has them in another shape: {few(lacking)}.")
    width, _, patch, _ = shapes["visual.conv1.weight"]
    layers = _layers(shapes, "visual.transformer")
    rows = shapes["visual.positional_embedding"][0]
    grid = math.isqrt(max(rows - 1, 0))
    if grid < 1 or grid * grid + 1 != rows:
        raise WeightsError(f"{source} has {rows} image positions; a class token and a square of patches were expected.")
    rows, text_width = shapes["token_embedding.weight"]
    _check_vocabulary(rows, vocab_size, source)
    architecture = Architecture(
        image_size=grid * patch,
        patch_size=patch,
        vision_width=width,
        vision_layers=layers,
        text_width=text_width,
        text_layers=_layers(shapes, "transformer"),
        embed_dim=shapes["text_projection"][1],
        vocab_size=rows,
        context_length=shapes["positional_embedding"][0],
        quick_gelu=quick_gelu,
        vision_mlp_width=shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        text_mlp_width=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        vision_head_width=vision_head_width or _OTHER_HEADS.get((width, layers), HEAD_WIDTH),
        text_head_width=text_head_width or HEAD_WIDTH,
    )
    _check_shapes(architecture, shapes, source)
    return architecture


_MOST_SHOWN = 160

# Tensors that the numbers are read off, and how many dimensions they have.
_TELLING = {
    "visual.conv1.weight": 4,
    "visual.positional_embedding": 2,
    "positional_embedding": 2,
    "token_embedding.weight": 2,
    "text_projection": 2,
    "visual.transformer.resblocks.0.mlp.c_fc.weight": 2,
    "transformer.resblocks.0.mlp.c_fc.weight": 2,
}


def _layers(names: Iterable[str], prefix: str) -> int:
    # Up to 1000 blocks, where the largest CLIPs have 56: a name alone must not call for millions of tensors.
    pattern = re.compile(re.escape(prefix) + r"\.resblocks\.(0|[1-9][0-9]{0,2})\.")
    return 1 + max(int(found[1]) for name in names if (found := pattern.match(name)))


def _check_vocabulary(rows: int, stated: int | None, source: str) -> None:
    """Refuses a token table for anything but CLIP's vocabulary, whole or, where so stated, cut to its first merges."""
    if stated is None and rows != VOCAB_SIZE:
        raise WeightsError(
            f"{source} has a vocabulary of {rows} tokens; CLIP's has {VOCAB_SIZE}. Its tokenizer is another one."
        )
    if stated is not None and not UNMERGED < stated <= VOCAB_SIZE:
        raise WeightsError(
            f"{source} states a vocabulary of {stated} tokens; CLIP's, cut to its first merges, has from "
            f"{UNMERGED + 1} to {VOCAB_SIZE}."
        )
    if stated is not None and rows != stated:
        raise WeightsError(
            f"{source} states a vocabulary of {stated} tokens, but has a table of {rows}. One of the two is another "
            "model's: write the weights again, or pass others."
        )


def _check_shapes(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    expected = architecture.shapes()
    missing = sorted(expected.keys() - shapes.keys())
    unexpected = sorted(shapes.keys() - expected.keys())
    wrong = [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    complaints = [
        f"{what}: {few(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", wrong))
        if names
    ]
    if complaints:
        raise WeightsError(f"{source} seems to be a {architecture.name}, but has tensors {'; '.join(complaints)}.")


def few(names: list[str], most: int = 3) -> str:
    """The first of many names, with the count of the rest, for an error message; long ones are cut."""
    rest = len(names) - most
    return ", ".join(map(_shortened, names[:most])) + (f" and {rest} more" if rest > 0 else "")


def _shortened(name: str) -> str:
    return name if len(name) <= _MOST_SHOWN else f"{name[:_MOST_SHOWN]}..."
