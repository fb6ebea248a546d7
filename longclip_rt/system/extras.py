"""Optional dependencies: imported where they are needed, with an error that names the extra which brings them."""

from __future__ import annotations

import importlib
from types import ModuleType

from longclip_rt.errors import MissingExtraError


def require(module_name: str, extra: str) -> ModuleType:
    """Imports an optional dependency.

    Args:
        module_name: What to import, such as `open_clip`.
        extra: The extra of this package that installs it, such as `export`.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: The module, or something it imports, is not installed.
    """
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # `None` in sys.modules is how Python marks a module as absent; such an error carries the module's own name too.
        missing = error.name or module_name
        needed_by = "" if missing == module_name else f" (it is needed by {module_name})"
        raise MissingExtraError(
            f"The Python package {missing!r} is not installed{needed_by}. "
            f'Install it with: pip install "longclip-rt[{extra}]"'
        ) from error
