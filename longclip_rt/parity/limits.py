"""How near is near enough: the limits of each precision, what the gate runs on, and one line of its report."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import Float32
from longclip_rt.pca.basis import Pca

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Limits:
    """What one precision must keep to.

    Attributes:
        parity: `max difference` bounds the largest difference of any component to the torch towers, `1 - cosine`
            that of the vector that fares worst.
        bound: That bound.
        invariance: Bound on the largest difference of a component when a text or image is computed in another batch,
            at another place in it, or with more padding. Rounding differs there with the order of summation.
    """

    parity: Literal["max difference", "1 - cosine"]
    bound: float
    invariance: float


# Components of normalised vectors are about 0.04 (D = 512); a rounding step there is 3e-5 in fp16 and 2e-4 in bf16.
LIMITS = {
    "fp32": Limits("max difference", 1e-4, 1e-5),
    "fp16": Limits("1 - cosine", 1e-3, 2e-3),
    "bf16": Limits("1 - cosine", 1e-2, 2e-2),
    "int8": Limits("1 - cosine", 5e-2, 5e-2),  # and what `fidelity` asks on other inputs than it was calibrated on
}


# A PCA output whose rows are so short before they are normalised that its limit would be larger is refused: the model's
# own error drowns it, and a PCA of more components, or fitted to more of the model's embeddings, is needed.
LOOSEST = 0.1


@dataclass(frozen=True)
class Sample:
    """The inputs of the gate.

    Attributes:
        tokens: Token ids of each text, [n] int32, SOT to EOT, at most the context length.
        pixels: Normalised photographs [N, 3, H, W] float32.
    """

    tokens: list[Ids]
    pixels: Float32


@dataclass(frozen=True)
class Reference:
    """What is right on the sample, every text padded to the context length (the reference way).

    Attributes:
        outputs: Tower -> output name -> [N, ...] float32.
        spans: Least length of a PCA output's rows before they are scaled to length 1, at most 1, by output name. An
            embedding's error grows by its inverse there, and so do the limits.
    """

    outputs: dict[str, dict[str, Float32]]
    spans: dict[str, float] = dataclasses.field(default_factory=dict)

    def with_pca(self, pca: Pca, mode: str) -> Reference:
        """With `text_pca` and `image_pca` as the PCA makes them, in float64, of the embeddings here."""
        outputs, spans = {}, {}
        for tower, named in self.outputs.items():
            embeddings = named[f"{tower}_embeds"]
            outputs[tower] = {**named, f"{tower}_pca": pca.apply(embeddings, tower, mode)}
            lengths = np.linalg.norm(pca.apply(embeddings, tower, mode, normalize=False), axis=1)
            spans[f"{tower}_pca"] = min(1.0, float(lengths.min()))
        return dataclasses.replace(self, outputs=outputs, spans=spans)


@dataclass(frozen=True)
class Check:
    """One line of the report: `value` was measured and held against `limit`.

    Attributes:
        runtime: Which backend ran the files.
        precision: In what.
        tower: `text` or `image`.
        name: What was checked.
        value: The figure: a difference, or a number of defects.
        limit: The largest value that passes.
    """

    runtime: str
    precision: str
    tower: str
    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether it holds. A NaN never does."""
        return self.value <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest; a figure that is not finite becomes text, which JSON can hold."""
        fields = {**dataclasses.asdict(self), "passed": self.passed}
        if not np.isfinite(self.value):
            fields["value"] = str(self.value)
        return fields
