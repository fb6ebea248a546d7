"""Weights out of open_clip's collection: `open_clip:MODEL/TAG`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip_rt.errors import WeightsError
from longclip_rt.system.extras import require
from longclip_rt.system.files import sha256_of_file
from longclip_rt.weights.config import ModelConfig, architecture_from_open_clip, with_preprocessing
from longclip_rt.weights.hub import download_weights, parse_hub_id

if TYPE_CHECKING:
    from torch import Tensor

OPEN_CLIP_PREFIX = "open_clip:"


def open_clip_config(model: str) -> dict[str, Any]:
    """open_clip's configuration of a model, by name.

    Raises:
        WeightsError: open_clip knows no such model.
        MissingExtraError: open_clip is not installed.
    """
    open_clip = require("open_clip", "export")
    config: dict[str, Any] | None = open_clip.get_model_config(model) if model in open_clip.list_models() else None
    if config is None:
        raise WeightsError(f"open_clip knows no model {model!r}.{_did_you_mean(model, open_clip.list_models())}")
    return config


def load_open_clip(source: str, *, progress: bool = True) -> tuple[dict[str, Tensor], ModelConfig, str]:
    """Loads weights through open_clip itself.

    Args:
        source: `open_clip:MODEL/TAG`, or `open_clip:MODEL/PATH` with a file that open_clip can read for that model.
        progress: Whether to show download progress on stderr.

    Returns:
        The model's state dict (float32), its configuration, and the file's hash.

    Raises:
        WeightsError: The model or tag is unknown, the model is not a plain CLIP, or the weights cannot be downloaded.
        MissingExtraError: open_clip is not installed.
    """
    open_clip = require("open_clip", "export")
    name, _, tag = source.removeprefix(OPEN_CLIP_PREFIX).partition("/")
    architecture = architecture_from_open_clip(open_clip_config(name), source)
    settings = open_clip.get_pretrained_cfg(name, tag)
    config = with_preprocessing(ModelConfig(), settings, source)
    path = _fetch(open_clip, name, tag, settings, progress)
    # A tag that was trained with QuickGELU says so; create_model only warns where the model's configuration differs.
    quick_gelu = architecture.quick_gelu or bool(settings.get("quick_gelu", False))
    try:
        model = open_clip.create_model(name, pretrained=str(path), force_quick_gelu=quick_gelu, weights_only=True)
    # create_model passes on whatever torch, safetensors or its own checks raise about the file.
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"open_clip cannot load {path} as a {name}: {first} "
            "If its download was broken off, delete it and try again."
        ) from error
    found = type(model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    return (
        model.state_dict(),
        ModelConfig(
            quick_gelu=found,
            vision_head_width=architecture.vision_head_width,
            text_head_width=architecture.text_head_width,
            image_mean=config.image_mean,
            image_std=config.image_std,
        ),
        sha256_of_file(path),
    )


def _fetch(open_clip: Any, name: str, tag: str, settings: dict[str, Any], progress: bool) -> Path:
    """The file behind a tag, downloaded where it is not in the cache; or the file that the tag itself names."""
    if not settings:
        if tag and Path(tag).is_file():
            return Path(tag)
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = f" It has: {', '.join(tags)}." if tags else " It has none; pass a file."
        raise WeightsError(f"open_clip has no weights {tag!r} for {name}.{known}")
    # open_clip's own download tries several files in turn, and each for half a minute when the hub does not answer.
    hub_id = parse_hub_id(settings.get("hf_hub", "").rstrip("/"))
    if hub_id is not None:
        return download_weights(hub_id, progress=progress)
    url = settings["url"]
    try:
        return Path(open_clip.download_pretrained_from_url(url))
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"{url} cannot be downloaded: {error}. Check the connection, or download it on another machine, copy it "
            "here and pass its path."
        ) from error


def _did_you_mean(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""
