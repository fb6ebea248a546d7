"""Nearest neighbours of one text or image among stored embeddings: exact in one streaming pass, or by an index."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from longclip_rt.errors import BundleError, InputError, OutputError, PcaError
from longclip_rt.search.hits import Hit, unit_vector
from longclip_rt.search.indexed import approximate_index, search_index
from longclip_rt.system.closing import closed_after
from longclip_rt.system.files import has_image_suffix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from longclip_rt.formats.embeddings import Embeddings
    from longclip_rt.pca.basis import Pca
    from longclip_rt.runtime import Embedder

Kind = Literal["image", "text"]

# 8,192 rows of 768 float64 values are 48 MiB: large enough for the disk, small enough for any machine.
CHUNK_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Answer:
    """What a query found, and with which model.

    Attributes:
        query: The text, or the path of the image.
        query_kind: "text" or "image".
        hits: Best first.
        path: The embeddings that were searched.
        metadata: The file's metadata, keys as stored (`longclip_rt.bundle`...).
        embedder: `Embedder.describe()` of the model that embedded the query.
        tokens: Tokens of a text query before truncation; 0 for an image.
        truncated: Whether the query was longer than the model's context.
        index: The index that was asked, such as `hnsw`, whose answer is approximate; empty: the answer is exact.
    """

    query: str
    query_kind: Kind
    hits: list[Hit]
    path: Path
    metadata: dict[str, str] = field(default_factory=dict)
    embedder: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    truncated: bool = False
    index: str = ""

    @property
    def trained(self) -> bool:
        """Whether the model has learnt anything; the scores of an untrained one mean nothing."""
        return self.metadata.get("longclip_rt.trained", "true") != "false"


def search(
    path: str | Path,
    query: NDArray[np.floating],
    k: int = 5,
    kinds: Collection[str] | None = None,
    *,
    chunk_rows: int = CHUNK_ROWS,
) -> list[Hit]:
    """The `k` rows with the largest cosine similarity to `query`; equal scores keep the file's order.

    Cosines are computed in float64 and rounded to float32, so that equal vectors get equal scores wherever they stand.
    Memory depends on `k` and `chunk_rows`, not on the number of rows.

    Args:
        path: Embeddings as `embed` writes them.
        query: Vector [D], any float type; it need not be normalised.
        k: Number of hits wanted; fewer come back when there are fewer rows.
        kinds: Only rows of these kinds ("image", "text"); None means all.
        chunk_rows: Rows in memory at a time.

    Raises:
        InputError: `k` is below 1, or `query` is not a finite vector of the stored length.
        OutputError: The file cannot be read, or holds values that are not finite.
    """
    from longclip_rt.formats.embeddings import iter_embeddings

    if k < 1:
        raise InputError(f"k is {k}; ask for at least 1 hit.")
    direction = unit_vector(query)
    best: list[tuple[float, int, str, str]] = []  # (-score, row, id, kind), sorted
    row = 0
    for chunk in iter_embeddings(path, chunk_rows):
        candidates = _best_of_chunk(chunk, direction, k, kinds, row, path)
        best = sorted([*best, *candidates], key=lambda hit: hit[:2])[:k]
        row += len(chunk.ids)
    return [Hit(rank, -negated, id_, kind, row) for rank, (negated, row, id_, kind) in enumerate(best, start=1)]


def search_query(
    path: str | Path,
    query: str,
    k: int = 5,
    *,
    query_kind: Kind | None = None,
    kinds: Collection[str] | None = None,
    bundle: str | Path | None = None,
    backend: str = "auto",
    precision: str = "auto",
    pca: str | Path | Pca | None = None,
    exact: bool = False,
) -> Answer:
    """Embeds a text or an image with the model that made the file, and searches the file for it.

    Args:
        path: Embeddings as `embed` writes them.
        query: A text, or the path of an image.
        k: Number of hits wanted.
        query_kind: What `query` is; None decides as `kind_of_query` does.
        kinds: Only rows of these kinds; None means all.
        bundle: Folder of the model; None looks for the one the file names.
        backend: As in `Embedder.from_bundle`.
        precision: As in `Embedder.from_bundle`.
        pca: The PCA that made the file, or its own file; None takes the bundle's where the embeddings are PCA vectors.
        exact: Compares with every vector though the file has an index; one of codes (FAISS's `ivf-pq`) has none.

    Raises:
        BundleError: The model that made the file is not here, or `bundle` is another one.
        PcaError: The file was made with another PCA than the query would be, or with one that is not here.
        InputError: The query is empty or its image cannot be read, or `k` is below 1.
        OutputError: The file cannot be read.
    """
    from longclip_rt.formats.embeddings import read_metadata

    query_kind = query_kind or kind_of_query(query)
    if query_kind == "text" and not query.strip():
        raise InputError("The query is empty; give a text or the path of an image.")
    metadata = read_metadata(path)
    _check_kinds(path, metadata, query_kind, kinds)
    loaded = _loaded_pca(path, metadata, pca)
    with closed_after(embedder_of(path, metadata, bundle, backend=backend, precision=precision)) as opened:
        embedder = _with_pca_of(path, metadata, opened, loaded)
        tokens, truncated = 0, False
        if query_kind == "image":
            vector = embedder.embed_images([Path(query)])[0]
        else:
            encoded = embedder.tokenizer.encode([query])[0]
            tokens, truncated = encoded.length, encoded.truncated
            vector = embedder.encode_tokens(encoded.ids[None])[0]
        described = embedder.describe()
    index = "" if exact else approximate_index(metadata)
    hits = search_index(path, vector, k, kinds, metadata) if index else search(path, vector, k, kinds)
    return Answer(query, query_kind, hits, Path(path), metadata, described, tokens, truncated, index)


def kind_of_query(query: str) -> Kind:
    """An image if `query` is the path of an existing file with an image's suffix, else a text."""
    path = Path(query)
    if not has_image_suffix(path):
        return "text"
    try:
        return "image" if path.is_file() else "text"
    except (OSError, ValueError):  # a long text is no valid file name
        return "text"


def embedder_of(
    path: str | Path, metadata: dict[str, str], bundle: str | Path | None, *, backend: str, precision: str
) -> Embedder:
    """Loads the model that made an embeddings file: vectors of different models cannot be compared.

    Raises:
        BundleError: The file does not name its model, the model is not here, or `bundle` is another one.
    """
    from longclip_rt.bundle.bundle import find_bundle
    from longclip_rt.runtime import Embedder

    wanted = metadata.get("longclip_rt.bundle", "")
    if not wanted:
        raise BundleError(f"{path} does not say which model made it. Embed the inputs again with: longclip-rt embed")
    model = metadata.get("longclip_rt.model", "unnamed model")
    if bundle is None:
        bundle = find_bundle(wanted)
        if bundle is None:
            raise BundleError(
                f"{path} was made with the bundle {wanted[:12]} ({model}), which is not among the bundles known here. "
                "Give its folder with --bundle, or embed the inputs again."
            )
    embedder = Embedder.from_bundle(bundle, backend=backend, precision=precision)
    found = embedder.describe().get("bundle", "")
    if found != wanted:
        raise BundleError(
            f"{path} was made with the bundle {wanted[:12]} ({model}), and {bundle} is {found[:12]}. Vectors of two "
            "models cannot be compared: give the first one with --bundle, or embed the inputs again."
        )
    return embedder


def _check_kinds(path: str | Path, metadata: dict[str, str], query_kind: str, kinds: Collection[str] | None) -> None:
    """Refuses to compare K numbers of a text with K numbers of an image where each kind has its own basis."""
    apart = metadata.get("longclip_rt.pca_fit") == "apart" and metadata.get("longclip_rt.pca_mode") == "project"
    if apart and (kinds is None or not set(kinds) <= {query_kind}):
        raise PcaError(
            f"The PCA of {path} was fitted to texts and images apart, so text and image vectors cannot be compared. "
            f"Search with --kind {query_kind}, or embed with --pca-mode reconstruct."
        )


def _loaded_pca(path: str | Path, metadata: dict[str, str], pca: str | Path | Pca | None) -> Pca | None:
    """The PCA that was given, if it is the file's; a look at it before a model is loaded.

    Raises:
        PcaError: The file was made with another one, or with none.
    """
    from longclip_rt.pca.basis import Pca, load_pca

    wanted = metadata.get("longclip_rt.pca", "")
    if pca is None or (str(pca) == "bundle" and wanted):
        return None
    if str(pca) == "bundle":
        raise PcaError(f"{path} was made without a PCA. Leave --pca out, or embed the inputs again with --pca bundle.")
    given = pca if isinstance(pca, Pca) else load_pca(pca)
    if given.sha256 != wanted:
        made = f"with the PCA {_pca_name(metadata)}" if wanted else "without a PCA"
        raise PcaError(
            f"{path} was made {made}, and the PCA given is {given.sha256[:12]} (K = {given.k}). Vectors of two PCAs "
            f"cannot be compared: {'give the first one' if wanted else 'leave --pca out'}, or embed the inputs again."
        )
    return given


def _with_pca_of(path: str | Path, metadata: dict[str, str], embedder: Embedder, pca: Pca | None) -> Embedder:
    """An embedder that makes a query as the file's vectors were made."""
    wanted = metadata.get("longclip_rt.pca", "")
    if not wanted:
        return embedder
    pca = pca or embedder.bundle.pca
    if pca is None or pca.sha256 != wanted:
        there = "the bundle carries none" if pca is None else f"the bundle carries another ({pca.sha256[:12]})"
        raise PcaError(f"{path} was made with the PCA {_pca_name(metadata)}, and {there}. Give its file with --pca.")
    return embedder.with_pca(pca, metadata.get("longclip_rt.pca_mode", "project"))


def _pca_name(metadata: dict[str, str]) -> str:
    return f"{metadata['longclip_rt.pca'][:12]} (K = {metadata.get('longclip_rt.pca_k', 'unknown')})"


def _best_of_chunk(
    chunk: Embeddings,
    direction: NDArray[np.float64],
    k: int,
    kinds: Collection[str] | None,
    first_row: int,
    path: str | Path,
) -> Iterator[tuple[float, int, str, str]]:
    """The chunk's `k` best rows as (-score, row, id, kind), best first; equal scores in row order."""
    vectors = np.asarray(chunk.vectors, np.float64)  # [n, D]
    if vectors.shape[1] != len(direction):
        raise InputError(f"The query has {len(direction)} values and the vectors of {path} have {vectors.shape[1]}.")
    # Stored vectors have length 1 up to rounding (float16: about 1e-4); dividing makes the score a cosine in any case.
    norms = np.linalg.norm(vectors, axis=1)
    if not np.all(np.isfinite(norms)):
        bad = first_row + int(np.flatnonzero(~np.isfinite(norms))[0])
        raise OutputError(f"Row {bad} of {path} holds values that are not finite. Embed the inputs again.")
    scores = (vectors @ direction / np.where(norms == 0.0, 1.0, norms)).astype(np.float32)
    rows = np.arange(len(scores))
    if kinds is not None:
        rows = np.flatnonzero([kind in kinds for kind in chunk.kinds])
    order = rows[np.argsort(-scores[rows], kind="stable")[:k]]
    for row in order.tolist():
        yield -float(scores[row]), first_row + row, chunk.ids[row], chunk.kinds[row]
