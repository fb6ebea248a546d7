"""What the routes share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longclip_rt.backends.base import Float32
from longclip_rt.errors import PcaError
from longclip_rt.pca.basis import Pca
from longclip_rt.runtime import Embedder
from longclip_rt.serving import requests
from longclip_rt.serving.bounds import Bounds, Refusal
from longclip_rt.serving.collection import Collection
from longclip_rt.serving.encoding import Encoded, Encoding
from longclip_rt.serving.metrics import Metrics


@dataclass(frozen=True)
class Options:
    """What a server offers.

    Attributes:
        bounds: Its limits.
        key: The API key; empty: none is asked for.
        index: Embeddings to search, from `embed`.
        pictures: The folder whose pictures may be shown.
    """

    bounds: Bounds = field(default_factory=Bounds)
    key: str = field(default="", repr=False)
    index: Path | None = None
    pictures: Path | None = None


class Server:
    """What the routes share: the model and its queues, the collection, the metrics."""

    def __init__(self, embedder: Embedder, options: Options) -> None:
        if embedder.pca is not None:
            raise PcaError("A server takes an embedder without a PCA, and applies the bundle's where a request asks.")
        self.embedder, self.options = embedder, options
        self.metrics = Metrics()
        self.encoding = Encoding(embedder, options.bounds, self.metrics)
        self.collection = None
        if options.index is not None:
            self.collection = Collection(options.index, embedder, options.pictures)
        self.model = embedder.bundle.name
        self.pca = embedder.bundle.pca
        self.ready = asyncio.Event()

    def check_model(self, name: str | None) -> None:
        """Refuses another model's name.

        Raises:
            Refusal: It is another's.
        """
        if name not in (None, self.model):
            raise Refusal(404, f"There is no model {name!r} here; there is {self.model}.", "model_not_found", "model")

    def shortened(self, encoded: Encoded, asked: float | None) -> Float32:
        """Vectors [N, `asked`]: the model's own, or the bundle's PCA's first components, of length 1 again.

        Raises:
            Refusal: The model cannot give so many.
        """
        if asked in (None, self.embedder.dim):
            return encoded.vectors
        pca, dimensions = self.pca, int(asked)
        if pca is None or not 1 <= dimensions <= pca.k or dimensions != asked:
            offered = f"{self.embedder.dim}" + (f" and 1 to {pca.k}" if pca else "; the bundle carries no PCA")
            raise Refusal(400, f"dimensions is {asked:g}; there are {offered}.", "bad_dimensions", "dimensions")
        first = Pca({name: basis.first(dimensions) for name, basis in pca.bases.items()})
        shorter = encoded.vectors[:, :dimensions].copy()
        for kind in set(encoded.kinds):
            rows = [index for index, one in enumerate(encoded.kinds) if one == kind]
            shorter[rows] = first.apply(encoded.vectors[rows], kind)
        return shorter

    async def query(self, item: Any) -> Encoded:
        """The vector of one text or image."""
        return await self.encoding.encode(requests.inputs_of(item))
