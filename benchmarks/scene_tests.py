"""What is asked of a model on held-out procedural scenes: retrieval, zero-shot classification, and details of twins."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longclip_rt.metrics import pair_accuracy, retrieval, zero_shot_accuracy
from longclip_rt.model.preprocess import ImageTransform
from longclip_rt.model.tokenizer import Tokenizer, pad_tokens
from longclip_rt.model.vocabulary import tokenizer_json
from longclip_rt.runtime import Embedder
from longclip_rt.train.scenes import (
    COLOURS,
    KINDS,
    Scene,
    Twin,
    class_prompt,
    detail_position,
    long_caption,
    main_kind,
    render,
    scene,
    short_caption,
    twin,
)
from longclip_rt.train.scenes.words import with_article
from longclip_rt.train.scenes.world import LIMIT
from longclip_rt.weights.checkpoint import load_checkpoint, towers_from_checkpoint

# A seed of scenes that no run trains on; the trainer's own validation rows lie elsewhere too.
HELD_OUT = 1 << 30
SCENES = 1000
LATE = 200  # tokens; scenes of the usual four to seven things have no details so late
BIN = 20  # tokens of a caption in which the position of a detail is counted together


class Encoders(Protocol):
    """A model, by what it makes of texts and scenes."""

    def texts(self, texts: list[str]) -> Tensor:
        """Embeddings [N, D] float32; what is longer than the context is cut."""
        ...

    def images(self, scenes: Sequence[Scene]) -> Tensor:
        """Embeddings [N, D] float32 of pictures of scenes."""
        ...

    def ids(self, text: str) -> NDArray[np.int32]:
        """A text's token ids, uncut."""
        ...


class BundleEncoders:
    """An exported bundle, run as a user runs it."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._whole = Tokenizer.from_file(embedder.bundle.file("tokenizer.json"), 1000)

    def texts(self, texts: list[str]) -> Tensor:
        """See `Encoders`."""
        return torch.from_numpy(self._embedder.embed_texts(texts))

    def images(self, scenes: Sequence[Scene]) -> Tensor:
        """See `Encoders`."""
        size = self._embedder.image_size
        return torch.from_numpy(self._embedder.embed_images([render(one, size) for one in scenes]))

    def ids(self, text: str) -> NDArray[np.int32]:
        """See `Encoders`."""
        return self._whole.encode([text])[0].ids


class TowerEncoders:
    """The towers of trained weights, and their tokenizer. CLIP's 77 positions stay 77: it reads no further."""

    def __init__(self, weights: Path, batch_size: int = 64) -> None:
        from safetensors import safe_open

        with safe_open(weights, "pt") as file:
            length = file.get_slice("positional_embedding").get_shape()[0]
        checkpoint = load_checkpoint(weights, context_length=length)
        architecture = checkpoint.architecture
        self._text, self._image = towers_from_checkpoint(checkpoint)
        self._transform = ImageTransform(architecture.image_size, checkpoint.image_mean, checkpoint.image_std)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tokenizer.json"
            file.write_text(tokenizer_json(length, architecture.vocab_size), encoding="utf-8")
            self._tokenizer = Tokenizer.from_file(file, length)
            self._whole = Tokenizer.from_file(file, 1000)
        self._batch_size = batch_size

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Tensor:
        """See `Encoders`."""
        ids = [tokens.ids for tokens in self._tokenizer.encode(texts)]
        order = np.argsort([len(one) for one in ids], kind="stable")
        out = torch.empty(len(ids), self._text.architecture.embed_dim)
        for start in range(0, len(ids), self._batch_size):
            rows = order[start : start + self._batch_size]
            some = [ids[row] for row in rows]
            (out[torch.from_numpy(rows)],) = self._text(torch.from_numpy(pad_tokens(some, max(map(len, some)))))
        return out

    @torch.inference_mode()
    def images(self, scenes: Sequence[Scene]) -> Tensor:
        """See `Encoders`."""
        parts = []
        for start in range(0, len(scenes), self._batch_size):
            some = scenes[start : start + self._batch_size]
            pixels = np.stack([self._transform(render(one, self._transform.size)) for one in some])
            parts.append(self._image(torch.from_numpy(pixels))[0])
        return torch.cat(parts)

    def ids(self, text: str) -> NDArray[np.int32]:
        """See `Encoders`."""
        return self._whole.encode([text])[0].ids


def measure(encoders: Encoders, count: int = SCENES) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Everything that is asked of a model.

    Args:
        encoders: The model.
        count: Held-out scenes.

    Returns:
        Fractions by name; and for each bin of token positions where a detail stands its accuracy and number of tests.
    """
    scenes = [scene(HELD_OUT, index) for index in range(count)]
    image = encoders.images(scenes)
    long = encoders.texts([long_caption(one) for one in scenes])
    figures = {f"long_{name}": value for name, value in retrieval(image, long, k=(1,)).items()}
    short = encoders.texts([short_caption(one) for one in scenes])
    figures |= {f"short_{name}": value for name, value in retrieval(image, short, k=(1,)).items()}
    labels = [KINDS.index(main_kind(one)) for one in scenes]
    figures["zero_shot"] = zero_shot_accuracy(image, encoders.texts([class_prompt(kind) for kind in KINDS]), labels)
    # Kinds are shapes, the hardest thing to learn in this world; so the main thing's colour is asked for too, with
    # prompts averaged over the kinds.
    colours = list(COLOURS)
    labels = [colours.index(one.things[0].colour) for one in scenes]
    prompts = encoders.texts([f"a photo of {with_article(f'{colour} {kind}')}" for colour in colours for kind in KINDS])
    averaged = prompts.reshape(len(colours), len(KINDS), -1).mean(dim=1)
    figures["zero_shot_colour"] = zero_shot_accuracy(image, averaged, labels)

    # Colour and texture in turn: every thing has such a twin.
    told = [
        (one, twin(one, row, which=which, detail=("colour", "texture")[(row + which) % 2]))
        for row, one in enumerate(scenes)
        for which in range(len(one.things))
    ]
    correct = told_apart(encoders, told)
    figures["detail"] = float(correct.mean())
    # Of the last thing: no sentence names its kind a second time.
    kinds = [(one, twin(one, row, which=len(one.things) - 1, detail="kind")) for row, one in enumerate(scenes)]
    figures["detail_kind"] = float(told_apart(encoders, kinds).mean())

    # Only the last of nine things stand beyond token 200, and not in every caption.
    full = ((row, scene(HELD_OUT, row, (LIMIT, LIMIT))) for row in range(4 * count))
    late = [(one, twin(one, row, which=LIMIT - 1, detail=("colour", "texture")[row % 2])) for row, one in full]
    late = [pair for pair in late if _position(encoders, pair) >= LATE]
    told, correct = told + late, np.concatenate([correct, told_apart(encoders, late)]) if late else correct
    bins = np.array([_position(encoders, pair) for pair in told]) // BIN
    curve = [
        {"position": float(b * BIN), "accuracy": float(correct[bins == b].mean()), "tests": float((bins == b).sum())}
        for b in np.unique(bins)
    ]
    return figures, curve


def told_apart(encoders: Encoders, pairs: Sequence[tuple[Scene, Twin]]) -> NDArray[np.float64]:
    """For each scene and its twin the share of the two captions and two pictures that find their own, [N] float64."""
    scenes, twins = zip(*pairs, strict=True)
    right = pair_accuracy(
        encoders.images(scenes),
        encoders.images([other.scene for other in twins]),
        encoders.texts([long_caption(one) for one in scenes]),
        encoders.texts([other.caption for other in twins]),
    )
    return (right.t2i + right.i2t) / 2


def _position(encoders: Encoders, pair: tuple[Scene, Twin]) -> int:
    """The token that tells a scene's caption from its twin's."""
    return detail_position(long_caption(pair[0]), pair[1].caption, lambda text: encoders.ids(text).tolist())
