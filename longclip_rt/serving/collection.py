"""The embeddings that `--index` names, in memory, and the pictures behind them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from longclip_rt.backends.base import Float32
from longclip_rt.errors import BundleError, InputError, PcaError
from longclip_rt.formats.embeddings import load_embeddings
from longclip_rt.runtime import Embedder
from longclip_rt.search.hits import Hit


class Collection:
    """Embeddings that are searched.

    Args:
        path: Their file, as `embed` writes it.
        embedder: The server's model, which must have made them, without a PCA.
        pictures: The folder that thumbnails are made from, and no other; None: there are none.

    Raises:
        OutputError: The file cannot be read.
        BundleError: Another model made it.
        PcaError: It was made with a PCA.
        InputError: `pictures` is no folder.
    """

    def __init__(self, path: Path, embedder: Embedder, pictures: Path | None) -> None:
        stored = load_embeddings(path)
        made = stored.metadata.get("longclip_rt.bundle", "")
        if made != embedder.bundle.sha256:
            raise BundleError(
                f"{path} was made with the bundle {made[:12]}, and the server runs {embedder.bundle.sha256[:12]}. "
                "Vectors of two models cannot be compared: name the first one with --bundle, or embed the inputs again."
            )
        if stored.metadata.get("longclip_rt.pca"):
            raise PcaError(f"{path} holds PCA vectors, and the server searches whole ones. Embed without --pca.")
        if pictures is not None and not pictures.is_dir():
            raise InputError(f"{pictures} is no folder. Name the one that holds the pictures.")
        self.ids, self.kinds = stored.ids, np.array(stored.kinds, dtype=str)
        vectors = stored.vectors.astype(np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        self._vectors = np.divide(vectors, norms, out=vectors, where=norms > 0)  # [n, D]
        self._pictures = None if pictures is None else pictures.resolve()
        bases = stored.metadata.get("longclip_rt.base", "").split(os.pathsep)
        self._folders = [Path(base) for base in ("", *filter(None, bases))]

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, query: Float32, k: int, kind: str | None) -> list[Hit]:
        """The k rows nearest to a unit vector [D], best first; equal scores in the file's order.

        Scores are cosines of float32 vectors computed in float32: within 1e-6 of those of `longclip-rt search`.
        """
        rows = np.arange(len(self)) if kind is None else np.flatnonzero(self.kinds == kind)
        scores = self._vectors @ query if kind is None else self._vectors[rows] @ query
        if k < len(rows):
            threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
            rows, scores = rows[scores >= threshold], scores[scores >= threshold]
        best = np.argsort(-scores, kind="stable")[:k]
        return [
            Hit(rank, float(scores[at]), self.ids[rows[at]], str(self.kinds[rows[at]]), int(rows[at]))
            for rank, at in enumerate(best.tolist(), start=1)
        ]

    def picture(self, row: int) -> Path | None:
        """The picture of a row: below the folder of pictures, links followed, or None."""
        if self._pictures is None or not 0 <= row < len(self) or self.kinds[row] != "image":
            return None
        for folder in (self._pictures, *self._folders):
            try:
                path = (folder / self.ids[row]).resolve()
                if path.is_relative_to(self._pictures) and path.is_file():
                    return path
            except (OSError, ValueError, RuntimeError):  # too long for a name, with a NUL, or links in a circle
                continue
        return None

    def thumbnail(self, row: int) -> bytes | None:
        """A small JPEG of a row's picture; None where there is no picture, or none that can be read."""
        from longclip_rt.search.page import jpeg, open_picture

        path = self.picture(row)
        if path is None:
            return None
        try:
            return jpeg(open_picture(path))
        except InputError:
            return None
