"""The PCA head inside an engine: `longclip::pca_head` for TensorRT's quickly deployable plug-ins.

An option (`export --pca-in-engine`). By default the same kernel is launched after the engine on the same stream, since
plug-ins with changing shapes leak device memory in some versions (NVIDIA/TensorRT#4849, open for 11.1 and 11.2).

A build must have called `register_pca_head`, and creates its network with PREFER_AOT_PYTHON_PLUGINS, since both
implementations are there. What was compiled ahead of time is then a part of the plan, and running it needs neither the
registration nor Triton.
"""

# No postponed annotations in this file: TensorRT reads those of the functions below, as objects.

import importlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from longclip_rt.errors import EngineError, KernelError
from longclip_rt.export.tensorrt.head_graph import PLUGIN_NAME, PLUGIN_NAMESPACE
from longclip_rt.system.extras import require
from longclip_rt.system.files import sha256_of_file, sha256_of_json
from longclip_rt.tensorrt.head import LARGEST_SHARED

PLUGIN = f"{PLUGIN_NAMESPACE}::{PLUGIN_NAME}"
"""The name in TensorRT's registry."""

# TensorRT's registry is one for the whole process: package -> the architecture that it compiles the plug-in for.
_registered: dict[str, int] = {}


def ensure_pca_head(library: Any, arch: int) -> None:
    """Registers the plug-in, unless this process did so before.

    Args:
        library: `tensorrt`, imported.
        arch: Compute capability times ten of the GPU that engines are built for.

    Raises:
        EngineError: The library has no plug-ins in Python, or this process builds for another GPU already.
        MissingExtraError: Triton or torch is not installed, which compile the plug-in.
    """
    package = str(library.__name__)
    if package in _registered:
        if _registered[package] != arch:
            raise EngineError(
                f"This process compiles the plug-in {PLUGIN} for sm_{_registered[package]}, and cannot for sm_{arch} "
                "too. Build each GPU's engines in a process of its own."
            )
        return
    for module in ("torch", "triton"):
        require(module, "export")
    try:
        plugins = importlib.import_module(f"{package}.plugin")
    except ImportError as error:
        raise EngineError(
            f"{package} {library.__version__} has no plug-ins in Python ({error}). Export the bundle without "
            "--pca-in-engine."
        ) from error
    register_pca_head(library, plugins, arch)
    _registered[package] = arch


def compiled_by() -> str:
    """What the plug-in's code is made of and by: Triton's version, and a hash of the sources; for an engine's key."""
    here = Path(__file__).parent
    sources = (here / "plugin.py", *(here.parent / "kernels" / name for name in ("pca_head.py", "pca_head_plugin.py")))
    digest = sha256_of_json([sha256_of_file(source) for source in sources])[:12]
    try:
        return f"triton {version('triton')}, {digest}"
    except PackageNotFoundError:
        return f"no triton, {digest}"


def register_pca_head(library: Any, plugins: Any, arch: int) -> None:
    """Registers the plug-in: its description, its code compiled ahead of time, and its Python callback.

    Args:
        library: `tensorrt`, imported.
        plugins: `tensorrt.plugin`, imported.
        arch: Compute capability times ten of the GPU that the engine is for.

    Raises:
        ValueError: TensorRT finds fault with a signature, or the plug-in is registered already.
    """

    @plugins.register(PLUGIN)
    def describe(
        states: plugins.TensorDesc,
        weight: plugins.TensorDesc,
        bias: plugins.TensorDesc,
        shift: plugins.TensorDesc,
        dim: int,
        k: int,
        eps: float,
        floor: float,
    ) -> plugins.TensorDesc:
        """States [B, W] float16 and the weights of `HeadFiles` to [B, K] float32."""
        return plugins.from_shape_expr((states.shape_expr[0], k), library.float32)

    @plugins.aot_impl(PLUGIN)
    def compiled(
        states: plugins.TensorDesc,
        weight: plugins.TensorDesc,
        bias: plugins.TensorDesc,
        shift: plugins.TensorDesc,
        dim: int,
        k: int,
        eps: float,
        floor: float,
        outputs: tuple[plugins.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, plugins.KernelLaunchParams, plugins.SymExprs]:
        """The kernel's name, its PTX, its launch and its one scalar: the rows."""
        from longclip_rt.kernels.pca_head_plugin import compile_plugin, plugin_configs, plugin_constants

        width, columns = weight.shape
        for config in plugin_configs():
            constants = plugin_constants(width, columns, shift.shape[0], dim, k, eps, floor, config)
            name, ptx, shared, threads = compile_plugin(constants, config, arch)
            if shared <= LARGEST_SHARED:
                break
        else:
            raise KernelError(f"The PCA head's plug-in needs {shared} bytes of shared memory on sm_{arch}: too much.")
        launch = plugins.KernelLaunchParams()
        launch.grid_x = plugins.cdiv(states.shape_expr[0], config.rows)
        launch.block_x = threads
        launch.shared_mem = shared
        scalars = plugins.SymIntExprs(1)
        scalars[0] = plugins.SymInt32(states.shape_expr[0])
        return name, ptx, launch, scalars

    @plugins.impl(PLUGIN)
    def callback(
        states: plugins.Tensor,
        weight: plugins.Tensor,
        bias: plugins.Tensor,
        shift: plugins.Tensor,
        dim: int,
        k: int,
        eps: float,
        floor: float,
        outputs: tuple[plugins.Tensor],
        stream: int,
    ) -> None:
        """Launches the same kernel through torch and Triton, on TensorRT's stream."""
        import torch

        given = (states, weight, bias, shift, outputs[0])
        tensors = [torch.as_tensor(tensor, device="cuda") for tensor in given]
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):  # type: ignore[no-untyped-call]
            launch_callback(tensors, dim, k, eps, floor)


def launch_callback(tensors: Any, dim: int, k: int, eps: float, floor: float) -> None:
    """Launches the plug-in's kernel on torch's current stream.

    Args:
        tensors: States [B, W] and weight [W, D' + K'] float16; bias [D' + K'], shift [K'] and the output [B, K]
            float32.
        dim: D.
        k: K.
        eps: LayerNorm's.
        floor: The least length that the scaled embedding is divided by.
    """
    from longclip_rt.kernels.pca_head_plugin import _pca_head_plugin_kernel, plugin_configs, plugin_constants

    states, weight, bias, shift, reduced = tensors
    config = plugin_configs()[0]
    constants = plugin_constants(weight.shape[0], weight.shape[1], len(shift), dim, k, eps, floor, config)
    rows = states.shape[0]
    _pca_head_plugin_kernel[(-(-rows // config.rows),)](
        states, weight, bias, shift, rows, reduced, **constants, num_warps=config.warps, num_stages=config.stages
    )
