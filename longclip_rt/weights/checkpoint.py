"""Weights of any supported kind to one canonical state dict and its architecture."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from longclip_rt.errors import WeightsError
from longclip_rt.model.architecture import (
    CLIP_MEAN,
    CLIP_STD,
    LONG_CONTEXT_LENGTH,
    Architecture,
    architecture_from_shapes,
    few,
)
from longclip_rt.model.positions import KEPT_ROWS, fold_positions, stretch_positions
from longclip_rt.system.extras import require
from longclip_rt.weights.config import ModelConfig, Triple, architecture_from_open_clip, read_config
from longclip_rt.weights.files import SUFFIXES, choose_weights, read_weights, tensors_of
from longclip_rt.weights.hub import HUB_PREFIX, HubId, download_weights, parse_hub_id
from longclip_rt.weights.naming import SECOND_TABLE, canonical_names, without_implied
from longclip_rt.weights.open_clip import OPEN_CLIP_PREFIX, load_open_clip, open_clip_config
from longclip_rt.weights.random import random_state_dict, sha256_of_tensors
from longclip_rt.weights.refusals import (
    refuse_incomplete_models,
    refuse_other_architectures,
    refuse_unusable_tensors,
    refuse_without_information,
)

if TYPE_CHECKING:
    from torch import Tensor

    from longclip_rt.model.towers import ImageTower, TextTower

__all__ = [
    "Activation",
    "Checkpoint",
    "checkpoint_from_tensors",
    "load_checkpoint",
    "random_state_dict",
    "towers_from_checkpoint",
]

_log = logging.getLogger("longclip_rt")

Activation = Literal["quick_gelu", "gelu"]

RANDOM_PREFIX = "random:"


@dataclass(frozen=True)
class Checkpoint:
    """Weights in the one form that the rest of the package knows.

    Attributes:
        state_dict: The tensors of `architecture.shapes()`, float32, contiguous, on the CPU; a single position table.
        architecture: The model's numbers.
        source: What the user typed.
        sha256: Hash of the weights file, or of the state dict where there is no single file.
        trained: False for seeded, untrained weights.
        notes: What was done to the weights on the way, and what had to be assumed, in words.
        image_mean: Mean of each colour channel (red, green, blue; of values from 0 to 1), to be subtracted.
        image_std: Deviation of each channel, to be divided by.
    """

    state_dict: dict[str, Tensor]
    architecture: Architecture
    source: str
    sha256: str | None
    trained: bool
    notes: tuple[str, ...] = ()
    image_mean: Triple = CLIP_MEAN
    image_std: Triple = CLIP_STD

    @property
    def config(self) -> ModelConfig:
        """What the tensors do not say about the model; files that hold the weights carry it."""
        return ModelConfig(
            quick_gelu=self.architecture.quick_gelu,
            vision_head_width=self.architecture.vision_head_width,
            text_head_width=self.architecture.text_head_width,
            image_mean=self.image_mean,
            image_std=self.image_std,
            trained=self.trained,
            vocab_size=self.architecture.vocab_size,
        )


def load_checkpoint(
    source: str | Path,
    *,
    activation: Activation | None = None,
    context_length: int | None = LONG_CONTEXT_LENGTH,
    progress: bool = True,
) -> Checkpoint:
    """Loads CLIP or Long-CLIP weights from wherever they are.

    Position tables are folded where there are two, and stretched where they are shorter than `context_length`
    (Long-CLIP, arXiv 2403.15378, "Knowledge-Preserved Stretching").

    Args:
        source: A file (`.pt`, `.pth`, `.bin` or safetensors, with OpenAI's, open_clip's or Hugging Face's names), a
            folder that holds one, a hub id (`owner/name` or `owner/name/file`), `open_clip:MODEL/TAG`, or
            `random:MODEL` and `random:MODEL@SEED` for seeded, untrained weights in the shape of an open_clip model.
        activation: The activation, where the weights' own configuration (or QuickGELU, where there is none) is wrong.
        context_length: Rows of the position table to end with, in tokens; None leaves it as it is.
        progress: Whether to show download progress on stderr.

    Returns:
        The checkpoint: float32 on the CPU.

    Raises:
        WeightsError: The weights cannot be had or read, or are not a CLIP's; the message says what was found.
        MissingExtraError: A package that is needed for this source is not installed.
    """
    text = str(source)
    if activation is not None and activation not in get_args(Activation):
        raise WeightsError(f"There is no activation {activation!r}; known are {', '.join(get_args(Activation))}.")
    require("torch", "export")
    if text.startswith(RANDOM_PREFIX):
        return _random_checkpoint(text, activation, context_length)
    sha256: str | None
    if text.startswith(OPEN_CLIP_PREFIX):
        tensors, config, sha256 = load_open_clip(text, progress=progress)
    else:
        path = _local_file(text, progress)
        raw = read_weights(path)
        tensors, sha256 = tensors_of(raw.content, text), raw.sha256
        config = read_config(path.parent).with_metadata(raw.metadata)
    return checkpoint_from_tensors(
        tensors, text, config=config, sha256=sha256, activation=activation, context_length=context_length
    )


def checkpoint_from_tensors(
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    config: ModelConfig | None = None,
    sha256: str | None = None,
    activation: Activation | None = None,
    context_length: int | None = LONG_CONTEXT_LENGTH,
) -> Checkpoint:
    """Makes a checkpoint of a state dict in memory, as `load_checkpoint` does of a file.

    Args:
        tensors: Names to tensors, of any float type, with OpenAI's, open_clip's or Hugging Face's names.
        source: What to call it in messages and manifests.
        config: What is known beside the tensors.
        sha256: Hash of the file they came from; the state dict is hashed where there is none.
        activation: See `load_checkpoint`.
        context_length: See `load_checkpoint`.

    Returns:
        The checkpoint; tensors that were float32 and contiguous already are shared with the given ones.

    Raises:
        WeightsError: The tensors are not a CLIP's, not finite, or of a kind that cannot be used.
    """
    config = config or ModelConfig()
    refuse_other_architectures(tensors.keys(), source)
    given = without_implied(tensors)
    refuse_unusable_tensors(given, source)
    state_dict, notes = canonical_names(given)
    refuse_incomplete_models(state_dict.keys(), source)
    notes.extend(_conversions(given))
    state_dict = _as_float32(state_dict, source)
    _settle_positions(state_dict, context_length, source, notes)
    _settle_logit_scale(state_dict, notes)
    architecture = architecture_from_shapes(
        {name: tuple(tensor.shape) for name, tensor in state_dict.items()},
        source,
        quick_gelu=_quick_gelu(config, activation, notes),
        vision_head_width=config.vision_head_width,
        text_head_width=config.text_head_width,
        vocab_size=config.vocab_size,
    )
    state_dict = {name: state_dict[name] for name in architecture.shapes()}
    refuse_without_information(state_dict, source)
    return Checkpoint(
        state_dict,
        architecture,
        source,
        sha256 or sha256_of_tensors(state_dict),
        trained=config.trained,
        notes=tuple(notes),
        image_mean=config.image_mean,
        image_std=config.image_std,
    )


def _random_checkpoint(source: str, activation: Activation | None, context_length: int | None) -> Checkpoint:
    model, _, seed = source.removeprefix(RANDOM_PREFIX).partition("@")
    if seed and not seed.isdecimal():
        raise WeightsError(
            f"The seed in {source} must be a whole number, as in {RANDOM_PREFIX}{model}@1; got {seed!r}."
        )
    # Long-CLIP's activation, whatever open_clip's configuration of that name says.
    architecture = architecture_from_open_clip(open_clip_config(model), source, quick_gelu=activation != "gelu")
    state_dict = random_state_dict(architecture, int(seed or 0))
    notes = [f"drawn at random with seed {int(seed or 0)}; not trained"]
    _settle_positions(state_dict, context_length, source, notes)
    architecture = dataclasses.replace(architecture, context_length=len(state_dict["positional_embedding"]))
    return Checkpoint(
        state_dict, architecture, source, sha256_of_tensors(state_dict), trained=False, notes=tuple(notes)
    )


def _local_file(source: str, progress: bool) -> Path:
    """The file of weights that a path or hub id leads to."""
    path = Path(source).expanduser()
    if path.is_dir() and source:
        # Two levels, and no more: the folder may be somebody's home.
        files = (one for pattern in ("*", "*/*") for one in path.glob(pattern) if one.is_file())
        return path / choose_weights([one.relative_to(path).as_posix() for one in files], source)
    if path.is_file():
        return path
    hub_id = parse_hub_id(source)
    if hub_id is not None and (source.startswith(HUB_PREFIX) or not _looks_like_a_path(source, hub_id)):
        return download_weights(hub_id, progress=progress)
    hint = f" If you meant the hub, write {HUB_PREFIX}{source}." if hub_id else ""
    raise WeightsError(
        f"There is no file or folder {source}. Weights are a path, a hub id such as BeichenZhang/LongCLIP-B, "
        f"open_clip:MODEL/TAG, or random:MODEL.{hint}"
    )


def _looks_like_a_path(source: str, hub_id: HubId) -> bool:
    """Whether what could be a hub id was meant as a path: `./a/b`, `folder/weights.pt`, or in a folder that is here."""
    is_file_in_a_folder = source.endswith(SUFFIXES) and not hub_id.file
    return source.startswith(".") or is_file_in_a_folder or Path(Path(source).parts[0]).is_dir()


def _conversions(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """A note on each float type that is not float32: of all tensors, or of how many."""
    counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    for dtype, count in sorted(counts.items()):
        if dtype != "float32":
            share = "" if count == len(tensors) else f" ({count} of {len(tensors)} tensors)"
            yield f"{dtype} converted to float32{share}"


def _as_float32(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    import torch

    converted = {name: tensor.detach().to(torch.float32).contiguous() for name, tensor in tensors.items()}
    broken = [name for name, tensor in converted.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise WeightsError(
            f"{source} holds NaN or infinite numbers in {few(broken)}. The file or its training is broken."
        )
    return converted


def _settle_positions(state_dict: dict[str, Tensor], context_length: int | None, source: str, notes: list[str]) -> None:
    """Leaves one text position table of `context_length` rows (None: its own): folded, and stretched where shorter."""
    table = _lengthened(state_dict["positional_embedding"], context_length, source, notes)
    second = state_dict.pop(SECOND_TABLE, None)
    if second is not None:
        table = fold_positions(table, _lengthened(second, context_length, source, notes))
        notes.append(f"folded two position tables: rows below {KEPT_ROWS} of the first, the others of the second")
    state_dict["positional_embedding"] = table


def _lengthened(table: Tensor, context_length: int | None, source: str, notes: list[str]) -> Tensor:
    if table.ndim != 2:
        raise WeightsError(f"{source} has a text position table of shape {list(table.shape)}; a matrix was expected.")
    rows = table.shape[0]
    if context_length is None or rows == context_length:
        return table
    old, new = rows - KEPT_ROWS, context_length - KEPT_ROWS
    if old < 2 or new <= old or new % old:
        raise WeightsError(
            f"{source} has a text position table of {rows} rows, which cannot be stretched to {context_length}: "
            f"expected are {context_length} rows, or 77 as CLIP has."
        )
    notes.append(f"stretched {rows} -> {context_length} positions (KPS)")
    return stretch_positions(table, ratio=new // old)


def _settle_logit_scale(state_dict: dict[str, Tensor], notes: list[str]) -> None:
    """Gives the temperature OpenAI's shape. Embeddings do not depend on it: an absent one is set to CLIP's bound."""
    import torch

    if "logit_scale" in state_dict:
        if state_dict["logit_scale"].numel() == 1:
            state_dict["logit_scale"] = state_dict["logit_scale"].reshape(())
        return
    state_dict["logit_scale"] = torch.tensor(100.0).log()
    notes.append("no logit_scale given; set to ln 100")


def _quick_gelu(config: ModelConfig, activation: Activation | None, notes: list[str]) -> bool:
    if activation is not None:
        chosen = activation == "quick_gelu"
        if config.quick_gelu not in (None, chosen):
            notes.append(f"activation {activation} as asked for, against the weights' configuration")
            _log.warning("using the activation %s as asked for, against the weights' configuration", activation)
        return chosen
    if config.quick_gelu is None:
        notes.append(
            "activation QuickGELU assumed (Long-CLIP's and OpenAI's): nothing beside the weights says otherwise"
        )
        return True
    return config.quick_gelu


def towers_from_checkpoint(checkpoint: Checkpoint) -> tuple[TextTower, ImageTower]:
    """Builds both towers around a checkpoint's weights, without copying them.

    Args:
        checkpoint: What `load_checkpoint` returned.

    Returns:
        The text tower and the image tower, float32, on the CPU, in eval mode, without gradients.

    Raises:
        MissingExtraError: open_clip is not installed.
    """
    from longclip_rt.model.towers import ImageTower, TextTower, open_clip_model

    model = open_clip_model(checkpoint.architecture, checkpoint.state_dict)
    text = TextTower(checkpoint.architecture, model)
    image = ImageTower(checkpoint.architecture, model)
    return text.eval(), image.eval()
