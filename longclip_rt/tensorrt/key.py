"""What an engine belongs to: graphs, library, card and options; and whether that is what a machine wants."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from longclip_rt.bundle.bundle import TOWERS, Bundle, onnx_name
from longclip_rt.system.files import sha256_of_json
from longclip_rt.tensorrt.head import HEAD_KERNEL, HEAD_PLUGIN, KERNELS, plugin_graph_name, weights_file


@dataclass(frozen=True)
class Target:
    """The machine that an engine is to run on.

    Attributes:
        library: `tensorrt` or `tensorrt-rtx`.
        version: The library's version, in full.
        gpu: The card's name.
        arch: Its compute capability times ten.
        memory: Its memory in bytes; None where it is not known.
    """

    library: str
    version: str
    gpu: str
    arch: int
    memory: int | None = None


@dataclass(frozen=True)
class EngineKey:
    """What an engine belongs to.

    Attributes:
        library: `tensorrt` or `tensorrt-rtx`.
        version: The library that built it; no other version reads the plan.
        gpu: Name of the card that it was timed on; empty where it runs on every card of its architectures.
        archs: Compute capabilities times ten.
        precision: Of the graphs.
        onnx: SHA-256 of each tower's graph as it is in the bundle.
        options: What else it was built with: buckets, batches, optimisation level.
        head: SHA-256 over what computes the PCA, as `head_hash` gives it; empty where that is in the graphs.
    """

    library: str
    version: str
    gpu: str
    archs: tuple[int, ...]
    precision: str
    onnx: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    head: str = ""

    @property
    def name(self) -> str:
        """The folder's name."""
        arch = "-".join(f"sm{arch}" for arch in self.archs)
        return f"{self.library}-{arch}-{sha256_of_json(asdict(self))[:12]}"

    def mismatch(self, bundle: Bundle, target: Target, precision: str) -> str:
        """Why an engine of this key cannot run a bundle on a machine, in words; empty where it can.

        Args:
            bundle: The model.
            target: The machine.
            precision: The precision that is wanted.
        """
        if self.library != target.library:
            return f"it was built for {self.library}, not {target.library}"
        if self.version != target.version:
            return f"it was built by version {self.version}, and {target.version} is installed"
        if target.arch not in self.archs:
            made = ", ".join(f"sm_{arch}" for arch in self.archs)
            return f"it was built for {made}, and this GPU is sm_{target.arch}"
        if self.gpu and self.gpu != target.gpu:
            return f"it was built on {self.gpu}, and this GPU is {target.gpu}"
        if self.precision != precision:
            return f"it computes in {self.precision}, and {precision} is wanted"
        graphs = graph_hashes(bundle, precision)
        for tower in TOWERS:
            if tower not in graphs or self.onnx.get(tower) != graphs[tower]:
                return f"it was built from another {onnx_name(tower, precision)}"
        if self.head != head_hash(bundle, str(self.options.get("pca_head", ""))):
            return "it was built with another PCA head"
        return ""


def graph_hashes(bundle: Bundle, precision: str) -> dict[str, str]:
    """Tower -> SHA-256 of its graph in a precision, for those that the bundle has; weights beside the graph count."""
    files = bundle.manifest["files"]
    hashes = {}
    for tower in TOWERS:
        name = onnx_name(tower, precision)
        if name in files:
            beside = files.get(f"{name}.data")
            own = str(files[name]["sha256"])
            hashes[tower] = own if beside is None else sha256_of_json([own, beside["sha256"]])
    return hashes


def head_hash(bundle: Bundle, head: str) -> str:
    """SHA-256 over the bundle's files that compute an engine's PCA; empty where its graphs do, or files are missing.

    Args:
        bundle: The model.
        head: One of `backends.head_kernel.HEADS`, or empty without a PCA.
    """
    if head == HEAD_PLUGIN:
        names = [plugin_graph_name(tower) for tower in TOWERS]
    elif head == HEAD_KERNEL:
        try:
            codes = json.loads(bundle.file(KERNELS).read_text(encoding="utf-8"))["codes"]
            names = [KERNELS, *map(weights_file, TOWERS), *(str(code["file"]) for code in codes)]
        except (OSError, ValueError, KeyError, TypeError):
            return ""
    else:
        return ""
    files = bundle.manifest["files"]
    if any(name not in files for name in names):
        return ""
    return sha256_of_json({name: files[name]["sha256"] for name in names})
