"""A fitted PCA: mean and components, applied to normalised embeddings, kept in one safetensors file.

The paper uses PCA in training only (its section 3.2). Here it makes vectors shorter, for cheaper storage and search, or
coarser in their own space. It is always applied in float64 to the embeddings that a backend gives, so that every
backend gives the same vectors up to its own error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from longclip_rt.choices import PCA_MODES
from longclip_rt.errors import PcaError
from longclip_rt.metrics import unit_rows
from longclip_rt.system.files import output_errors, path_from_argument, sha256_of_json, whole_file

Float64 = NDArray[np.float64]
Kind = Literal["text", "image"]

FITS = ("joint", "apart")
FORMAT_VERSION = 1
_KEY = "longclip_rt.pca"
# What a basis may fall short of orthonormal by; float64 eigenvectors keep to 1e-13.
_ORTHONORMAL = 1e-6


@dataclass(frozen=True, eq=False)
class Basis:
    """The principal directions of some embeddings, and the spread along all of them.

    Attributes:
        mean: float64 [D].
        components: float64 [D, K], orthonormal columns, the direction of the largest variance first.
        variances: float64 [D], along every direction and not only the K kept, largest first.
        rows: Number of embeddings that it was fitted to.
    """

    mean: Float64
    components: Float64
    variances: Float64
    rows: int

    @property
    def dim(self) -> int:
        """Length D of an embedding."""
        return len(self.mean)

    @property
    def k(self) -> int:
        """Number K of components."""
        return int(self.components.shape[1])

    def explained(self, k: int | None = None) -> float:
        """The share of the total variance along the first `k` directions, all K of them by default, from 0 to 1."""
        total = float(self.variances.sum())
        return float(self.variances[: k or self.k].sum()) / total if total > 0 else 1.0

    def first(self, k: int) -> Basis:
        """The same basis with its first `k` components only."""
        return Basis(self.mean, self.components[:, :k], self.variances, self.rows)


@dataclass(frozen=True, eq=False)
class Pca:
    """A PCA of one model's embeddings.

    Attributes:
        bases: `joint`, or `text` and `image` where the two kinds were fitted apart.
        model: The model's name, such as `ViT-B-16`.
        weights: SHA-256 of the weights that made the embeddings; empty where they are not known.
        facts: What else the file tells of the fit: tool and sources.
    """

    bases: Mapping[str, Basis]
    model: str = ""
    weights: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if set(self.bases) not in ({"joint"}, {"text", "image"}):
            raise PcaError(f"A PCA has the basis joint, or the bases text and image; got {', '.join(self.bases)}.")
        for name, basis in self.bases.items():
            _check(name, basis)
        if len({basis.components.shape for basis in self.bases.values()}) > 1:
            raise PcaError("The bases of a PCA must be of one shape. Fit it again with: longclip-rt pca fit")

    @property
    def fit(self) -> str:
        """`joint`, or `apart`: then texts and images have each their own basis."""
        return "joint" if "joint" in self.bases else "apart"

    @property
    def dim(self) -> int:
        """Length D of an embedding."""
        return next(iter(self.bases.values())).dim

    @property
    def k(self) -> int:
        """Number K of components."""
        return next(iter(self.bases.values())).k

    @cached_property
    def sha256(self) -> str:
        """What identifies the PCA: a hash over its means and components, and over nothing else."""
        digests = {
            f"{name}.{part}": hashlib.sha256(np.ascontiguousarray(array, "<f8").tobytes()).hexdigest()
            for name, basis in self.bases.items()
            for part, array in (("mean", basis.mean), ("components", basis.components))
        }
        return sha256_of_json({"k": self.k, **digests})

    def basis(self, kind: str) -> Basis:
        """The basis for `text` or `image` vectors."""
        return self.bases["joint"] if "joint" in self.bases else self.bases[kind]

    def length(self, mode: str) -> int:
        """How many numbers a vector has after `apply`: K, or D in the mode `reconstruct`."""
        return self.k if mode == "project" else self.dim

    def apply(
        self, vectors: NDArray[np.floating], kind: str, mode: str = "project", *, normalize: bool = True
    ) -> NDArray[np.float32]:
        """Reduces embeddings.

        Args:
            vectors: L2-normalised embeddings [n, D], any float type.
            kind: `text` or `image`: whose they are.
            mode: `project` gives (z - mean) V, K numbers; `reconstruct` gives mean + (z - mean) V V', D numbers: the
                embedding without what the K directions do not hold.
            normalize: Whether the result is scaled to length 1, so that dot products are cosines.

        Returns:
            float32 [n, K] or [n, D].

        Raises:
            PcaError: The vectors have another length, or the mode is unknown.
        """
        check_mode(mode)
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise PcaError(f"The PCA takes vectors [n, {self.dim}]; got {list(vectors.shape)}.")
        basis = self.basis(kind)
        result = (vectors.astype(np.float64) - basis.mean) @ basis.components  # [n, K]
        if mode == "reconstruct":
            result = basis.mean + result @ basis.components.T  # [n, D]
        if normalize:
            result = unit_rows(result)
        return result.astype(np.float32)

    def check_model(self, name: str, dim: int, weights: str) -> None:
        """Refuses another model than the one whose embeddings it was fitted to: there its directions mean nothing.

        Args:
            name: The model's name, for the message.
            dim: Length D of its embeddings.
            weights: SHA-256 of its weights; empty where it is not known.

        Raises:
            PcaError: D differs, or the weights do where both are known.
        """
        if self.dim != dim or (self.weights and weights and self.weights != weights):
            raise PcaError(
                f"The PCA was fitted to embeddings of {self.model or 'another model'} (D = {self.dim}, weights "
                f"{self.weights[:12] or 'unknown'}), and the model here is {name} (D = {dim}, weights "
                f"{weights[:12] or 'unknown'}). Fit one to this model's embeddings with: longclip-rt pca fit"
            )

    def describe(self, mode: str) -> dict[str, str]:
        """What embeddings made with it carry in their metadata."""
        return {"pca": self.sha256, "pca_k": str(self.k), "pca_mode": mode, "pca_fit": self.fit}


def check_mode(mode: str) -> None:
    """Refuses an unknown mode.

    Raises:
        PcaError: It is none of `PCA_MODES`.
    """
    if mode not in PCA_MODES:
        raise PcaError(f"There is no PCA mode {mode!r}; there are {' and '.join(PCA_MODES)}.")


def save_pca(pca: Pca, path: str | Path) -> None:
    """Writes a PCA as safetensors; equal ones give equal bytes. The file is whole or as it was.

    Raises:
        OutputError: The file cannot be written.
    """
    from safetensors.numpy import save

    tensors = {
        f"{name}.{part}": np.ascontiguousarray(getattr(basis, part), np.float64)
        for name, basis in pca.bases.items()
        for part in ("mean", "components", "variances")
    }
    about = {
        "format": FORMAT_VERSION,
        "model": pca.model,
        "weights": pca.weights,
        "rows": {name: basis.rows for name, basis in pca.bases.items()},
        "facts": dict(pca.facts),
    }
    # One key only: safetensors writes several in an order that changes from run to run.
    data = save(tensors, metadata={_KEY: json.dumps(about, sort_keys=True)})
    target = Path(path)
    with output_errors(target), whole_file(target) as stream:
        stream.write(data)


def load_pca(path: str | Path) -> Pca:
    """Reads what `save_pca` wrote, and checks it.

    Raises:
        PcaError: The file is absent, damaged, no PCA of this program, or of a newer format.
    """
    from safetensors import SafetensorError, safe_open

    path = path_from_argument(path, "A PCA", PcaError)
    try:
        with safe_open(str(path), framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors: dict[str, Float64] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise PcaError(f"There is no file {str(path)!r}. Make one with: longclip-rt pca fit") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise PcaError(f"{str(path)!r} cannot be read as safetensors: {error}. Fit or copy it again.") from error
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise PcaError(f"{str(path)!r} is no PCA of this program. Make one with: longclip-rt pca fit")
    if about["format"] > FORMAT_VERSION:
        raise PcaError(
            f"{str(path)!r} has format {about['format']}; this version reads up to {FORMAT_VERSION}. "
            "Update with: pip install -U longclip-rt"
        )
    try:
        bases = {
            name: Basis(tensors[f"{name}.mean"], tensors[f"{name}.components"], tensors[f"{name}.variances"], int(rows))
            for name, rows in about["rows"].items()
        }
        return Pca(bases, about["model"], about["weights"], about["facts"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PcaError(f"{str(path)!r} lacks {error}. Fit it again with: longclip-rt pca fit") from error


def _check(name: str, basis: Basis) -> None:
    mean, components, variances = basis.mean, basis.components, basis.variances
    shapes = f"mean {list(mean.shape)}, components {list(components.shape)}, variances {list(variances.shape)}"
    if (
        mean.ndim != 1
        or components.ndim != 2
        or not len(mean) == len(components) == len(variances)
        or not 1 <= components.shape[1] <= len(mean)
    ):
        raise PcaError(f"The {name} basis of a PCA must have the shapes [D], [D, K] and [D], K from 1 to D: {shapes}.")
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(components.T @ components - np.eye(basis.k)).max()
    if not error < _ORTHONORMAL or not np.isfinite(mean).all() or not np.isfinite(variances).all():
        raise PcaError(f"The {name} basis of the PCA is damaged: its components are not orthonormal, or not finite.")
