"""Fits a PCA to embeddings in one streaming pass, and tells on held-out rows what each K would cost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.errors import PcaError
from longclip_rt.pca.basis import FITS, Basis, Float64, Kind, Pca
from longclip_rt.pca.retention import HeldOut, Retention, retention_table
from longclip_rt.version import __version__

if TYPE_CHECKING:
    from longclip_rt.formats.embeddings import Embeddings

PAIRS = ("names", "rows", "none")
KINDS: tuple[Kind, ...] = ("text", "image")
CHUNK_ROWS = 8192
# No more than this share of the rows is held out, however few there are.
_LARGEST_SHARE = 0.25
# Hashes to the fraction's resolution: the first 8 bytes of a digest.
_HASHES = 2.0**64


@dataclass(frozen=True)
class FitOptions:
    """How a PCA is fitted.

    Attributes:
        k: Components to keep; None: only the table is made.
        fit: `joint` for one basis of all rows, `apart` for one of the texts and one of the images.
        pairs: Which text belongs to which image in the table: `names` when their file names are equal up to the first
            dot, `rows` for the n-th text and the n-th image, `none`.
        held_out: Rows to keep out of the fit that the table is made with, about; at most a quarter of all.
    """

    k: int | None = None
    fit: str = "joint"
    pairs: str = "names"
    held_out: int = 2000

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise PcaError(f"There is no way {self.fit!r} to fit; there are {' and '.join(FITS)}.")
        if self.pairs not in PAIRS:
            raise PcaError(f"There are no pairs by {self.pairs!r}; choose one of {', '.join(PAIRS)}.")
        if self.k is not None and self.k < 1:
            raise PcaError(f"k is {self.k}; keep at least 1 component.")
        if self.held_out < 0:
            raise PcaError(f"held_out is {self.held_out}; hold out 0 rows or more.")


@dataclass(frozen=True)
class FitReport:
    """What `fit_pca` found.

    Attributes:
        bases: Name -> basis with all D directions, fitted to every row.
        pca: The same with K components; None where no K was given.
        retention: What each K keeps, on rows that took no part in the bases it was measured with; None where no row was
            held out.
    """

    bases: dict[str, Basis]
    pca: Pca | None
    retention: Retention | None


class Moments:
    """Number, mean and scatter of rows that come in pieces: float64, and memory that depends on D alone.

    Pieces are merged as in Chan, Golub and LeVeque (1979), about their own means: a large common mean costs no digits.
    """

    def __init__(self, dim: int) -> None:
        self.rows = 0
        self.mean: Float64 = np.zeros(dim)
        self._scatter: Float64 = np.zeros((dim, dim))

    def add(self, vectors: NDArray[np.floating]) -> None:
        """Adds rows [n, D] of any float type."""
        if not len(vectors):
            return
        rows = vectors.astype(np.float64)
        mean = rows.mean(axis=0)
        rows -= mean
        self._merge(len(rows), mean, rows.T @ rows)

    def _merge(self, rows: int, mean: Float64, scatter: Float64) -> None:
        total = self.rows + rows
        shift = mean - self.mean
        self._scatter += scatter + np.outer(shift, shift) * (self.rows * rows / total)
        self.mean = self.mean + shift * (rows / total)
        self.rows = total

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of rows together."""
        both = Moments(len(self.mean))
        for part in (self, other):
            if part.rows:
                both._merge(part.rows, part.mean, part._scatter)
        return both

    def basis(self) -> Basis:
        """Every direction, that of the largest variance first; the largest entry of each is positive.

        Raises:
            PcaError: There are fewer than two rows.
        """
        if self.rows < 2:
            raise PcaError(f"A PCA needs at least 2 rows; there are {self.rows}.")
        variances, vectors = np.linalg.eigh(self._scatter / (self.rows - 1))
        vectors = vectors[:, ::-1]
        signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])])
        return Basis(self.mean.copy(), vectors * signs, np.maximum(variances[::-1], 0.0), self.rows)


@dataclass
class _Tally:
    """What one pass over the files collects."""

    fitted: dict[str, Moments]
    held: dict[str, Moments]
    held_out: HeldOut
    seen: dict[str, int] = field(default_factory=lambda: {"text": 0, "image": 0})


def fit_pca(paths: Sequence[str | Path], options: FitOptions) -> FitReport:
    """Fits a PCA to the vectors of embeddings files, and measures what each K keeps.

    The bases returned are fitted to every row. The table is made with others, fitted without the held-out rows. Memory
    grows with D and with the rows held out, not with the files.

    Args:
        paths: Files that `longclip-rt embed` wrote with one and the same model and without a PCA.
        options: How.

    Raises:
        PcaError: The files are of several models, are PCA vectors already, or hold too few rows for K.
        OutputError: A file cannot be read.
    """
    metadata = _common_metadata(paths)
    dim = int(metadata["longclip_rt.dim"])
    names = ("joint",) if options.fit == "joint" else KINDS
    tally = _Tally({name: Moments(dim) for name in names}, {name: Moments(dim) for name in names}, HeldOut())
    share = _share(paths, options.held_out)
    for path, chunk in _chunks(paths):
        _add(tally, chunk, share, options, path)
    moments = {name: tally.fitted[name].merged(tally.held[name]) for name in names}
    for name, part in moments.items():
        if part.rows < 2 or (options.k or 1) > min(dim, part.rows - 1):
            what = "rows" if name == "joint" else f"{name} rows"
            raise PcaError(
                f"{part.rows} {what} of {dim} numbers have at most {max(0, min(dim, part.rows - 1))} components; "
                f"{options.k or 1} were asked for. Choose a smaller -k, or fit to more rows."
            )
    bases = {name: part.basis() for name, part in moments.items()}
    pca = None
    if options.k is not None:
        facts = {
            "tool": f"longclip-rt {__version__}",
            "fingerprints": sorted(_read(path)["longclip_rt.fingerprint"] for path in paths),
            "trained": metadata.get("longclip_rt.trained", "true"),
        }
        weights, model = metadata.get("longclip_rt.weights", ""), metadata.get("longclip_rt.model", "")
        pca = Pca({name: basis.first(options.k) for name, basis in bases.items()}, model, weights, facts)
    retention = None
    if all(part.rows > 1 for part in tally.fitted.values()):
        training = {name: part.basis() for name, part in tally.fitted.items()}
        retention = retention_table(training, tally.held_out, options.k)
    return FitReport(bases, pca, retention)


def _read(path: str | Path) -> dict[str, str]:
    from longclip_rt.formats.embeddings import read_metadata

    return read_metadata(path)


def _common_metadata(paths: Sequence[str | Path]) -> dict[str, str]:
    """The first file's metadata, after a look at the others'."""
    if not paths:
        raise PcaError("There is nothing to fit to. Name one embeddings file or several.")
    first = _read(paths[0])
    for path in paths:
        metadata = _read(path)
        if "longclip_rt.pca" in metadata:
            raise PcaError(f"{path} holds vectors that a PCA has made already. Embed the inputs without --pca.")
        for key in ("longclip_rt.dim", "longclip_rt.weights", "longclip_rt.model"):
            if metadata.get(key) != first.get(key):
                raise PcaError(
                    f"{path} and {paths[0]} are of different models ({key} is {metadata.get(key)} and "
                    f"{first.get(key)}). Embed the inputs of both with one."
                )
    return first


def _share(paths: Sequence[str | Path], held_out: int) -> float:
    rows = sum(int(_read(path).get("longclip_rt.rows", 0)) for path in paths)
    return min(_LARGEST_SHARE, held_out / max(rows, 1))


def _chunks(paths: Sequence[str | Path]) -> Iterator[tuple[str | Path, Embeddings]]:
    from longclip_rt.formats.embeddings import iter_embeddings

    for path in paths:
        for chunk in iter_embeddings(path, CHUNK_ROWS):
            yield path, chunk


def _add(tally: _Tally, chunk: Embeddings, share: float, options: FitOptions, path: Any) -> None:
    """Adds a chunk's rows to the fit, or to the rows held out: both members of a pair go the same way."""
    if not np.isfinite(chunk.vectors).all():
        raise PcaError(f"{path} holds values that are not finite. Embed the inputs again.")
    kinds = np.array(chunk.kinds)
    keys = [_key(tally, id_, kind, options) for id_, kind in zip(chunk.ids, chunk.kinds, strict=True)]
    held = np.array([_is_held_out(key, share) for key in keys], bool)
    # Names that are mostly equal would hold out everything at once; what is over goes to the fit.
    room = max(0, 2 * options.held_out - len(tally.held_out))
    held[np.flatnonzero(held)[room:]] = False
    for name in tally.fitted:
        mine = np.ones(len(kinds), bool) if name == "joint" else kinds == name
        tally.fitted[name].add(chunk.vectors[mine & ~held])
        tally.held[name].add(chunk.vectors[mine & held])
    for row in np.flatnonzero(held):
        pair = keys[row] if options.pairs != "none" else ""
        tally.held_out.add(chunk.kinds[row], pair, chunk.vectors[row])


def _key(tally: _Tally, id_: str, kind: str, options: FitOptions) -> str:
    """What the members of a pair have in common."""
    tally.seen[kind] += 1
    if options.pairs == "names":
        return id_.replace("\\", "/").rpartition("/")[2].partition(".")[0]
    return str(tally.seen[kind] if options.pairs == "rows" else (kind, tally.seen[kind]))


def _is_held_out(key: str, share: float) -> bool:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * _HASHES
