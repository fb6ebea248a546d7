"""The PCA head beside an engine: its weights, the machine code that was compiled ahead of time, and its launch.

The engine hands out the pooled states before the final LayerNorm; the kernel makes the PCA of the embeddings of them in
one launch. Neither Triton nor torch is needed: the code lies in the bundle, and beside the plan.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.errors import BackendError
from longclip_rt.system.files import output_errors, write_text_atomically
from longclip_rt.tensorrt.device import Gpu, Launch

KERNELS = "pca_head.json"
"""What a launch needs to know of each cubin beside it, and which PCA the head is of."""

HEAD_KERNEL, HEAD_PLUGIN, HEAD_OPERATORS = "kernel", "plugin", "operators"
HEADS = {
    HEAD_KERNEL: "a kernel behind the engine, on its stream and in its CUDA graphs",
    HEAD_PLUGIN: "the plug-in longclip::pca_head in the engine",
    HEAD_OPERATORS: "operators of the graph; vectors are reduced in float64 on the CPU instead",
}
"""What computes the PCA of an engine's embeddings, as its key names it, and in words."""

FORMAT_VERSION = 1
WARP = 32
# More needs an attribute of the kernel that cuda.core cannot set; the head's configurations stay below.
LARGEST_SHARED = 48 << 10
# From so many rows on, programs of many rows are enough to fill a GPU, and read the weights less often.
_MANY_ROWS = 2048

PARAMETERS = (
    ("pooled", "u64"), ("weight", "u64"), ("bias", "u64"), ("shift", "u64"), ("embedding", "u64"), ("reduced", "u64"),
    ("total_rows", "u32"), ("width", "u32"), ("dim", "u32"), ("k", "u32"), ("k_start", "u32"), ("stride_row", "u32"),
    ("stride_weight", "u32"), ("eps", "f32"), ("floor", "f32"), ("global_scratch", "u64"), ("profile_scratch", "u64"),
)  # fmt: skip
"""The entry's parameters in order, with their PTX types; the last two are Triton's own, unused by this kernel."""


def states_name(tower: str) -> str:
    """The engine's output that the kernel reads: pooled states before the final LayerNorm, [B, W] float16."""
    return f"{tower}_head_states"


def pca_name(tower: str) -> str:
    """What the kernel writes: [B, K] float32, of length 1."""
    return f"{tower}_pca"


def weights_file(tower: str) -> str:
    """The file of a tower's weights."""
    return f"{tower}.head.safetensors"


def plugin_graph_name(tower: str) -> str:
    """The file of a tower's fp16 graph with the plug-in in it, which only TensorRT reads."""
    return f"{tower}.fp16.plugin.onnx"


@dataclass(frozen=True)
class Code:
    """One compiled configuration of the kernel.

    Attributes:
        file: The cubin's name.
        arch: Compute capability times ten that it runs on.
        entry: The function's name.
        rows: Rows that one program handles.
        warps: Of a program.
        shared: Bytes of its shared memory.
        scratch: Bytes of scratch memory that a launch would have to give it; must be 0.
    """

    file: str
    arch: int
    entry: str
    rows: int
    warps: int
    shared: int
    scratch: int = 0


@dataclass(frozen=True, eq=False)
class HeadFiles:
    """A tower's head as read from a folder.

    Attributes:
        weight: [W, D' + K'] float16, D' and K' padded.
        bias: [D' + K'] float32.
        shift: [K'] float32.
        dim: D.
        k: K.
        eps: LayerNorm's.
        floor: The least length that the scaled embedding is divided by.
        pca: SHA-256 of the PCA.
        codes: For this GPU, fewest rows a program first.
        folder: Where the cubins are.
    """

    weight: NDArray[np.float16]
    bias: NDArray[np.float32]
    shift: NDArray[np.float32]
    dim: int
    k: int
    eps: float
    floor: float
    pca: str
    codes: tuple[Code, ...]
    folder: Path

    @property
    def width(self) -> int:
        """W."""
        return int(self.weight.shape[0])

    def code_for(self, rows: int) -> Code:
        """The configuration for a batch."""
        return self.codes[-1] if rows >= _MANY_ROWS else self.codes[0]

    def scalars(self, rows: int) -> list[np.int32 | np.float32]:
        """The arguments between the pointers, in the order of `PARAMETERS`."""
        columns = int(self.weight.shape[1])
        numbers = (rows, self.width, self.dim, self.k, columns - len(self.shift), self.width, columns)
        return [*(np.int32(number) for number in numbers), np.float32(self.eps), np.float32(self.floor)]


def load_head(folder: Path, tower: str, arch: int) -> HeadFiles | None:
    """Reads a tower's head for a GPU; None where the folder has none.

    Args:
        folder: Of the engine, or of the bundle.
        tower: `text` or `image`.
        arch: Compute capability times ten.

    Raises:
        BackendError: It is damaged, or was not compiled for this GPU.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not (folder / KERNELS).is_file():
        return None
    again = "Export the bundle again with --pca, then: longclip-rt engine build"
    try:
        about = json.loads((folder / KERNELS).read_text(encoding="utf-8"))
        if about["format"] > FORMAT_VERSION:
            raise BackendError(f"{folder / KERNELS} is of a newer version. Update with: pip install -U longclip-rt")
        found = [Code(**fields) for fields in about["codes"]]
        arrays = load_file(folder / weights_file(tower))
        codes = tuple(sorted((code for code in found if code.arch == arch), key=lambda code: code.rows))
        numbers = about["towers"][tower]
        head = HeadFiles(
            arrays["weight"], arrays["bias"], arrays["shift"], int(numbers["dim"]), int(numbers["k"]),
            float(numbers["eps"]), float(numbers["floor"]), str(about["pca"]), codes, folder,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BackendError(f"The PCA head in {folder} cannot be read: {error}. {again}") from error
    if not codes:
        compiled = ", ".join(f"sm_{each}" for each in sorted({code.arch for code in found}))
        raise BackendError(
            f"The PCA head in {folder} was compiled for {compiled or 'no GPU'}, and this GPU is sm_{arch}. {again}"
        )
    for code in codes:
        if code.scratch or code.shared > LARGEST_SHARED or not (folder / code.file).is_file():
            raise BackendError(
                f"The kernel {code.file} in {folder} is absent, or needs scratch memory or more than "
                f"{LARGEST_SHARED >> 10} KiB of shared memory. {again}"
            )
    return head


def head_archs(folder: Path) -> tuple[int, ...]:
    """Compute capabilities times ten that a folder's head was compiled for; none where it has no head.

    Raises:
        BackendError: The head is damaged.
    """
    if not (folder / KERNELS).is_file():
        return ()
    try:
        codes = json.loads((folder / KERNELS).read_text(encoding="utf-8"))["codes"]
        return tuple(sorted({int(code["arch"]) for code in codes}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendError(f"The PCA head in {folder} cannot be read: {error}. Export the bundle again.") from error


def copy_head(source: Path, target: Path, archs: Collection[int]) -> bool:
    """Puts the head beside an engine that hands out its states: the weights, and the code for the engine's cards.

    Args:
        source: The bundle's folder.
        target: The engine's folder.
        archs: Compute capabilities times ten.

    Returns:
        Whether there is a head for all of them; if not, nothing is copied, and the engine keeps the PCA's operators.

    Raises:
        BackendError: The bundle's head is damaged.
        OutputError: The folder cannot be written.
    """
    if not (source / KERNELS).is_file():
        return False
    try:
        about = json.loads((source / KERNELS).read_text(encoding="utf-8"))
        codes = [code for code in about["codes"] if code["arch"] in archs]
        names = [*(str(code["file"]) for code in codes), *(weights_file(tower) for tower in about["towers"])]
        if {code["arch"] for code in codes} != set(archs):
            return False
        contents = {name: (source / name).read_bytes() for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendError(f"The PCA head in {source} cannot be read: {error}. Export the bundle again.") from error
    with output_errors(target):
        for name, content in contents.items():
            (target / name).write_bytes(content)
    write_text_atomically(target / KERNELS, json.dumps({**about, "codes": codes}, indent=1) + "\n")
    return True


class HeadKernel:
    """A head on a GPU.

    Args:
        files: What `load_head` gave for this GPU.
        gpu: It.
        stream: What the copies of the weights are enqueued on.
    """

    def __init__(self, files: HeadFiles, gpu: Gpu, stream: Any) -> None:
        self.files = files
        self._gpu = gpu
        self._kernels = {code: gpu.kernel((files.folder / code.file).read_bytes(), code.entry) for code in files.codes}
        self._weights = [gpu.upload(array, stream) for array in (files.weight, files.bias, files.shift)]

    def launch(self, stream: Any, states: Any, reduced: Any, rows: int) -> None:
        """Enqueues the head.

        Args:
            stream: What it is put on.
            states: Buffer of pooled states [rows, W] float16.
            reduced: Buffer for the result [rows, K] float32.
            rows: B.
        """
        code = self.files.code_for(rows)
        # The kernel was compiled without its embedding output, and gets another address for it, as in the wrapper.
        pointers: Sequence[Any] = (states, *self._weights, reduced, reduced)
        arguments = [*pointers, *self.files.scalars(rows), 0, 0]
        launch = Launch(-(-rows // code.rows), WARP * code.warps, code.shared)
        self._gpu.launch(stream, self._kernels[code], launch, arguments)

    def close(self, stream: Any) -> None:
        """Lets go of its memory."""
        for buffer in self._weights:
            buffer.close(stream)
        self._weights = []
        self._kernels = {}
