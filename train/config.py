"""What a training run is told, and named presets of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from longclip_rt.errors import TrainingError
from longclip_rt.model.architecture import Architecture

Precision = Literal["auto", "fp32", "bf16", "fp16"]
ObjectiveName = Literal["longclip", "long+short", "long", "clip"]
Positions = Literal["kps", "interpolate", "none"]
PcmScope = Literal["local", "global"]
Frozen = Literal["none", "text"]

_CHOICES = {
    "objective": ObjectiveName,
    "positions": Positions,
    "precision": Precision,
    "pcm_scope": PcmScope,
    "frozen": Frozen,
}

SCRATCH = "scratch"
"""The value of `weights` that stands for random weights in the shape of `architecture`."""

LN_100 = math.log(100)

# The built-in model's vocabulary: the bytes, CLIP's first 7,678 merges, and the two special tokens.
TINY = Architecture(
    image_size=96,
    patch_size=16,
    vision_width=192,
    vision_layers=4,
    text_width=128,
    text_layers=4,
    embed_dim=128,
    vocab_size=8192,
    vision_head_width=32,
    text_head_width=32,
)


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults are the reference's (Long-CLIP's repository, train/train.py) but for its epochs.

    Attributes:
        data: The pairs; see `longclip_rt.train.data.training_data`.
        weights: What to begin with: anything `load_checkpoint` takes, or `scratch`.
        architecture: The shape of a model that begins with `scratch`.
        val: Pairs to validate on; None takes the first rows of `data`.
        images: Folder that image paths in `data` are relative to; None is the folder of `data`.
        image_column: Column of the image; None finds it. So for the captions.
        long_column: Column of the long caption.
        short_column: Column of the short caption; the first sentence of the long one where there is none.
        val_rows: First rows of `data` that validate where `val` names nothing; at most a tenth of them.
        max_bad: Largest share of an epoch's rows that may be unusable.
        objective: What is matched with what; see `longclip_rt.train.loss.Objective`.
        positions: How the text position table is lengthened; see `longclip_rt.train.model.Stretch`.
        frozen: `text` trains the image tower and the temperature alone. Words whose pictures a model cannot tell apart
            as yet would otherwise become one to it, and then nothing tells it to learn the difference.
        components: Principal components that PCM keeps.
        pcm_scope: Whether PCM runs on each process's rows (the reference) or on the global batch.
        label_smoothing: Share of each target that is spread over the batch.
        logit_scale: Logarithm of the inverse temperature to begin with; None keeps the weights'.
        max_logit_scale: Bound on it after each step; None, as in the reference, bounds nothing.
        batch_size: Pairs of one step, over all processes.
        chunk_size: Pairs whose activations a process holds at a time; None holds all of its share.
        epochs: Passes over the data. The paper trains for one.
        steps: Steps of the run, in place of `epochs`; None lets `epochs` say.
        lr: Largest learning rate.
        weight_decay: AdamW's, on every trained parameter.
        warmup_steps: Steps over which the learning rate rises to `lr`; it then falls along a cosine to 0.
        clip_grad_norm: Bound on the norm of all gradients together; None bounds nothing.
        precision: What the towers compute in; `auto` is fp16 on a GPU, and bf16 on a CPU that computes in it.
        gradient_checkpointing: Compute activations again instead of keeping them.
        compile: Whether to use `torch.compile`.
        seed: Of the order of the data and of weights that begin from scratch.
        workers: Processes that decode images; 0 decodes in the training process.
        validate_every: Steps between validations.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: Newest checkpoints that are kept.
    """

    data: str
    weights: str = "open_clip:ViT-B-16/openai"
    architecture: Architecture | None = None
    val: str | None = None
    images: str | None = None
    image_column: str | None = None
    long_column: str | None = None
    short_column: str | None = None
    val_rows: int = 1000
    max_bad: float = 0.05
    objective: ObjectiveName = "longclip"
    positions: Positions = "kps"
    frozen: Frozen = "none"
    components: int = 32
    pcm_scope: PcmScope = "local"
    label_smoothing: float = 0.1
    logit_scale: float | None = LN_100
    max_logit_scale: float | None = None
    batch_size: int = 2048
    chunk_size: int | None = None
    epochs: int = 1
    steps: int | None = None
    lr: float = 1e-6
    weight_decay: float = 1e-2
    warmup_steps: int = 200
    clip_grad_norm: float | None = None
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    workers: int = 4
    validate_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "validate_every", "checkpoint_every", "keep_checkpoints", "components"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("chunk_size", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}; it must be at least 1, or left out.")
        if not self.lr > 0 or self.warmup_steps < 0 or self.weight_decay < 0 or self.workers < 0:
            raise TrainingError("lr must be above 0, and warmup_steps, weight_decay and workers not below 0.")
        if not 0 <= self.label_smoothing < 1:
            raise TrainingError(f"label_smoothing is {self.label_smoothing}; it is a share, from 0 to below 1.")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise TrainingError(f"clip_grad_norm is {self.clip_grad_norm}; it must be above 0, or left out.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise TrainingError(
                    f"There is no {name} {getattr(self, name)!r}; choose {', '.join(get_args(choices))}."
                )
        if not self.weights:
            raise TrainingError(
                "This preset begins with weights of your own: name them, as in --weights run/model.safetensors."
            )
        if self.weights == SCRATCH and self.architecture is None:
            raise TrainingError("Weights from scratch need an architecture: choose --preset tiny, or name weights.")

    def lr_at(self, step: int, total: int) -> float:
        """The learning rate of a step: linear warm-up, then a cosine to 0, as in the reference.

        Args:
            step: Counted from 0.
            total: Steps of the run; a warm-up that is longer takes all of them.
        """
        warmup = min(self.warmup_steps, total)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainConfig:
        """Builds a configuration of `to_dict`'s values; fields of a newer version are ignored."""
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: value for name, value in fields.items() if name in names}
        if known.get("architecture") is not None:
            known["architecture"] = Architecture.from_dict(known["architecture"])
        return cls(**known)


PRESETS: dict[str, dict[str, Any]] = {
    "longclip-b": {"weights": "open_clip:ViT-B-16/openai"},
    "longclip-l": {"weights": "open_clip:ViT-L-14/openai"},
    "tiny": {
        "weights": SCRATCH,
        "architecture": TINY,
        "objective": "clip",
        "positions": "none",
        "label_smoothing": 0.0,
        "logit_scale": math.log(1 / 0.07),  # CLIP's own start
        "max_logit_scale": LN_100,
        "batch_size": 128,
        "lr": 1e-3,
        "weight_decay": 0.05,
        "warmup_steps": 200,
        "clip_grad_norm": 1.0,
        "precision": "fp32",  # as fast as bf16 on a CPU at these widths, and the same on every machine
        "workers": 1,
    },
    "tiny-long": {
        "weights": "",  # of the first phase; to be named
        "logit_scale": None,
        "max_logit_scale": LN_100,
        "batch_size": 128,
        "lr": 5e-4,
        "weight_decay": 0.05,
        "warmup_steps": 50,
        "clip_grad_norm": 1.0,
        "precision": "fp32",
        "workers": 1,
    },
}
"""Name -> what differs from the defaults: the paper's two models, and the built-in one's two phases."""


def preset_config(preset: str, data: str, **changes: Any) -> TrainConfig:
    """A preset with changes.

    Args:
        preset: One of `PRESETS`.
        data: The pairs.
        changes: Fields of `TrainConfig`; None leaves the preset's value.

    Raises:
        TrainingError: There is no such preset, or a value is out of its bounds.
    """
    if preset not in PRESETS:
        raise TrainingError(f"There is no preset {preset!r}; choose {', '.join(PRESETS)}.")
    chosen = {name: value for name, value in changes.items() if value is not None}
    return TrainConfig(data=data, **(PRESETS[preset] | chosen))
