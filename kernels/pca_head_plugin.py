"""The PCA head as a TensorRT plug-in launches it: inputs, then the number of rows, then the output.

TensorRT passes pointers to the inputs, 32-bit integers that follow from shapes, and pointers to the outputs, in this
order and nothing else. So everything that the head's own kernel takes beside these is fixed at compile time here.
"""

from __future__ import annotations

import re
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longclip_rt.errors import KernelError
from longclip_rt.kernels.launch import KernelConfig, interpreted
from longclip_rt.kernels.pca_head import HALF_CONFIGS, _pca_head_kernel

PTX_VERSION = 87
"""Of the code that an engine carries: 8.7 has all architectures from sm_80 to sm_120, and drivers of CUDA 13 take it.
Left alone, Triton 3.9 writes 9.4 for sm_90 and newer, which the driver of CUDA 13.0 (580) refuses."""

PARAMETERS = ("u64", "u64", "u64", "u64", "u32", "u64")
"""PTX types of what TensorRT passes: states, weight, bias, shift; rows; reduced."""


@triton.jit
def _pca_head_plugin_kernel(  # type: ignore[no-untyped-def]
    states, weight, bias, shift, rows, reduced,
    WIDTH: tl.constexpr, DIM: tl.constexpr, K: tl.constexpr, K_START: tl.constexpr, COLUMNS: tl.constexpr,
    EPS: tl.constexpr, FLOOR: tl.constexpr, ONE_TILE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """states [rows, WIDTH] and weight [WIDTH, COLUMNS] float16; bias [COLUMNS], shift, reduced [rows, K] float32."""
    _pca_head_kernel(
        states, weight, bias, shift, reduced, reduced,
        rows, WIDTH, DIM, K, K_START, WIDTH, 1, COLUMNS, EPS, FLOOR,
        False, False, False, True, ONE_TILE, BLOCK_B, BLOCK_N, BLOCK_W,
    )  # fmt: skip


def plugin_constants(
    width: int, columns: int, shift: int, dim: int, k: int, eps: float, floor: float, config: KernelConfig
) -> dict[str, Any]:
    """The compile-time arguments of one head.

    Args:
        width: W of the states.
        columns: D' + K' of the weight.
        shift: K', the padded length of the shift.
        dim: D.
        k: K.
        eps: LayerNorm's.
        floor: The least length that the scaled embedding is divided by.
        config: How the work is cut.
    """
    return {
        "WIDTH": width, "DIM": dim, "K": k, "K_START": columns - shift, "COLUMNS": columns, "EPS": eps, "FLOOR": floor,
        "ONE_TILE": k <= config.columns, "BLOCK_B": config.rows, "BLOCK_N": config.columns, "BLOCK_W": config.inner,
    }  # fmt: skip


def plugin_configs() -> list[KernelConfig]:
    """Those to choose from, many rows first: an engine holds one kernel for all batches."""
    return sorted(HALF_CONFIGS, key=lambda config: -config.rows)


def compile_plugin(constants: dict[str, Any], config: KernelConfig, arch: int) -> tuple[str, str, int, int]:
    """Compiles the kernel for one head and one architecture.

    Args:
        constants: From `plugin_constants`.
        config: The same configuration.
        arch: Compute capability times ten.

    Returns:
        The entry's name, its PTX with the parameters that TensorRT passes and no other, bytes of shared memory, and
        threads of a program.

    Raises:
        KernelError: Triton cannot compile it, or was told to interpret; or the entry wants what TensorRT cannot pass.
    """
    if interpreted(_pca_head_plugin_kernel):
        raise KernelError("TRITON_INTERPRET is set, so Triton interprets the kernels. Unset it to compile them.")
    signature = {"states": "*fp16", "weight": "*fp16", "bias": "*fp32", "shift": "*fp32", "rows": "i32"}
    signature |= {"reduced": "*fp32"} | dict.fromkeys(constants, "constexpr")
    attributes = {(index,): [["tt.divisibility", 16]] for index in (0, 1, 2, 3, 5)}
    source = ASTSource(_pca_head_plugin_kernel, signature, constants, attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages, "ptx_version": PTX_VERSION}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # Triton's errors, ptxas's and LLVM's share no narrower class
        raise KernelError(f"The PCA head's plug-in does not compile for sm_{arch}: {error}") from error
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise KernelError("The PCA head's plug-in needs scratch memory, which TensorRT does not give it.")
    ptx = without_hidden_parameters(compiled.asm["ptx"], len(PARAMETERS))
    return metadata.name, ptx, metadata.shared, 32 * config.warps


def without_hidden_parameters(ptx: str, wanted: int) -> str:
    """Takes the parameters out of a PTX entry that Triton appends for its own use.

    TensorRT launches with as many arguments as it knows of, so an entry must not declare more.

    Args:
        ptx: The code, with one entry.
        wanted: How many parameters it is to keep.

    Raises:
        KernelError: One to be taken out is used, or there are fewer.
    """
    entry = re.search(r"(\.entry \w+\()(.*?)(\n?\))", ptx, re.S)
    if entry is None:
        raise KernelError("The compiled code has no entry.")
    parameters = re.findall(r"\.param [^,\n]+", entry[2])
    names = [parameter.split()[-1] for parameter in parameters]
    body = ptx[entry.end() :]
    used = [name for name in names[wanted:] if re.search(rf"\b{name}\b", body)]
    if len(parameters) < wanted or used:
        raise KernelError(f"The entry has {len(parameters)} parameters and uses {used}; TensorRT passes {wanted}.")
    kept = "\n\t" + ",\n\t".join(parameters[:wanted])
    return ptx[: entry.start()] + entry[1] + kept + entry[3] + body
