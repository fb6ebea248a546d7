"""Long-CLIP inference: texts of up to 248 tokens and images to vectors in one space (arXiv 2403.15378)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from longclip_rt.version import __version__

if TYPE_CHECKING:
    from longclip_rt.bundle.bundle import load_bundle
    from longclip_rt.errors import (
        BackendError,
        BundleError,
        EngineError,
        ExportError,
        InputError,
        KernelError,
        LongClipError,
        MissingExtraError,
        OutputError,
        PcaError,
        ResumeError,
        TrainingError,
        WeightsError,
    )
    from longclip_rt.formats.embeddings import load_embeddings
    from longclip_rt.model.positions import stretch_positions
    from longclip_rt.runtime import Embedder

__all__ = [
    "BackendError",
    "BundleError",
    "Embedder",
    "EngineError",
    "ExportError",
    "InputError",
    "KernelError",
    "LongClipError",
    "MissingExtraError",
    "OutputError",
    "PcaError",
    "ResumeError",
    "TrainingError",
    "WeightsError",
    "__version__",
    "load_bundle",
    "load_embeddings",
    "stretch_positions",
]

_MODULES = {
    "Embedder": "longclip_rt.runtime",
    "load_bundle": "longclip_rt.bundle.bundle",
    "load_embeddings": "longclip_rt.formats.embeddings",
    "stretch_positions": "longclip_rt.model.positions",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `import longclip_rt` and the command line's help stay quick."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, "longclip_rt.errors")), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return __all__
