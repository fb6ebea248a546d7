"""Backends: which there are, which are usable here, and which one `auto` picks."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

from longclip_rt.backends.base import Backend
from longclip_rt.bundle.bundle import Bundle
from longclip_rt.choices import BACKENDS, GPU_BACKENDS, PRECISIONS, SPECS
from longclip_rt.errors import BackendError, LongClipError, MissingExtraError
from longclip_rt.system import machine

logger = logging.getLogger("longclip_rt")

AUTO_ORDER = tuple(sorted(SPECS, key=lambda name: SPECS[name].auto))
"""What `auto` tries, in this order; `torch` on a GPU alone."""


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
    spec, remedy = SPECS[name], _remedy(name)
    for module in spec.packages:
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
    return Availability(name, True, spec.precisions)


def _remedy(name: str) -> str:
    return f'pip install "{SPECS[name].install}"'


def _not_importable(name: str) -> tuple[str, str] | None:
    """Why TensorRT, which is installed, does not import here or is too old, and the command that mends it."""
    from longclip_rt.tensorrt.engines import import_library

    try:
        import_library(name)
    except BackendError as error:
        return str(error).partition(" Install it with")[0].rstrip("."), _remedy(name).replace("install", "install -U")
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
        offered = _offered(state, bundle)
        if devices is not None and not runs_on_gpu(name):
            passed_over.append(f"{name} runs on the CPU, and GPUs were asked for")
        elif backend == "auto" and name == "torch" and not (state.usable and runs_on_gpu(name)):
            passed_over.append("torch sees no GPU, and is slower than the others on a CPU")
        elif not state.usable:
            passed_over.append(f"{name}: {state.reason}; mend it with: {state.remedy}")
        elif precision != "auto" and precision not in (*state.precisions, "int8" if name == "openvino" else ""):
            passed_over.append(f"{name} does not compute in {precision} here, only in {', '.join(state.precisions)}")
        elif precision != "auto" and precision not in offered:
            passed_over.append(f"{name}: {bundle.path} was exported without --{precision}")
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
        raise BackendError(f"Devices are numbers of GPUs from 0, such as [0, 1], each once; got {devices!r}.")
    return numbers


def _offered(state: Availability, bundle: Bundle) -> list[str]:
    """The precisions of a backend that the bundle has what they need of; int8 last, which `auto` takes never."""
    needs_graphs = SPECS[state.name].reads_fp16 and "fp16" not in bundle.precisions
    found = [each for each in state.precisions if each != "fp16" or not needs_graphs]
    return [*found, "int8"] if state.name == "openvino" and bundle.has_int8 else found


def runs_on_gpu(name: str) -> bool:
    """Whether a backend runs on a GPU here; PyTorch does where it was built for CUDA and sees one."""
    if name != "torch" or not machine.cuda_devices():
        return name in GPU_BACKENDS
    import torch

    return bool(torch.cuda.is_available())


def _opened(bundle: Bundle, name: str, precision: str, devices: Sequence[int] | None) -> Backend:
    if runs_on_gpu(name):
        return _on_gpus(_class_of(name), bundle, precision, devices or (0,))
    backend = _class_of(name)(bundle, precision)
    backend.prepare()
    return backend


def _class_of(name: str) -> Callable[..., Backend]:
    module, _, kind = SPECS[name].where.partition(":")
    found: Callable[..., Backend] = getattr(importlib.import_module(f"longclip_rt.{module}"), kind)
    return found


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
