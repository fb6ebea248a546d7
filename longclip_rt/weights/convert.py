"""A checkpoint to files that other libraries load: Long-CLIP's own, Hugging Face transformers, open_clip."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longclip_rt.errors import OutputError
from longclip_rt.model.architecture import VOCAB_SIZE, Architecture
from longclip_rt.model.tokenizer import END, START
from longclip_rt.system.extras import require
from longclip_rt.system.files import directory_in_the_making, output_errors
from longclip_rt.weights.checkpoint import Checkpoint
from longclip_rt.weights.naming import SECOND_TABLE, huggingface_names

if TYPE_CHECKING:
    from torch import Tensor

Format = Literal["longclip", "huggingface", "open_clip"]

START_NAME, END_NAME = "<|startoftext|>", "<|endoftext|>"


def save_converted(checkpoint: Checkpoint, target: Path, format: Format) -> Path:
    """Writes weights as float32 safetensors in a library's own layout; whole, or not at all.

    The header of the safetensors file tells `load_checkpoint` what tensors do not say, such as the activation.

    Args:
        checkpoint: What `load_checkpoint` returned.
        target: What to make. For `longclip`, a file named *.safetensors with OpenAI's names and both position tables
            (equal, so that folding gives the same table back). For `huggingface`, a folder for
            `transformers.CLIPModel.from_pretrained`, with tokenizer and image processor. For `open_clip`, a folder for
            `open_clip.create_model("local-dir:...")`; only of models with CLIP's whole vocabulary, the one that
            open_clip's tokenizer (like Long-CLIP's) knows.
        format: One of the three.

    Returns:
        `target`.

    Raises:
        OutputError: `target` exists, is misnamed, cannot be written, or is for open_clip, which cannot use the model.
        MissingExtraError: torch, safetensors or (for `huggingface`) open_clip is not installed.
    """
    writers: dict[str, Callable[[Checkpoint, Path], None]] = {
        "longclip": _write_longclip,
        "huggingface": _write_huggingface,
        "open_clip": _write_open_clip,
    }
    if format not in writers:
        raise OutputError(f"There is no format {format!r}; known are {', '.join(writers)}.")
    if format == "longclip" and target.suffix != ".safetensors":
        raise OutputError(f"Long-CLIP weights are one file, named *.safetensors; got the name {target}.")
    if format == "open_clip" and checkpoint.architecture.vocab_size != VOCAB_SIZE:
        raise OutputError(
            f"{checkpoint.source} has {checkpoint.architecture.vocab_size} entries of CLIP's vocabulary, and "
            f"open_clip's tokenizer gives ids out of all {VOCAB_SIZE}. Convert it to huggingface, which takes its "
            "tokenizer along."
        )
    if target.exists() or target.is_symlink():
        raise OutputError(f"{target} exists already. Choose another name, or remove it first.")
    if format == "longclip":
        _write_longclip(checkpoint, target)
    else:
        with directory_in_the_making(target) as folder:
            writers[format](checkpoint, folder)
    return target


def _write_longclip(checkpoint: Checkpoint, target: Path) -> None:
    table = checkpoint.state_dict["positional_embedding"]
    write_weights(checkpoint, checkpoint.state_dict | {SECOND_TABLE: table.clone()}, target)


def write_weights(checkpoint: Checkpoint, tensors: dict[str, Tensor], target: Path) -> None:
    """Writes tensors as one safetensors file, whole or not at all, replacing one that is there.

    Args:
        checkpoint: What the tensors do not say about the model; its own weights are not looked at.
        tensors: Names (Long-CLIP's) to tensors on the CPU.
        target: The file.

    Raises:
        OutputError: The disk refuses.
        MissingExtraError: safetensors is not installed.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_tensors(checkpoint, tensors, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def _write_huggingface(checkpoint: Checkpoint, folder: Path) -> None:
    from longclip_rt.model.vocabulary import tokenizer_json

    architecture = checkpoint.architecture
    _write_tensors(checkpoint, huggingface_names(checkpoint.state_dict), folder / "model.safetensors")
    _write_json(folder / "config.json", huggingface_config(architecture))
    size = architecture.image_size
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": 3,  # bicubic, in Pillow's numbering
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(checkpoint.image_mean),
            "image_std": list(checkpoint.image_std),
            "do_convert_rgb": True,
        },
    )
    description = tokenizer_json(architecture.context_length, architecture.vocab_size)
    _write_text(folder / "tokenizer.json", with_openai_names(description))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": architecture.context_length,
            "bos_token": START_NAME,
            "eos_token": END_NAME,
            "unk_token": END_NAME,
            # As in every CLIP on the hub; the reference pads with 0. What follows the first EOT reaches no embedding.
            "pad_token": END_NAME,
        },
    )


def with_openai_names(description: str) -> str:
    """A tokenizer.json whose two special tokens are called as in OpenAI's vocabulary, of which transformers knows."""
    # The names stand in quotes wherever they are tokens; the pattern that splits text holds them without.
    for ours, theirs in ((START, START_NAME), (END, END_NAME)):
        description = description.replace(json.dumps(ours), json.dumps(theirs))
    return description


def huggingface_config(architecture: Architecture) -> dict[str, Any]:
    """The content of a config.json of which transformers builds a `CLIPModel` of this architecture."""
    activation = "quick_gelu" if architecture.quick_gelu else "gelu"
    shared = {"hidden_act": activation, "layer_norm_eps": 1e-5, "projection_dim": architecture.embed_dim}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": architecture.embed_dim,
        "text_config": shared
        | {
            "model_type": "clip_text_model",
            "vocab_size": architecture.vocab_size,
            "hidden_size": architecture.text_width,
            "intermediate_size": architecture.text_mlp_width,
            "num_hidden_layers": architecture.text_layers,
            "num_attention_heads": architecture.text_heads,
            "max_position_embeddings": architecture.context_length,
            "bos_token_id": architecture.sot_id,
            "eos_token_id": architecture.eot_id,
            "pad_token_id": architecture.eot_id,
        },
        "vision_config": shared
        | {
            "model_type": "clip_vision_model",
            "hidden_size": architecture.vision_width,
            "intermediate_size": architecture.vision_mlp_width,
            "num_hidden_layers": architecture.vision_layers,
            "num_attention_heads": architecture.vision_heads,
            "image_size": architecture.image_size,
            "patch_size": architecture.patch_size,
            "num_channels": 3,
        },
    }


def _write_open_clip(checkpoint: Checkpoint, folder: Path) -> None:
    architecture = checkpoint.architecture
    _write_tensors(checkpoint, checkpoint.state_dict, folder / "open_clip_model.safetensors")
    vision: dict[str, Any] = {
        "image_size": architecture.image_size,
        "layers": architecture.vision_layers,
        "width": architecture.vision_width,
        "head_width": architecture.vision_head_width,
        "patch_size": architecture.patch_size,
        "mlp_ratio": _ratio(architecture.vision_mlp_width, architecture.vision_width),
    }
    text: dict[str, Any] = {
        "context_length": architecture.context_length,
        "vocab_size": architecture.vocab_size,
        "width": architecture.text_width,
        "heads": architecture.text_heads,
        "layers": architecture.text_layers,
        "mlp_ratio": _ratio(architecture.text_mlp_width, architecture.text_width),
    }
    _write_json(
        folder / "open_clip_config.json",
        {
            "model_cfg": {
                "embed_dim": architecture.embed_dim,
                "quick_gelu": architecture.quick_gelu,
                "vision_cfg": vision,
                "text_cfg": text,
            },
            "preprocess_cfg": {
                "mean": list(checkpoint.image_mean),
                "std": list(checkpoint.image_std),
                "interpolation": "bicubic",
                "resize_mode": "shortest",
            },
        },
    )


def _ratio(mlp_width: int, width: int) -> float:
    """The ratio of which open_clip's int(width * ratio) gives the MLP's width."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else (mlp_width + 0.5) / width


def _write_tensors(checkpoint: Checkpoint, tensors: dict[str, Tensor], path: Path) -> None:
    safetensors = require("safetensors", "export")
    metadata = {"format": "pt"} | checkpoint.config.to_metadata()
    path.touch()
    mode = path.stat().st_mode  # what the user's umask gives; save_file makes files that only their owner may read
    try:
        require("safetensors.torch", "export").save_file(tensors, path, metadata=metadata)
    except safetensors.SafetensorError as error:
        raise OutputError(
            f"Cannot write {path.name}: {error}. Make room, or choose another place with --out."
        ) from error
    path.chmod(mode)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
