"""Embeddings files made on the spot: photographs and captions of one stem each, drawn about a common mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.formats.outputs import OutputFiles, table_from_rows, write_output


def correlated(rows: int, dim: int, seed: int = 0, rank: int = 6, noise: float = 0.02) -> NDArray[np.float64]:
    """Unit vectors whose spread lies in `rank` directions but for some noise."""
    generator = np.random.default_rng(seed)
    directions = np.linalg.qr(np.random.default_rng(99).standard_normal((dim, rank + 1)))[0]
    spread = generator.standard_normal((rows, rank)) * np.linspace(0.5, 0.2, rank)
    vectors = directions[:, 0] + spread @ directions[:, 1:].T + noise * generator.standard_normal((rows, dim))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def pairs(count: int, dim: int, seed: int = 0) -> tuple[NDArray[np.float64], list[str], list[str]]:
    """Images and texts that are alike in pairs, in turns: vectors [2 count, D], ids, kinds."""
    images = correlated(count, dim, seed)
    texts = images + 0.01 * np.random.default_rng(seed + 1).standard_normal(images.shape)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    vectors = np.stack([images, texts], axis=1).reshape(2 * count, dim)
    ids = [name for row in range(count) for name in (f"photos/{row}.jpg", f"texts/{row}.long.txt")]
    return vectors, ids, ["image", "text"] * count


def write_embeddings(
    path: Path, vectors: NDArray[Any], ids: list[str] | None = None, kinds: list[str] | None = None, **metadata: str
) -> Path:
    rows = len(vectors)
    ids = [f"{row}.jpg" for row in range(rows)] if ids is None else ids
    kinds = ["image"] * rows if kinds is None else kinds
    vectors = vectors.astype(metadata.get("dtype", "float32"))
    facts = {"fingerprint": "f", "dim": str(vectors.shape[1]), "rows": str(rows), "dtype": str(vectors.dtype)}
    facts |= {"format": path.suffix, "bundle": "b" * 64, "model": "ViT-B-16", "weights": "w" * 64, **metadata}
    table = table_from_rows(ids, kinds, vectors, np.zeros(rows, np.int32), np.zeros(rows, bool))
    write_output(
        path.parent,
        OutputFiles.from_path(path),
        [table],
        rows=rows,
        dim=vectors.shape[1],
        dtype=str(vectors.dtype),
        metadata=facts,
    )
    return path
