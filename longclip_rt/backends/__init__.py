"""Backends: which there are, which are usable here, and which one `auto` picks."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass

from longclip_rt.backends.base import Backend
from longclip_rt.bundle import Bundle
from longclip_rt.errors import BackendError

__all__ = ["AUTO_ORDER", "BACKENDS", "PRECISIONS", "Availability", "Backend", "availability", "open_backend"]

logger = logging.getLogger("longclip_rt")

BACKENDS = ("openvino", "onnxruntime", "torch")
"""Every backend, as `--backend` takes them."""

AUTO_ORDER = ("openvino", "onnxruntime")
"""What `auto` tries, in this order. Not `torch`, the reference: it is slower, and needs more than the bundle."""

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used on this machine.

    Attributes:
        name: The backend.
        usable: Whether it can.
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
    """Says whether a backend can be used here, by looking for its library (and, for OpenVINO, asking it).

    Args:
        name: One of `BACKENDS`.
    """
    extra = {"openvino": "longclip-rt", "onnxruntime": "longclip-rt[cpu]", "torch": "longclip-rt[export]"}[name]
    remedy = f'pip install "{extra}"'
    needed = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime",), "torch": ("torch", "open_clip")}[name]
    for module in needed:
        try:
            found = importlib.util.find_spec(module) is not None
        except ValueError:  # a module that is loaded and has no spec, or is marked as absent
            found = False
        if not found:
            return Availability(name, False, reason=f"the Python package {module} is not installed", remedy=remedy)
    if name == "openvino":
        from longclip_rt.backends.openvino import openvino_precisions

        try:
            return Availability(name, True, tuple(openvino_precisions()))
        except (ImportError, RuntimeError) as error:
            return Availability(name, False, reason=str(error), remedy=f"{remedy.replace('install', 'install -U')}")
    return Availability(name, True, ("fp32", "fp16") if name == "onnxruntime" else PRECISIONS)


def open_backend(bundle: Bundle, backend: str = "auto", precision: str = "auto") -> Backend:
    """Opens a bundle with a backend.

    `auto` takes the first usable one of `AUTO_ORDER` that offers the precision; `auto` precision takes the fastest that
    the backend offers here without an fp16 graph: bf16 with OpenVINO on a CPU that computes in it, else fp32. What was
    picked and why not the one above it is logged once, at INFO.

    Args:
        bundle: The model.
        backend: `auto` or one of `BACKENDS`.
        precision: `auto` or one of `PRECISIONS`.

    Raises:
        BackendError: What was asked for cannot be had. A backend or precision asked for by name is never replaced.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(f"There is no backend {backend!r}; there are auto, {', '.join(BACKENDS)}.")
    if precision != "auto" and precision not in PRECISIONS:
        raise BackendError(f"There is no precision {precision!r}; there are auto, {', '.join(PRECISIONS)}.")
    passed_over: list[str] = []
    for name in AUTO_ORDER if backend == "auto" else (backend,):
        state = availability(name)
        if not state.usable:
            passed_over.append(f"{name}: {state.reason}; mend it with: {state.remedy}")
        elif precision != "auto" and precision not in state.precisions:
            passed_over.append(f"{name} does not compute in {precision} here, only in {', '.join(state.precisions)}")
        elif name == "onnxruntime" and precision == "fp16" and "fp16" not in bundle.precisions:
            passed_over.append(f"{name}: {bundle.path} was exported without --fp16")
        else:
            chosen = state.precisions[0] if precision == "auto" else precision
            opened = _opened(bundle, name, chosen)
            why = f" (passed over: {'; '.join(passed_over)})" if passed_over else ""
            logger.info("%s %s in %s on %s%s", opened.name, opened.version, opened.precision, opened.device, why)
            return opened
    wanted = "No backend can" if backend == "auto" else f"The backend {backend} cannot"
    raise BackendError(
        f"{wanted} be used{'' if precision == 'auto' else f' in {precision}'}: {'. '.join(passed_over)}. "
        "What is there is listed by: longclip-rt info"
    )


def _opened(bundle: Bundle, name: str, precision: str) -> Backend:
    if name == "openvino":
        from longclip_rt.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(bundle, precision)
    if name == "onnxruntime":
        from longclip_rt.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(bundle, precision)
    from longclip_rt.backends.torch import TorchBackend

    return TorchBackend(bundle, precision)
