"""A bundle as an embedding function of LanceDB: importing this module makes `longclip-rt` known to its registry.

function = get_registry().get("longclip-rt").create(bundle="bundle", source="image")
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from longclip_rt.errors import InputError
from longclip_rt.runtime import Embedder
from longclip_rt.system.extras import require

logger = logging.getLogger("longclip_rt")

if TYPE_CHECKING:
    EmbeddingFunction: Any
    register: Any
else:
    EmbeddingFunction = require("lancedb.embeddings", "lance").EmbeddingFunction
    register = require("lancedb.embeddings", "lance").register


@functools.lru_cache(maxsize=2)
def _embedder(bundle: str | None, backend: str, precision: str) -> Embedder:
    return Embedder.from_bundle(bundle, backend, precision)


@register("longclip-rt")
class LongClipFunction(EmbeddingFunction):  # type: ignore[misc]
    """Embeds a source column of texts or of images, and queries of both kinds.

    A table keeps these fields in its metadata, and not the model: `bundle` must be there when it is opened.

    Attributes:
        bundle: Its folder; None: as `Embedder.from_bundle` takes it.
        backend: What runs it.
        precision: Of the matrix products.
        source: What the source column holds: `text`, or `image` for paths and encoded files' bytes.
        max_retries: How often LanceDB asks again after an error; what fails here fails each time.
    """

    bundle: str | None = None
    backend: str = "auto"
    precision: str = "auto"
    source: Literal["text", "image"] = "text"
    max_retries: int = 0

    def _open(self) -> Embedder:
        return _embedder(self.bundle, self.backend, self.precision)

    def ndims(self) -> int:
        """Length of a vector."""
        return self._open().dim

    def compute_query_embeddings(self, query: Any, *args: Any, **kwargs: Any) -> list[NDArray[np.float32]]:
        """The vector [D] of a query: a text, or an image (PIL, or an encoded file's bytes).

        Raises:
            InputError: It cannot be embedded.
        """
        embedder = self._open()
        return list(embedder.embed_texts([query]) if isinstance(query, str) else embedder.embed_images([query]))

    def compute_source_embeddings(self, inputs: Any, *args: Any, **kwargs: Any) -> list[NDArray[np.float32] | None]:
        """The vectors [D] of a column's values: None, with a warning in the log, for an image that cannot be read.

        LanceDB refuses a row without vector, or drops it where the table was told `on_bad_vectors="drop"`.
        """
        values: Iterable[Any] = inputs.to_pylist() if hasattr(inputs, "to_pylist") else inputs
        items: list[Any] = [values] if isinstance(values, str | bytes) else list(values)
        embedder = self._open()
        if self.source == "text":
            return list(embedder.embed_texts(items))
        try:
            return list(embedder.embed_images(items))
        except InputError:
            return [_one_image(embedder, item) for item in items]


def _one_image(embedder: Embedder, item: Any) -> NDArray[np.float32] | None:
    try:
        vector: NDArray[np.float32] = embedder.embed_images([item])[0]
        return vector
    except InputError as error:
        logger.warning("no vector for an image: %s", error)
        return None
