"""`Embedder`: a bundle and a backend, from texts and images to vectors."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from longclip_rt.backends.arrays import Arrays, Tensors
from longclip_rt.backends.base import Backend, Float32
from longclip_rt.backends.batching import plan_batches
from longclip_rt.bundle.bundle import Bundle, default_bundle, load_bundle
from longclip_rt.errors import InputError, PcaError
from longclip_rt.model.tokenizer import pad_tokens
from longclip_rt.opening import open_backend
from longclip_rt.pca.basis import Pca, check_mode, load_pca

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from longclip_rt.model.preprocess import ImageTransform
    from longclip_rt.model.tokenizer import Tokenizer

logger = logging.getLogger("longclip_rt")

_HOST = 1  # DLPack's number of host memory


class Embedder:
    """Embeds texts of up to 248 tokens and images into one space. Safe to use from several threads.

    Attributes:
        bundle: The model.
        backend: What runs it.
        pca: What reduces the embeddings; None leaves them as they are.
        pca_mode: `project` to K numbers, or `reconstruct` in D numbers.
    """

    def __init__(self, bundle: Bundle, backend: Backend, pca: Pca | None = None, pca_mode: str = "project") -> None:
        check_mode(pca_mode)
        if pca is not None:
            pca.check_model(bundle.name, bundle.architecture.embed_dim, bundle.weights_sha256)
        self.bundle = bundle
        self.backend = backend
        self.pca = pca
        self.pca_mode = pca_mode
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        # The kernel gives float32 vectors of the same PCA, within the backend's own error.
        self._fused = pca is not None and pca_mode == "project" and backend.fused_pca == pca.sha256

    @classmethod
    def from_bundle(
        cls,
        path: str | Path | None = None,
        backend: str = "auto",
        precision: str = "auto",
        pca: str | Path | Pca | None = None,
        pca_mode: str = "project",
        devices: Sequence[int] | None = None,
    ) -> Embedder:
        """Opens a bundle.

        Args:
            path: Its directory; None takes the newest exported bundle, else the built-in model, and logs which.
            backend: `auto`, or one of `longclip_rt.choices.BACKENDS`.
            precision: `auto`, `fp32`, `bf16` or `fp16`.
            pca: A PCA or its file, to reduce the embeddings with; `bundle` takes the one that the bundle carries.
            pca_mode: `project` or `reconstruct`, as in `Pca.apply`.
            devices: Numbers of the GPUs to run on, all at once; None: the first one, or the CPU.

        Raises:
            BundleError: There is no bundle, or it is damaged.
            PcaError: The PCA cannot be read, is another model's, or is not in the bundle.
            BackendError: The backend or precision cannot be had here; what is named is never replaced by another.
        """
        bundle = default_bundle() if path is None else load_bundle(path)
        if path is None:
            logger.info("bundle: %s (%s), the newest there is; name another with --bundle", bundle.path, bundle.name)
        if not bundle.trained:
            logger.warning("%s holds UNTRAINED, random weights: its vectors carry no meaning", bundle.path)
        loaded = _pca_from(pca, bundle)
        if loaded is not None:  # before a model is compiled
            loaded.check_model(bundle.name, bundle.architecture.embed_dim, bundle.weights_sha256)
        return cls(bundle, open_backend(bundle, backend, precision, devices), loaded, pca_mode)

    @classmethod
    def connect(
        cls,
        url: str,
        api_key: str = "",
        pca: str | Path | Pca | None = None,
        pca_mode: str = "project",
        patience: float = 300.0,
    ) -> Embedder:
        """Takes the encoders of a `longclip-rt serve` for its own; texts and images are prepared here.

        A request that the server has no room for, or that does not reach it, is sent again after a growing pause.

        Args:
            url: The server's address, such as `http://127.0.0.1:8000`.
            api_key: The server's key; empty: it asks for none.
            pca: As for `from_bundle`, but for `bundle`: a PCA or its file.
            pca_mode: As for `from_bundle`.
            patience: Seconds after which a request is given up.

        Raises:
            BackendError: There is no such server, it refuses, or it does not answer for that long.
            BundleError: What it sends is no bundle.
            PcaError: As for `from_bundle`.
        """
        from longclip_rt.backends.remote import Connection, RemoteBackend, remote_bundle

        connection = Connection(url, api_key, patience)
        try:
            bundle, model = remote_bundle(connection)
            if pca is not None and str(pca) == "bundle":
                raise PcaError("A server keeps its bundle's PCA to itself. Give the file of the PCA.")
            logger.info("server: %s (%s with %s)", connection.url, bundle.name, model["backend"])
            return cls(bundle, RemoteBackend(connection, bundle, model), _pca_from(pca, bundle), pca_mode)
        except BaseException:
            connection.close()
            raise

    def with_pca(self, pca: str | Path | Pca | None, pca_mode: str = "project") -> Embedder:
        """An embedder on the same backend whose embeddings are reduced with another PCA, or with none.

        Args:
            pca: As in `from_bundle`.
            pca_mode: Likewise.

        Raises:
            PcaError: The PCA cannot be read or is another model's, or the mode is unknown.
        """
        return type(self)(self.bundle, self.backend, _pca_from(pca, self.bundle), pca_mode)

    @property
    def tokenizer(self) -> Tokenizer:
        """Texts to token ids; loaded when first needed, since it takes longer than decoding a photograph."""
        return self.bundle.tokenizer

    @property
    def transform(self) -> ImageTransform:
        """Images to pixels."""
        return self.bundle.transform

    @property
    def dim(self) -> int:
        """Length of a vector: D, the model's own, or K with a PCA in the mode `project`."""
        return self.bundle.architecture.embed_dim if self.pca is None else self.pca.length(self.pca_mode)

    @property
    def context_length(self) -> int:
        """Most tokens of a text, SOT and EOT included."""
        return self.bundle.architecture.context_length

    @property
    def image_size(self) -> int:
        """Height and width of an encoder's image in pixels."""
        return self.bundle.architecture.image_size

    @property
    def concurrency(self) -> int:
        """How many `encode_*` calls at a time make best use of the machine."""
        return self.backend.concurrency

    @property
    def batch_size(self) -> int:
        """Images in a batch, a good default for the backend."""
        return self.backend.batch_size

    @property
    def pad_multiple(self) -> int:
        """Text batches are padded to a multiple of this many tokens."""
        return self.backend.pad_multiple

    @property
    def buckets(self) -> tuple[int, ...]:
        """The lengths that text batches are padded to; empty where `pad_multiple` says it."""
        return self.backend.buckets

    def encode_tokens(self, ids: Any) -> Any:
        """Encodes one batch of padded token ids [B, S] int32 to L2-normalised vectors [B, D] float32.

        What lies on a GPU and comes through DLPack (PyTorch, CuPy) stays there: see `Backend.run_on_device`.

        Raises:
            BackendError: They are no such array, or ids are not of the model's vocabulary.
        """
        return self._encoded("text", ids)

    def encode_crops(self, crops: Any) -> Any:
        """Encodes one batch of cropped images [B, n, n, 3] uint8 RGB, likewise.

        Raises:
            InputError: They are no such array.
            BackendError: n is not `image_size`.
        """
        return self._encoded("image", crops)

    def _encoded(self, kind: str, given: Any) -> Any:
        outputs = [f"{kind}_pca"] if self._fused else None
        if not isinstance(given, np.ndarray) and hasattr(given, "__dlpack_device__"):
            if int(given.__dlpack_device__()[0]) != _HOST:
                if self.pca is not None and not self._fused:
                    raise InputError("This PCA is computed in host memory; take tensors to it with .cpu().numpy().")
                return self.backend.run_on_device(kind, given, outputs)[0]
            given = np.from_dlpack(given)
        inputs = given if kind == "text" else self.backend.images(given)
        vectors = self.backend.run(kind, inputs, outputs)[0]
        return vectors if self.pca is None or self._fused else self.pca.apply(vectors, kind, self.pca_mode)

    @overload
    def embed_texts(
        self, texts: Sequence[str], *, truncate: bool = ..., convert_to: Literal["numpy"] = ...
    ) -> Float32: ...

    @overload
    def embed_texts(self, texts: Sequence[str], *, truncate: bool = ..., convert_to: Literal["torch"]) -> Tensor: ...

    def embed_texts(
        self, texts: Sequence[str], *, truncate: bool = True, convert_to: Literal["numpy", "torch"] = "numpy"
    ) -> Any:
        """Embeds texts.

        Args:
            texts: Any number of texts.
            truncate: Whether a text of more than `context_length` tokens is cut (and counted in a warning) or refused.
            convert_to: `numpy`, or `torch` for a tensor: on the GPU where the `torch` backend runs on one, else on the
                CPU. It carries no gradient.

        Returns:
            L2-normalised vectors [N, D] float32, in the order of the texts.

        Raises:
            InputError: A text is too long and `truncate` is False, or holds what is no Unicode text.
            MissingExtraError: `convert_to` is `torch`, which is not installed.
        """
        collect = self._collector(convert_to)
        given = _listed("embed_texts", "text", texts, str)
        for index, text in enumerate(given):
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise InputError(f"Text {index} is not valid Unicode: {error.reason}. Mend the text.") from error
        encoded = self.tokenizer.encode(given)
        if too_long := [index for index, tokens in enumerate(encoded) if tokens.truncated]:
            if not truncate:
                raise InputError(
                    f"Text {too_long[0]} has {encoded[too_long[0]].length} tokens, and the model reads "
                    f"{self.context_length}. Shorten it, or pass truncate=True."
                )
            logger.warning("%d of %d texts were cut to %d tokens", len(too_long), len(encoded), self.context_length)
        batches = plan_batches(
            [len(tokens.ids) for tokens in encoded],
            pad_multiple=self.pad_multiple,
            token_budget=self.batch_size * self.context_length,
            max_batch=128,
            max_length=self.context_length,
            buckets=self.buckets,
        )
        padded = (
            collect.given(pad_tokens([encoded[index].ids for index in batch.indices], batch.length))
            for batch in batches
        )
        vectors = collect.empty(len(encoded), self.dim)
        for batch, result in zip(batches, self._threads().map(self.encode_tokens, padded), strict=True):
            vectors[list(batch.indices)] = collect.taken(result)
        return vectors

    @overload
    def embed_images(
        self, images: Iterable[str | Path | bytes | Image.Image], *, convert_to: Literal["numpy"] = ...
    ) -> Float32: ...

    @overload
    def embed_images(
        self, images: Iterable[str | Path | bytes | Image.Image], *, convert_to: Literal["torch"]
    ) -> Tensor: ...

    def embed_images(
        self,
        images: Iterable[str | Path | bytes | Image.Image],
        *,
        convert_to: Literal["numpy", "torch"] = "numpy",
    ) -> Any:
        """Embeds images.

        Args:
            images: Paths, encoded files' bytes, or PIL images, in any mix.
            convert_to: As for `embed_texts`.

        Returns:
            L2-normalised vectors [N, D] float32, in the order of the images.

        Raises:
            InputError: An image cannot be read; the message names it. Use `longclip-rt embed` for lists that may hold
                such images: it sets them aside and goes on.
        """
        from PIL import Image

        collect = self._collector(convert_to)
        sources = _listed("embed_images", "image", images, (str, Path, bytes, Image.Image))
        starts = range(0, len(sources), self.batch_size)

        def embed(start: int) -> Any:
            group = sources[start : start + self.batch_size]
            return self.encode_crops(collect.given(np.stack([self.transform.crop(source) for source in group])))

        vectors = collect.empty(len(sources), self.dim)
        for start, result in zip(starts, self._threads().map(embed, starts), strict=True):
            vectors[start : start + len(result)] = collect.taken(result)
        return vectors

    def _collector(self, convert_to: str) -> Arrays:
        if convert_to not in ("numpy", "torch"):
            raise InputError(f"convert_to is {convert_to!r}; expected 'numpy' or 'torch'.")
        if convert_to == "numpy":
            return Arrays()
        # A PCA that no kernel computes is computed in host memory.
        return Tensors(self.backend.tensors_on if self.pca is None or self._fused else "")

    def _threads(self) -> ThreadPoolExecutor:
        """The threads of `embed_*`, made at its first call: as many as make best use of the backend, and one more.

        Each prepares its own next batch while the others encode, so that only a few batches are held at a time.
        """
        self.backend.check_process()  # a fork has the pool without its threads
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.concurrency + 1, "longclip-embed")
            return self._pool

    def describe(self) -> dict[str, str]:
        """What made the vectors, for the metadata of an output: bundle, model, backend, precision, any PCA."""
        return {
            "bundle": self.bundle.sha256,
            "model": self.bundle.name,
            "weights": self.bundle.weights_sha256,
            "trained": "true" if self.bundle.trained else "false",
            "backend": self.backend.name,
            "backend_version": self.backend.version,
            "precision": self.backend.precision,
            "device": self.backend.device,
            **({} if self.pca is None else self.pca.describe(self.pca_mode)),
        }

    def close(self) -> None:
        """Lets go of the encoders' memory and of the threads. Closing twice is fine."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        self.backend.close()

    def __enter__(self) -> Embedder:
        """Returns the embedder itself; leaving the block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _listed(method: str, what: str, given: Any, single: type | tuple[type, ...]) -> list[Any]:
    """The items of an argument, which must be several.

    Raises:
        InputError: It is a single item, or nothing that can be listed.
    """
    if isinstance(given, single):
        raise InputError(f"{method} takes a list of {what}s; got one {what}. Write [{what}].")
    try:
        return list(given)
    except TypeError as error:
        raise InputError(f"{method} takes a list of {what}s; got {type(given).__name__}.") from error


def _pca_from(pca: str | Path | Pca | None, bundle: Bundle) -> Pca | None:
    if pca is None or isinstance(pca, Pca):
        return pca
    if not isinstance(pca, (str, Path)):
        raise PcaError(f"A PCA is given as a Pca, its file's name, or 'bundle'; got {type(pca).__name__}.")
    if str(pca) != "bundle":
        return load_pca(pca)
    if bundle.pca is None:
        raise PcaError(
            f"The bundle {bundle.path} carries no PCA. Give the file of one, or export again with --pca FILE."
        )
    return bundle.pca
