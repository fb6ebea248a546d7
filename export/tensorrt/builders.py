"""What can build engines on this machine, and for which cards."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longclip_rt.choices import EVERY, LIBRARIES
from longclip_rt.errors import EngineError
from longclip_rt.system.machine import cuda_devices
from longclip_rt.tensorrt.engines import import_library

logger = logging.getLogger("longclip_rt")


@dataclass(frozen=True)
class Builders:
    """The library that builds, and for which cards.

    Attributes:
        backend: `tensorrt` or `tensorrt-rtx`.
        library: Its imported package.
        archs: Compute capabilities times ten; an engine each.
        gpu: The card that plans belong to; empty where they run on every card of their architecture.
        here: Those of `archs` whose plans the first GPU of this machine can load.
        passed_over: Why it is not what stands before it in the order of `auto`; empty where nothing does.
    """

    backend: str
    library: Any
    archs: tuple[int, ...]
    gpu: str
    here: tuple[int, ...]
    passed_over: str = ""


def choose_builders(engine: str = "auto", archs: Sequence[int] | str = ()) -> Builders:
    """Finds out what can build engines here.

    Args:
        engine: `tensorrt`, `tensorrt-rtx`, or `auto` for the first of the two that can.
        archs: Compute capabilities times ten; `EVERY` for all; none for this machine's GPU.

    Raises:
        EngineError: None can; the message says why, of each.
    """
    if engine != "auto" and engine not in LIBRARIES:
        raise EngineError(f"There is no library {engine!r} for engines; there are auto, {', '.join(LIBRARIES)}.")
    reasons = []
    for backend in LIBRARIES if engine == "auto" else (engine,):
        try:
            library = import_library(backend)
            if engine == "auto" and archs == EVERY and not _names_cards(library):
                raise EngineError("It builds for the GPU that it runs on alone, and every architecture was asked for.")
            chosen, gpu, here = _cards(library, archs)
        except EngineError as error:
            reasons.append(f"{backend}: {str(error).rstrip('.')}.")
            continue
        return Builders(backend, library, chosen, gpu, here, " ".join(reasons))
    raise EngineError(f"No engine can be built. {' '.join(reasons)}")


def _names_cards(library: Any) -> bool:
    """Whether the library, which is TensorRT-RTX then, builds for cards that are not here."""
    return hasattr(library, "ComputeCapability")


def _cards(library: Any, archs: Sequence[int] | str) -> tuple[tuple[int, ...], str, tuple[int, ...]]:
    """Architectures, card and what is here, as in `Builders`."""
    devices = cuda_devices()
    own = devices[0].arch if devices else None
    if not _names_cards(library):
        if own is None:
            raise EngineError(
                "There is no NVIDIA GPU with a driver here, and TensorRT builds for the GPU that it runs on."
            )
        if archs and archs != EVERY and set(archs) != {own}:
            wanted = ", ".join(f"sm_{arch}" for arch in archs)
            raise EngineError(f"TensorRT builds for the GPU that it runs on, sm_{own} here, and not for {wanted}.")
        return (own,), devices[0].name, (own,)
    offered = tuple(
        sorted(int(name.removeprefix("SM")) for name in library.ComputeCapability.__members__ if name.startswith("SM"))
    )
    listed = ", ".join(f"sm{arch}" for arch in offered)
    chosen = offered if archs == EVERY else tuple(dict.fromkeys(int(arch) for arch in archs))
    if not chosen:
        if own is None:
            raise EngineError(
                f"There is no NVIDIA GPU here to build for. Name cards with --arch ({listed}), or --arch all."
            )
        chosen = tuple(dict.fromkeys(device.arch for device in devices))
    if unknown := [arch for arch in chosen if arch not in offered]:
        sentence = (
            f"{library.__name__} {library.__version__} does not build for "
            f"{', '.join(f'sm_{arch}' for arch in unknown)}; it builds for {listed}."
        )
        if archs or len(unknown) == len(chosen):
            raise EngineError(sentence)
        logger.warning("a GPU of this machine gets no engine: %s", sentence)
    chosen = tuple(arch for arch in chosen if arch in offered)
    return chosen, "", tuple(arch for arch in chosen if arch == own)
