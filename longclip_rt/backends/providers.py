"""ONNX Runtime's execution providers: which one a backend wants, with which options, and whether it was really had.

ONNX Runtime answers a provider that it cannot load with the CPU, and says so in its log only. A provider may also leave
single nodes to the CPU. Both make an encoder many times slower, so both are errors here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from longclip_rt.errors import BackendError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

PROVIDERS = {"onnxruntime": CPU, "onnxruntime-cuda": CUDA}
"""Backend -> the provider that must run its encoders. There is none for TensorRT: ONNX Runtime 1.31's links TensorRT
10, and the engines here are TensorRT 11's."""

NO_GPU = ("there is no NVIDIA GPU with a driver here", "nvidia-smi")
"""Why a backend for GPUs cannot be used, and what shows more."""

RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
"""ONNX Runtime's setting that lets `get_provider_graph_assignment_info` tell which provider got which node."""

# What ONNX Runtime places on the CPU on purpose, beside a GPU: arithmetic on shapes, a few integers at a time.
_SHAPE_OPERATORS = frozenset({
    "Add", "Cast", "Concat", "ConstantOfShape", "Constant", "Div", "Equal", "Expand", "Gather", "Identity", "Mul",
    "Range", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where", "Min", "Max", "Less",
})  # fmt: skip


@dataclass(frozen=True)
class Assignment:
    """One node of a loaded graph, and the provider that got it.

    Attributes:
        provider: Its name.
        operator: The node's operator, such as `MatMul`.
    """

    provider: str
    operator: str


def provider_settings(backend: str, device: int) -> list[tuple[str, dict[str, int]]]:
    """What a session is opened with: its provider and that one's options.

    Args:
        backend: One of `PROVIDERS`.
        device: The GPU's number.
    """
    if backend == "onnxruntime":
        return [(CPU, {})]
    # fp32 is fp32: the provider would multiply with 10 bits (TF32) where the card can.
    return [(CUDA, {"device_id": device, "use_tf32": 0})]


def unavailable(backend: str, available: Sequence[str], gpus: int) -> tuple[str, str] | None:
    """Why a backend's provider cannot be had, and the command that mends it; None where it seems to be there.

    Args:
        backend: One of `PROVIDERS`.
        available: What `onnxruntime.get_available_providers` gave: compiled in, not necessarily able to load.
        gpus: How many NVIDIA GPUs with a driver there are.
    """
    provider = PROVIDERS[backend]
    if provider not in available:
        if _installed("onnxruntime-gpu") and _installed("onnxruntime"):
            return (
                "the packages onnxruntime and onnxruntime-gpu overwrite each other, and the one without GPUs won",
                'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "longclip-rt[gpu]"',
            )
        return (
            f"the installed onnxruntime has no {provider}",
            'pip uninstall -y onnxruntime && pip install "longclip-rt[gpu]"',
        )
    if provider != CPU and not gpus:
        return NO_GPU
    return None


def _installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


def check_provider(backend: str, given: Sequence[str]) -> None:
    """Refuses a session whose provider ONNX Runtime dropped.

    Args:
        backend: One of `PROVIDERS`.
        given: What the session's `get_providers` gave, in the order of preference.

    Raises:
        BackendError: The first one is not the backend's.
    """
    wanted = PROVIDERS[backend]
    if not given or given[0] != wanted:
        raise BackendError(
            f"ONNX Runtime dropped {wanted} and would run on {', '.join(given) or 'nothing'}. Its log above says which "
            "library it could not load: it needs CUDA and cuDNN in the versions that it was built for. Mend that, or "
            "choose another --backend; what can be used is listed by: longclip-rt info"
        )


def check_assignment(backend: str, assignments: Iterable[Assignment]) -> None:
    """Refuses a session that would compute a part of the encoder on the CPU.

    Args:
        backend: One of `PROVIDERS`.
        assignments: Of every node of the loaded graph.

    Raises:
        BackendError: A node other than the arithmetic on shapes is on the CPU; the message names the operators.
    """
    nodes = list(assignments)
    left = Counter(node.operator for node in nodes if node.provider == CPU and node.operator not in _SHAPE_OPERATORS)
    if left or not nodes:
        which = ", ".join(f"{count} {operator}" for operator, count in sorted(left.items())) or "all nodes, it seems"
        raise BackendError(
            f"ONNX Runtime left a part of the encoder on the CPU ({which}): this version has no GPU kernel for it. "
            "Take a newer one (pip install -U onnxruntime-gpu), or another --backend."
        )
