"""The PCA head inside an engine: `longclip::pca_head` for TensorRT's quickly deployable plug-ins.

An option (`export --pca-in-engine`). By default the same kernel is launched after the engine on the same stream, since
plug-ins with changing shapes leak device memory in some versions (NVIDIA/TensorRT#4849, open for 11.1 and 11.2).

The engine's build and run must both have called `register_pca_head`. With both implementations there, a network that
uses the plug-in is created with `NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS`.
"""

# No postponed annotations in this file: TensorRT reads those of the functions below, as objects.

from typing import Any

from longclip_rt.backends.head_kernel import LARGEST_SHARED
from longclip_rt.errors import KernelError
from longclip_rt.export.head_graph import PLUGIN_NAME, PLUGIN_NAMESPACE

PLUGIN = f"{PLUGIN_NAMESPACE}::{PLUGIN_NAME}"
"""The name in TensorRT's registry."""


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
