"""Bundles as models of `clip_benchmark`: its own command line, with one model type more.

    python -m longclip_rt.evaluation.clip_benchmark eval --model_type longclip_rt --model BUNDLE --pretrained auto \
        --no_amp --dataset wds/my_data --dataset_root my_data --task zeroshot_retrieval --recall_k 1 5 10

`--model` is the bundle's folder, and `--pretrained` says what runs it, as `longclip-rt evaluate --compare` has it:
`auto`, or a backend, a precision or both with a comma between.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from longclip_rt.evaluation.models import ModelSpec, spec_from_text
from longclip_rt.model.preprocess import ImageTransform
from longclip_rt.model.tokenizer import Tokenizer, pad_tokens
from longclip_rt.runtime import Embedder
from longclip_rt.system.extras import require

MODEL_TYPE = "longclip_rt"


class BenchmarkModel:
    """What `clip_benchmark` calls: encoders that take and give torch tensors."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def eval(self) -> BenchmarkModel:
        """There is nothing to switch."""
        return self

    def encode_image(self, crops: Any) -> Any:
        """Crops uint8 [B, n, n, 3] to L2-normalised vectors float32 [B, D], both torch tensors."""
        import torch

        return torch.from_numpy(self._embedder.encode_crops(crops.cpu().numpy())).to(crops.device)

    def encode_text(self, ids: Any) -> Any:
        """Token ids int32 [B, S] to L2-normalised vectors float32 [B, D], both torch tensors."""
        import torch

        return torch.from_numpy(self._embedder.encode_tokens(ids.cpu().numpy())).to(ids.device)


class Crop:
    """A PIL image to its crop, a torch tensor uint8 [n, n, 3]; to be sent to other processes."""

    def __init__(self, transform: ImageTransform) -> None:
        self._transform = transform

    def __call__(self, image: Image.Image) -> Any:
        """The crop of an image."""
        import torch

        return torch.from_numpy(self._transform.crop(image))


class Ids:
    """Texts to token ids, a torch tensor int32 [B, S], cut to the context and padded to the longest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> Any:
        """The ids of texts."""
        import torch

        ids = [tokens.ids for tokens in self._tokenizer.encode(texts)]
        return torch.from_numpy(pad_tokens(ids, max(map(len, ids))))


def load_model(
    model_name: str, pretrained: str, cache_dir: str | None = None, device: str = "cpu"
) -> tuple[BenchmarkModel, Crop, Ids]:
    """Opens a bundle, as `clip_benchmark` asks for it.

    Args:
        model_name: The bundle's folder.
        pretrained: What runs it.
        cache_dir: Not used.
        device: Where clip_benchmark computes; the backend has its own.

    Raises:
        BundleError: There is no such bundle.
        BackendError: It cannot be run so here.
    """
    bundle = Path(model_name)
    spec = ModelSpec(bundle) if pretrained == "auto" else spec_from_text(pretrained, bundle)
    embedder = spec.open()
    return BenchmarkModel(embedder), Crop(embedder.transform), Ids(embedder.tokenizer)


def register() -> None:
    """Makes the model type known to `clip_benchmark`.

    Raises:
        MissingExtraError: It is not installed.
    """
    models = require("clip_benchmark.models", "evaluate")
    models.TYPE2FUNC[MODEL_TYPE] = load_model
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)


def main() -> None:
    """The command line of `clip_benchmark`, with the model type."""
    register()
    require("clip_benchmark.cli", "evaluate").main()


if __name__ == "__main__":
    main()
