"""What a bundle carries so that a GPU can run the PCA head in one launch: weights, and code compiled ahead of time.

Made at export, where Triton and torch are, since neither is needed where engines are built and run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import INPUT_NAMES, Float32
from longclip_rt.bundle.bundle import Bundle
from longclip_rt.export.tensorrt.head_graph import with_head_plugin, with_head_states
from longclip_rt.metrics import EPS
from longclip_rt.model.tokenizer import pad_tokens
from longclip_rt.parity.limits import LIMITS, LOOSEST, Check, Reference, Sample
from longclip_rt.pca.basis import Pca
from longclip_rt.system.files import output_errors
from longclip_rt.tensorrt.head import (
    FORMAT_VERSION,
    KERNELS,
    LARGEST_SHARED,
    Code,
    HeadFiles,
    load_head,
    pca_name,
    plugin_graph_name,
    states_name,
    weights_file,
)

if TYPE_CHECKING:
    from longclip_rt.kernels.aot import Compiled, Variant
    from longclip_rt.model.towers import ImageTower, TextTower

logger = logging.getLogger("longclip_rt")

NAME = "head kernel"
"""What the gate's report calls the runtime of these checks."""


def why_no_head(text: TextTower, image: ImageTower, mode: str) -> str:
    """Why the head cannot be a kernel, in words; empty where it can. The graphs have it with plain operators anyway."""
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if mode != "project":
        return f"the kernel projects, and the mode is {mode}"
    sizes = [*(tower.projection.shape for tower in (text, image))]
    if any(number % 16 for shape in sizes for number in shape):
        return f"the kernel wants widths that are multiples of 16, and the projections are {[list(s) for s in sizes]}"
    return ""


def write_head(folder: Path, text: TextTower, image: ImageTower, pca: Pca, architectures: Sequence[int]) -> None:
    """Writes the weights of both towers' heads, and the kernel for every architecture.

    Args:
        folder: Of the bundle in the making.
        text: The text tower, in fp32.
        image: The image tower, likewise.
        pca: The PCA.
        architectures: Compute capabilities times ten.

    Raises:
        KernelError: The kernel does not compile, or not to what it should.
        OutputError: The folder cannot be written.
    """
    import torch
    from safetensors.numpy import save

    from longclip_rt.kernels.pca_head import head_weights

    towers: dict[str, Any] = {}
    for kind, tower in (("text", text), ("image", image)):
        norm: Any = tower.ln_final if kind == "text" else tower.ln_post
        basis = pca.basis(kind)
        mean, components = (torch.from_numpy(array) for array in (basis.mean, basis.components))
        made = head_weights(
            norm.weight, norm.bias, tower.projection, mean, components, dtype=torch.float16, eps=norm.eps
        )
        arrays = {name: getattr(made, name).numpy() for name in ("weight", "bias", "shift")}
        with output_errors(folder / weights_file(kind)):
            (folder / weights_file(kind)).write_bytes(save(arrays))
        towers[kind] = {"dim": made.dim, "k": made.k, "eps": made.eps, "floor": made.floor}
    codes = []
    for compiled, rows in _compiled(pca.k, architectures):
        code = Code(
            f"{compiled.name}.cubin", compiled.arch, compiled.entry, rows, compiled.warps, compiled.shared,
            compiled.scratch,
        )  # fmt: skip
        with output_errors(folder / code.file):
            (folder / code.file).write_bytes(compiled.cubin)
        codes.append(asdict(code))
    about = {"format": FORMAT_VERSION, "pca": pca.sha256, "towers": towers, "codes": codes}
    with output_errors(folder / KERNELS):
        (folder / KERNELS).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def head_variants(k: int) -> list[Variant]:
    """The specialisations of the kernel that a head of K components is launched as, fewest rows a program first."""
    from longclip_rt.kernels.aot import Variant
    from longclip_rt.kernels.pca_head import HALF_CONFIGS

    constants = {"WIDE": False, "WIDE_DOT": False, "NORMALIZE": True, "WITH_EMBEDDING": False}
    return [
        Variant("pca_head", "one-tile" if k <= config.columns else "many-tiles", "fp16", config,
                {**constants, "ONE_TILE": k <= config.columns})
        for config in sorted(HALF_CONFIGS, key=lambda config: config.rows)
    ]  # fmt: skip


def _compiled(k: int, architectures: Sequence[int]) -> Iterator[tuple[Compiled, int]]:
    from longclip_rt.errors import KernelError
    from longclip_rt.kernels.aot import compile_kernels, failed_gates

    variants = head_variants(k)
    rows = {variant.config.name: variant.config.rows for variant in variants}
    fitting = set()
    for compiled in compile_kernels(architectures, variants):
        if failures := failed_gates(compiled):
            raise KernelError(f"{'; '.join(failures)}. Another version of triton may help.")
        if compiled.shared <= LARGEST_SHARED:  # on sm_100 that of many rows is larger, and that of few serves all
            fitting.add(compiled.arch)
            yield compiled, rows[compiled.config]
    if left := sorted(set(architectures) - fitting):
        raise KernelError(f"The PCA head needs more than {LARGEST_SHARED >> 10} KiB of shared memory on sm_{left[0]}.")


def write_plugin_graphs(bundle: Bundle, arch: int) -> None:
    """Writes both towers' fp16 graphs once more, with `longclip::pca_head` in the place of the head's operators.

    Args:
        bundle: In the making, with the head in it; its manifest is to be written anew.
        arch: An architecture that the head was compiled for.

    Raises:
        OutputError: The folder cannot be written.
    """
    import onnx

    for tower in INPUT_NAMES:
        # Weights beside the fp16 graph are this one's too: it names the same file.
        model = onnx.load(str(bundle.onnx(tower, "fp16")), load_external_data=False)
        head = load_head(bundle.path, tower, arch)
        assert head is not None
        with_head_plugin(model, tower, head)
        file = bundle.file(plugin_graph_name(tower))
        with output_errors(file):
            file.write_bytes(model.SerializeToString())


def head_from_states(head: HeadFiles, states: NDArray[np.float16]) -> Float32:
    """What the kernel computes, in float64 on the CPU from the very weights it is given.

    Args:
        head: The weights.
        states: Pooled states before the final LayerNorm, [B, W].

    Returns:
        [B, K] float32, of length 1.
    """
    x = states.astype(np.float64)
    x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + head.eps)
    both = x @ head.weight.astype(np.float64) + head.bias
    start = both.shape[1] - len(head.shift)
    length = np.maximum(np.linalg.norm(both[:, : head.dim], axis=1, keepdims=True), head.floor)
    reduced = both[:, start : start + head.k] / length - head.shift[: head.k]
    result: Float32 = (reduced / np.maximum(np.linalg.norm(reduced, axis=1, keepdims=True), EPS)).astype(np.float32)
    return result


def head_checks(bundle: Bundle, sample: Sample, reference: Reference, arch: int) -> Iterator[Check]:
    """Holds the head's files and the graph that feeds them against the torch towers' PCA.

    Args:
        bundle: With the head in it.
        sample: The inputs.
        reference: What the towers gave, with the PCA.
        arch: An architecture that the kernel was compiled for.

    Yields:
        One check a tower.
    """
    import onnx
    import onnxruntime

    context = bundle.architecture.context_length
    for tower, inputs in (("text", pad_tokens(sample.tokens, context)), ("image", sample.pixels)):
        model = onnx.load(str(bundle.onnx(tower, "fp16")))
        with_head_states(model, tower)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        names = [states_name(tower)]
        states = [
            session.run(names, {INPUT_NAMES[tower]: inputs[start : start + 8]})[0] for start in range(0, len(inputs), 8)
        ]
        head = load_head(bundle.path, tower, arch)
        assert head is not None
        got, name = head_from_states(head, np.concatenate(states)), pca_name(tower)
        cosines = (got.astype(np.float64) * reference.outputs[tower][name]).sum(axis=1)
        limit = min(LIMITS["fp16"].bound / reference.spans.get(name, 1.0) ** 2, LOOSEST)
        yield Check(NAME, "fp16", tower, f"{name}: 1 - cosine", float(1 - cosines.min()), limit)
