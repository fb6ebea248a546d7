"""Long-CLIP inference: texts of up to 248 tokens and images to vectors in one space (arXiv 2403.15378)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longclip_rt.version import __version__

if TYPE_CHECKING:
    from longclip_rt.runtime import Embedder

__all__ = ["Embedder", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports `Embedder` on first use, so that `import longclip_rt` and the command line's help stay quick."""
    if name == "Embedder":
        from longclip_rt.runtime import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
