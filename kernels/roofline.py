"""Named graphics cards, and the time below which none of them can do a sequence of launches: computed, not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longclip_rt.kernels.launch import Step


@dataclass(frozen=True)
class Gpu:
    """A card, by its maker's data sheet: dense rates at boost clock.

    Attributes:
        name: As people know it.
        arch: Compute capability times ten.
        bandwidth: Of its memory, in bytes a second.
        half_flops: Of fp16 and bf16 tensor cores that sum in fp32, a second.
        single_flops: Of fp32 without tensor cores, a second.
    """

    name: str
    arch: int
    bandwidth: float
    half_flops: float
    single_flops: float

    def seconds(self, steps: Sequence[Step], *, half: bool) -> float:
        """The roofline time of launches one after the other: each takes its traffic or its products, what is longer.

        Launch overhead, caches that are too small and tiles that are not full come on top; nothing can be faster.
        """
        rate = self.half_flops if half else self.single_flops
        return sum(max(step.bytes / self.bandwidth, step.flops / rate) for step in steps)


GPUS = (
    Gpu("A100 SXM 80GB", 80, 2039e9, 312e12, 19.5e12),
    Gpu("RTX 3090", 86, 936e9, 71e12, 35.6e12),
    Gpu("RTX 4090", 89, 1008e9, 165e12, 82.6e12),
    Gpu("L40S", 89, 864e9, 362e12, 91.6e12),
    Gpu("H100 SXM", 90, 3350e9, 989e12, 67e12),
    Gpu("H200 SXM", 90, 4800e9, 989e12, 67e12),
    Gpu("B200", 100, 8000e9, 2250e12, 75e12),
    Gpu("RTX 5090", 120, 1792e9, 209e12, 104.8e12),
)
"""One or two for each architecture that `longclip-rt kernels compile` builds for."""


def gpu_of_device(name: str) -> Gpu | None:
    """The card whose name a driver's device name holds, such as "NVIDIA H100 80GB HBM3"; None where none is listed.

    PCIe, laptop and Ti cards of the same number have other rates, and are not listed.
    """
    words = set(name.upper().replace("-", " ").split())
    if words & {"PCIE", "LAPTOP", "TI", "NVL"}:
        return None
    return next((gpu for gpu in GPUS if _number(gpu.name) in words), None)


def _number(name: str) -> str:
    """The part of a name that tells one card from another: A100, 4090."""
    return next(word for word in name.split() if any(character.isdigit() for character in word))
