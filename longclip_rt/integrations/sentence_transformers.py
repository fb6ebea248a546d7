"""A bundle as a module of sentence-transformers: texts and images to vectors, with its batches, prompts and saving.

Example:
    model = SentenceTransformer(modules=[LongClip("bundle")], device="cpu")
    model.encode(["a red circle", Image.open("photo.jpg")])
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip_rt.bundle.bundle import PCA
from longclip_rt.bundle.manifest import MANIFEST
from longclip_rt.errors import InputError
from longclip_rt.pca.basis import Pca, save_pca
from longclip_rt.runtime import Embedder
from longclip_rt.system.extras import require
from longclip_rt.system.files import output_errors

if TYPE_CHECKING:
    from longclip_rt.model.tokenizer import Tokenizer

    InputModule: Any
else:
    InputModule = require("sentence_transformers.base.modules", "sentence-transformers").InputModule

_BUNDLE = "bundle"


class LongClip(InputModule):  # type: ignore[misc]
    """Encodes texts of up to 248 tokens and images: PIL images, paths of images, uint8 arrays [H, W, 3].

    It holds no parameters of PyTorch's, so nothing of it can be trained. `device` of SentenceTransformer says only
    where the vectors are put; `backend` says what computes them.

    Args:
        bundle: As `Embedder.from_bundle` takes it, and so the others.
        backend: What runs the model.
        precision: Of the matrix products.
        pca: To reduce the vectors with.
        pca_mode: How.

    Raises:
        LongClipError: As `Embedder.from_bundle` does.
    """

    config_file_name = "longclip_config.json"
    config_keys: list[str] = ["backend", "precision", "pca_mode"]  # noqa: RUF012 - the base class declares it so

    def __init__(
        self,
        bundle: str | Path | None = None,
        backend: str = "auto",
        precision: str = "auto",
        pca: str | Path | Pca | None = None,
        pca_mode: str = "project",
    ) -> None:
        super().__init__()
        self.backend, self.precision, self.pca_mode = backend, precision, pca_mode
        self.embedder = Embedder.from_bundle(bundle, backend, precision, pca, pca_mode)

    @property
    def modalities(self) -> list[str]:
        """Texts and images; one batch holds one of them."""
        return ["text", "image"]

    @property
    def max_seq_length(self) -> int:
        """Most tokens of a text; what is longer is cut, with a warning in the log."""
        return self.embedder.context_length

    @property
    def tokenizer(self) -> Tokenizer:
        """Texts to token ids."""
        return self.embedder.tokenizer

    def get_embedding_dimension(self) -> int:
        """Length of a vector."""
        return self.embedder.dim

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Sorts a batch: texts, with the prompt in front of each, or images.

        Args:
            inputs: All texts or all images; also as `{"text": ...}` or `{"image": ...}`. The path or URL of an image is
                an image, as everywhere in sentence-transformers.
            prompt: Put in front of texts; images take none.
            kwargs: Other modules' options, not used.

        Raises:
            InputError: The batch is mixed, or holds what is neither.
        """
        infer = require("sentence_transformers.base.modality", "sentence-transformers").infer_batch_modality
        try:
            kind = infer(inputs, supported_modalities=self.modalities)
        except ValueError as error:
            raise InputError(f"An input is neither a text nor an image: {error}") from error
        if kind not in self.modalities:
            raise InputError(f"A batch must hold texts alone or images alone; got {kind}. Encode them apart.")
        unwrapped = [item[kind] if isinstance(item, dict) else item for item in inputs]
        if kind == "text":
            return {"texts": [(prompt or "") + _one_text(item) for item in unwrapped]}
        return {"images": [_image(item) for item in unwrapped]}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Embeds a batch.

        Args:
            features: What `preprocess` gave.
            kwargs: Other modules' options, not used.

        Returns:
            `sentence_embedding`, float32 [B, D], L2-normalised, on the CPU or the GPU of the `torch` backend.

        Raises:
            InputError: An image cannot be read.
        """
        if "texts" in features:
            return {"sentence_embedding": self.embedder.embed_texts(features["texts"], convert_to="torch")}
        return {"sentence_embedding": self.embedder.embed_images(features["images"], convert_to="torch")}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Copies the bundle, without engines, and any PCA into the model's folder, so that it can be moved.

        Raises:
            OutputError: The disk refuses.
        """
        target = Path(output_path) / _BUNDLE
        bundle = self.embedder.bundle
        with output_errors(target):
            target.mkdir(parents=True, exist_ok=True)
            for name in (*bundle.manifest["files"], MANIFEST):
                if not (target / name).exists() or not (target / name).samefile(bundle.file(name)):
                    shutil.copyfile(bundle.file(name), target / name)
        if self.embedder.pca is not None:
            save_pca(self.embedder.pca, Path(output_path) / PCA)
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> LongClip:
        """Opens what `save` wrote, in a folder or on the hub."""
        where = {key: kwargs[key] for key in ("token", "cache_folder", "revision", "local_files_only") if key in kwargs}
        config = cls.load_config(model_name_or_path, subfolder=subfolder, **where)
        folder = f"{subfolder}/{_BUNDLE}" if subfolder else _BUNDLE
        bundle = cls.load_dir_path(model_name_or_path, subfolder=folder, **where)
        pca = cls.load_file_path(model_name_or_path, PCA, subfolder=subfolder, **where)
        return cls(bundle, pca=pca, **config)

    def __reduce__(self) -> Any:
        """Opens the bundle anew in another process, for sentence-transformers' pools."""
        pca = self.embedder.pca
        return type(self), (str(self.embedder.bundle.path), self.backend, self.precision, pca, self.pca_mode)


def _one_text(item: Any) -> str:
    if not isinstance(item, str):
        raise InputError(f"A text is a str; got {type(item).__name__}. Pairs of texts have no vector of their own.")
    return item


def _image(item: Any) -> Any:
    if not hasattr(item, "__array_interface__") and not hasattr(item, "__array__"):
        return item
    from PIL import Image

    if isinstance(item, Image.Image):
        return item
    import numpy as np

    pixels = np.asarray(item)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise InputError(f"An image as an array is uint8 [H, W, 3]; got {pixels.dtype} {list(pixels.shape)}.")
    return Image.fromarray(pixels)
