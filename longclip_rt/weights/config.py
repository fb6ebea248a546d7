"""What tensors do not say about a model (activation, head width, image normalisation), read from JSON beside them."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip_rt.errors import WeightsError
from longclip_rt.model.architecture import (
    CLIP_CONTEXT_LENGTH,
    CLIP_MEAN,
    CLIP_STD,
    HEAD_WIDTH,
    VOCAB_SIZE,
    Architecture,
)

_log = logging.getLogger("longclip_rt")

CONFIG_FILES = ("config.json", "open_clip_config.json", "preprocessor_config.json")
"""Hugging Face's, open_clip's, and Hugging Face's for images."""

Triple = tuple[float, float, float]

_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_LARGEST_RATIO = 1000


@dataclass(frozen=True)
class ModelConfig:
    """What a configuration says; None where it says nothing.

    Attributes:
        quick_gelu: Whether the activation is x * sigmoid(1.702 x) rather than exact GELU.
        vision_head_width: Channels of an attention head of the image tower.
        text_head_width: Channels of an attention head of the text tower.
        image_mean: Mean of each colour channel (red, green, blue; of values from 0 to 1) that is subtracted.
        image_std: Deviation of each channel that is divided by.
        trained: False where the weights are known to be seeded, untrained ones.
        vocab_size: Entries of the model's vocabulary, where that is known to be CLIP's own, cut to its first merges or
            whole. Only this package's files say so: a configuration's `vocab_size` leaves open whose tokens they are.
    """

    quick_gelu: bool | None = None
    vision_head_width: int | None = None
    text_head_width: int | None = None
    image_mean: Triple = CLIP_MEAN
    image_std: Triple = CLIP_STD
    trained: bool = True
    vocab_size: int | None = None

    def to_metadata(self) -> dict[str, str]:
        """The fields as strings, for a safetensors file's header; `with_metadata` reads them back."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return {f"longclip_rt.{name}": json.dumps(value) for name, value in fields.items()}

    def with_metadata(self, metadata: Mapping[str, str]) -> ModelConfig:
        """This configuration, overridden by what a safetensors file written by this package says of itself.

        Raises:
            WeightsError: A value of this package's is not what `to_metadata` writes.
        """
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            text = metadata.get(f"longclip_rt.{field.name}")
            if text is None:
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                value = None
            found[field.name] = _checked(field.name, value, f"The weights' header (longclip_rt.{field.name})")
        return dataclasses.replace(self, **found)


def _checked(name: str, value: Any, where: str) -> Any:
    """A field's value out of JSON, refused where it cannot be one."""
    if name.startswith("image_"):
        # Of values from 0 to 1. A deviation below one step of 8 bits would blow pixels up, and 0 or NaN spoil them all.
        least = 0.0 if name == "image_mean" else 1 / 255
        good = isinstance(value, (list, tuple)) and len(value) == 3 and all(type(v) in (int, float) for v in value)
        if good and all(least <= v <= 1 for v in value):
            return tuple(float(v) for v in value)
        expected = f"three numbers from {'0' if name == 'image_mean' else '1/255'} to 1 were"
    elif name.endswith(("_width", "_size")):
        if type(value) is int and value > 0:
            return value
        expected = "a positive whole number was"
    else:
        if isinstance(value, bool):
            return value
        expected = "true or false was"
    raise WeightsError(f"{where} gives {value!r}; {expected} expected.")


def read_config(folder: Path) -> ModelConfig:
    """Reads whichever of `CONFIG_FILES` lie in a folder; one that describes no CLIP is passed over.

    Args:
        folder: The folder of the weights.

    Returns:
        What they say.

    Raises:
        WeightsError: One is not JSON, or says something that this package's towers cannot do.
    """
    config = ModelConfig()
    for name, reader in zip(CONFIG_FILES, (_from_huggingface, _from_open_clip_file, _from_preprocessor), strict=True):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise WeightsError(
                f"{path} is no readable JSON ({error}); mend it, or move it away from the weights."
            ) from error
        if isinstance(content, dict):
            config = reader(config, content, str(path))
    return config


def _from_huggingface(config: ModelConfig, content: Mapping[str, Any], path: str) -> ModelConfig:
    towers = {tower: content.get(f"{tower}_config") for tower in ("vision", "text")}
    if not any(isinstance(one, dict) for one in towers.values()):
        _log.debug("%s describes no CLIP model; passed over", path)
        return config
    found: dict[str, Any] = {}
    for tower, settings in towers.items():
        settings = settings if isinstance(settings, dict) else {}
        name = settings.get("hidden_act", "quick_gelu")  # the default of transformers' CLIPTextConfig
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise WeightsError(f"{path} asks for the activation {name!r}; known are {', '.join(_ACTIVATIONS)}.")
        if found.setdefault("quick_gelu", _ACTIVATIONS[name]) != _ACTIVATIONS[name]:
            raise WeightsError(f"{path} gives the two towers different activations; one for both was expected.")
        if settings.get("layer_norm_eps", 1e-5) != 1e-5:
            raise WeightsError(f"{path} sets layer_norm_eps={settings['layer_norm_eps']}; CLIP's is 1e-05.")
        heads = _whole(settings, "num_attention_heads", None, f"{path} ({tower}_config)")
        width = _whole(settings, "hidden_size", None, f"{path} ({tower}_config)")
        if heads and width:
            found[f"{tower}_head_width"] = _shared(width, heads, path)
    return dataclasses.replace(config, **found)


def _from_open_clip_file(config: ModelConfig, content: Mapping[str, Any], path: str) -> ModelConfig:
    model = content.get("model_cfg")
    if not isinstance(model, dict) or not {"vision_cfg", "text_cfg", "embed_dim"} <= model.keys():
        _log.debug("%s describes no model; passed over", path)
        return config
    architecture = architecture_from_open_clip(model, path)
    preprocess = content.get("preprocess_cfg")
    return dataclasses.replace(
        with_preprocessing(config, preprocess if isinstance(preprocess, dict) else {}, path),
        quick_gelu=architecture.quick_gelu,
        vision_head_width=architecture.vision_head_width,
        text_head_width=architecture.text_head_width,
    )


def _from_preprocessor(config: ModelConfig, content: Mapping[str, Any], path: str) -> ModelConfig:
    fields = {"mean": content.get("image_mean"), "std": content.get("image_std")}
    if content.get("do_center_crop") is False:
        fields["resize_mode"] = "squash"
    return with_preprocessing(config, {name: value for name, value in fields.items() if value}, path)


def _whole(settings: Mapping[str, Any], name: str, default: Any, where: str) -> Any:
    """A positive whole number out of JSON, or `default` where it is not given."""
    value = settings.get(name)
    if value is None:
        return default
    if type(value) is not int or value < 1:
        raise WeightsError(f"{where} gives {name}={value!r}; a positive whole number was expected.")
    return value


def _shared(width: int, heads: int, where: str) -> int:
    """Channels of one of `heads` attention heads."""
    if width % heads:
        raise WeightsError(f"{where} shares {width} channels among {heads} heads, which leaves a rest.")
    return width // heads


def with_preprocessing(config: ModelConfig, settings: Mapping[str, Any], path: str) -> ModelConfig:
    """A configuration with open_clip's `mean` and `std`; other ways to resize than CLIP's are refused.

    Raises:
        WeightsError: The mean or deviation is no triple, or images are to be resized in another way.
    """
    found = {
        f"image_{name}": _checked(f"image_{name}", settings[name], f"{path} ({name})")
        for name in ("mean", "std")
        if settings.get(name) is not None
    }
    for name, expected in (("interpolation", "bicubic"), ("resize_mode", "shortest")):
        if settings.get(name, expected) != expected:
            raise WeightsError(
                f"{path} asks for {name}={settings[name]!r}; images are prepared here as CLIP's are: the shorter side "
                "resized (bicubic), then the centre cropped."
            )
    return dataclasses.replace(config, **found)


def architecture_from_open_clip(config: Mapping[str, Any], source: str, quick_gelu: bool | None = None) -> Architecture:
    """Reads an architecture from an open_clip model configuration.

    Args:
        config: What `open_clip.get_model_config` returns: `embed_dim`, `vision_cfg`, `text_cfg`, perhaps `quick_gelu`.
        source: What the user named, for error messages.
        quick_gelu: The activation, where it is not to be the configuration's.

    Returns:
        The architecture, at the configuration's own context length.

    Raises:
        WeightsError: The model is no CLIP with a Vision Transformer and a causal text tower, or differs in its blocks.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise WeightsError(f"{source} describes no two towers: its vision_cfg and text_cfg must be JSON objects.")
    _refuse_other_parts(vision, text, config, source)

    def number(settings: Mapping[str, Any], name: str, default: int) -> int:
        return int(_whole(settings, name, default, source))

    vision_width, text_width = number(vision, "width", 768), number(text, "width", 512)
    return Architecture(
        image_size=number(vision, "image_size", 224),
        patch_size=number(vision, "patch_size", 16),
        vision_width=vision_width,
        vision_layers=number(vision, "layers", 12),
        text_width=text_width,
        text_layers=number(text, "layers", 12),
        embed_dim=number(config, "embed_dim", 512),
        vocab_size=number(text, "vocab_size", VOCAB_SIZE),
        context_length=number(text, "context_length", CLIP_CONTEXT_LENGTH),
        quick_gelu=_checked("quick_gelu", config.get("quick_gelu", False), source)
        if quick_gelu is None
        else quick_gelu,
        vision_mlp_width=_mlp_width(vision_width, vision, source),
        text_mlp_width=_mlp_width(text_width, text, source),
        vision_head_width=number(vision, "head_width", HEAD_WIDTH),
        text_head_width=_shared(text_width, number(text, "heads", 8), source),
    )


def _mlp_width(width: int, settings: Mapping[str, Any], source: str) -> int:
    ratio = settings.get("mlp_ratio", 4.0)
    if type(ratio) not in (int, float) or not 0 < ratio <= _LARGEST_RATIO:
        raise WeightsError(f"{source} gives mlp_ratio={ratio!r}; a number above 0 was expected, such as 4.")
    return int(width * ratio)


def _refuse_other_parts(
    vision: Mapping[str, Any], text: Mapping[str, Any], config: Mapping[str, Any], source: str
) -> None:
    """Refuses a configuration that asks for a part this package's towers do not have."""
    plain = {
        "vision_cfg": {"pool_type": "tok", "pos_embed_type": "learnable"},
        "text_cfg": {"pool_type": "argmax", "proj_type": "linear"},
    }
    # Numbers that only size the model, or that act in training or in the tokenizer alone.
    sizes = {"layers", "width", "head_width", "heads", "mlp_ratio", "patch_size", "image_size", "context_length"}
    harmless = sizes | {"vocab_size", "output_tokens", "patch_dropout", "pad_id", "eos_id", "attn_pooler_heads"}
    if isinstance(vision.get("layers"), (list, tuple)):
        raise WeightsError(
            f"{source} has a ResNet image tower; this package runs CLIP models with a Vision Transformer."
        )
    if isinstance(vision.get("image_size", 224), (list, tuple)):
        raise WeightsError(f"{source} takes images of {vision['image_size']} pixels; only square images are supported.")
    for part, settings in (("vision_cfg", vision), ("text_cfg", text)):
        for name, value in settings.items():
            if name in harmless or not value or plain[part].get(name) == value:
                continue
            raise WeightsError(
                f"{source} is not a plain CLIP: its {part} sets {name}={value!r}. This package runs the CLIP "
                "architecture: a Vision Transformer and a causal text tower with CLIP's own vocabulary."
            )
    if "multimodal_cfg" in config:
        raise WeightsError(f"{source} is CoCa (it has a multimodal decoder); this package runs CLIP's two towers.")
