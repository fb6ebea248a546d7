"""Backends: which there are, which are usable here, and which one `auto` picks."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

from longclip_rt.backends.base import Backend
from longclip_rt.bundle.bundle import Bundle
from longclip_rt.choices import BACKENDS, GPU_BACKENDS, PRECISIONS
from longclip_rt.errors import BackendError, LongClipError, MissingExtraError
from longclip_rt.system import machine

logger = logging.getLogger("longclip_rt")

AUTO_ORDER = ("tensorrt", "tensorrt-rtx", "torch", "onnxruntime-cuda", "openvino", "onnxruntime")
"""What `auto` tries, in this order; `torch` on a GPU alone, where it was faster than ONNX Runtime at every size tried
(docs/gpu.md), and not on a CPU, where it is slower than the others."""

_NEEDED = {
    "tensorrt": ("tensorrt", "cuda.core"),
    "tensorrt-rtx": ("tensorrt_rtx", "cuda.core"),
    "onnxruntime-cuda": ("onnxruntime",),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime",),
    "torch": ("torch", "open_clip"),
}
_REMEDIES = {
    "tensorrt": 'pip install "longclip-rt[gpu,tensorrt]"',
    "tensorrt-rtx": 'pip install "longclip-rt[gpu,rtx]"',
    "onnxruntime-cuda": 'pip install "longclip-rt[gpu]"',
    "openvino": 'pip install "longclip-rt"',
    "onnxruntime": 'pip install "longclip-rt[cpu]"',
    "torch": 'pip install "longclip-rt[export]"',
}


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used on this machine.

    Attributes:
        name: The backend.
        usable: Whether it can, as far as can be told without a model.
        precisions: What it computes in here, the one that `auto` picks first; empty where it is not usable.
        reason: Why not, in words; empty where it is usable.
        remedy: The command that mends it; empty where it is usable.
    """

    name: str
    usable: bool
    precisions: tuple[str, ...] = ()
    reason: str = ""
    remedy: str = ""


def availability(name: str) -> Availability:
    """Says whether a backend can be used here, by looking for its libraries and for GPUs (and by asking OpenVINO).

    Args:
        name: One of `BACKENDS`.
    """
    remedy = _REMEDIES[name]
    for module in _NEEDED[name]:
        if not _found(module):
            return Availability(name, False, reason=f"the Python package {module} is not installed", remedy=remedy)
    if name == "openvino":
        from longclip_rt.backends.openvino import openvino_precisions

        try:
            return Availability(name, True, tuple(openvino_precisions()))
        except (ImportError, RuntimeError) as error:
            return Availability(name, False, reason=str(error), remedy=f"{remedy.replace('install', 'install -U')}")
    if name in GPU_BACKENDS:
        from longclip_rt.backends.providers import NO_GPU, unavailable

        if name.startswith("tensorrt"):
            why = _not_importable(name) if machine.cuda_devices() else NO_GPU
        else:
            import onnxruntime

            why = unavailable(name, onnxruntime.get_available_providers(), len(machine.cuda_devices()))
        if why is not None:
            return Availability(name, False, reason=why[0], remedy=why[1])
        return Availability(name, True, ("fp16", "fp32"))
    return Availability(name, True, ("fp32", "fp16") if name == "onnxruntime" else PRECISIONS)


def _not_importable(name: str) -> tuple[str, str] | None:
    """Why TensorRT, which is installed, does not import here or is too old, and the command that mends it."""
    from longclip_rt.tensorrt.engines import import_library

    try:
        import_library(name)
    except BackendError as error:
        return str(error).partition(" Install it with")[0].rstrip("."), _REMEDIES[name].replace("install", "install -U")
    return None


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ValueError, ModuleNotFoundError):  # loaded without a spec, or marked as absent; or its parent is not there
        return False


def open_backend(
    bundle: Bundle, backend: str = "auto", precision: str = "auto", devices: Sequence[int] | None = None
) -> Backend:
    """Opens a bundle with a backend.

    `auto` takes the first usable one of `AUTO_ORDER` that offers the precision; `auto` precision takes the fastest that
    the backend offers here: fp16 on a GPU where the bundle has the graphs, bf16 with OpenVINO on a CPU that computes in
    it, else fp32. A backend on a GPU loads the model and checks itself before it is taken. What was picked is logged
    once, at INFO; why not those above it, at INFO where a GPU is there and is not used, else at DEBUG.

    Args:
        bundle: The model.
        backend: `auto` or one of `BACKENDS`.
        precision: `auto` or one of `PRECISIONS`.
        devices: Numbers of the GPUs to run on, all at once; None: the first one, or the CPU.

    Raises:
        BackendError: What was asked for cannot be had. A backend, precision or device asked for by name is never
            replaced.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(f"There is no backend {backend!r}; there are auto, {', '.join(BACKENDS)}.")
    if precision != "auto" and precision not in PRECISIONS:
        raise BackendError(f"There is no precision {precision!r}; there are auto, {', '.join(PRECISIONS)}.")
    if devices is not None:
        devices = _checked_devices(devices)
    passed_over: list[str] = []
    for name in AUTO_ORDER if backend == "auto" else (backend,):
        state = availability(name)
        offered = [
            each for each in state.precisions if not _reads_fp16(name) or each != "fp16" or "fp16" in bundle.precisions
        ]
        if devices is not None and not runs_on_gpu(name):
            passed_over.append(f"{name} runs on the CPU, and GPUs were asked for")
        elif backend == "auto" and name == "torch" and not (state.usable and runs_on_gpu(name)):
            passed_over.append("torch sees no GPU, and is slower than the others on a CPU")
        elif not state.usable:
            passed_over.append(f"{name}: {state.reason}; mend it with: {state.remedy}")
        elif precision != "auto" and precision not in state.precisions:
            passed_over.append(f"{name} does not compute in {precision} here, only in {', '.join(state.precisions)}")
        elif precision != "auto" and precision not in offered:
            passed_over.append(f"{name}: {bundle.path} was exported without --fp16")
        else:
            chosen = precision
            if precision == "auto":
                chosen = offered[0]
                if name == "torch" and runs_on_gpu(name) and "fp16" in bundle.precisions:  # the gate has passed it
                    chosen = "fp16"
            try:
                opened = _opened(bundle, name, chosen, devices)
            except (BackendError, MissingExtraError) as error:
                if backend != "auto" or not runs_on_gpu(name):
                    raise
                passed_over.append(f"{name}: {error}")
                continue
            logger.info("%s %s in %s on %s", opened.name, opened.version, opened.precision, opened.device)
            if passed_over:  # of interest where there is a GPU that is not used
                level = logging.INFO if name not in GPU_BACKENDS and machine.cuda_devices() else logging.DEBUG
                logger.log(level, "passed over: %s", "; ".join(passed_over))
            return opened
    wanted = "No backend can" if backend == "auto" else f"The backend {backend} cannot"
    raise BackendError(
        f"{wanted} be used{'' if precision == 'auto' else f' in {precision}'}: {'. '.join(passed_over)}. "
        "What is there is listed by: longclip-rt info"
    )


def _checked_devices(devices: Iterable[SupportsIndex]) -> list[int]:
    try:
        numbers = [operator.index(each) for each in devices]
    except TypeError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise BackendError(f"Devices are numbers of GPUs from 0, each once, such as [0, 1]; got {devices!r}.")
    return numbers


def _reads_fp16(name: str) -> bool:
    """Whether fp16 takes an fp16 graph; the others lower the fp32 one themselves."""
    return name == "onnxruntime" or name in GPU_BACKENDS


def runs_on_gpu(name: str) -> bool:
    """Whether a backend runs on a GPU here; PyTorch does where it was built for CUDA and sees one."""
    if name != "torch" or not machine.cuda_devices():
        return name in GPU_BACKENDS
    import torch

    return bool(torch.cuda.is_available())


def _opened(bundle: Bundle, name: str, precision: str, devices: Sequence[int] | None) -> Backend:
    if runs_on_gpu(name):
        return _on_gpus(_gpu_backend(name), bundle, precision, devices or (0,))
    backend = _cpu_backend(name)(bundle, precision)
    backend.prepare()
    return backend


def _cpu_backend(name: str) -> Callable[[Bundle, str], Backend]:
    if name == "openvino":
        from longclip_rt.backends.openvino import OpenVinoBackend

        return OpenVinoBackend
    if name == "onnxruntime":
        from longclip_rt.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend
    from longclip_rt.backends.torch import TorchBackend

    return TorchBackend


def _gpu_backend(name: str) -> Callable[[Bundle, str, int], Backend]:
    if name.startswith("tensorrt"):
        from longclip_rt.tensorrt import backend as tensorrt

        return tensorrt.TensorrtBackend if name == "tensorrt" else tensorrt.TensorrtRtxBackend
    if name == "torch":
        from longclip_rt.backends.torch import TorchBackend

        return TorchBackend
    from longclip_rt.backends.onnxruntime import OnnxRuntimeCudaBackend

    return OnnxRuntimeCudaBackend


def _on_gpus(
    kind: Callable[[Bundle, str, int], Backend], bundle: Bundle, precision: str, devices: Sequence[int]
) -> Backend:
    """One backend a GPU, each checked on its own; all are closed where one fails."""
    from longclip_rt.backends.multi_gpu import DevicePool
    from longclip_rt.parity.self_check import run_self_check

    members: list[Backend] = []
    try:
        for number in devices:
            member = kind(bundle, precision, number)
            members.append(member)
            member.prepare()
            run_self_check(member)
        return members[0] if len(members) == 1 else DevicePool(members)
    except BaseException:
        for member in members:
            with contextlib.suppress(LongClipError):  # the error at hand says more
                member.close()
        raise
