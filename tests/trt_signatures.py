"""What functions of TensorRT's bindings take and give, from the lines that pybind11 writes into their documentation."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Signature:
    """What a function of the bindings takes and gives."""

    names: tuple[str, ...]
    types: tuple[str, ...]
    optional: tuple[bool, ...]
    returns: str


def signatures(document: str | None, name: str = "") -> list[Signature]:
    """The overloads in a docstring of pybind11; a property's getter and setter have no name there."""
    found = []
    for arguments, returns in re.findall(rf"^ ?(?:\d+\. )?{name}\((.*)\) -> (.+)$", document or "", re.M):
        parts = re.findall(r"(\w+): ((?:[^,\[=]|\[[^\]]*\])+?)( = [^,]+)?(?:, |$)", arguments)
        names, types, defaults = zip(*parts, strict=True) if parts else ((), (), ())
        found.append(Signature(names, types, tuple(map(bool, defaults)), returns.strip()))
    return found
