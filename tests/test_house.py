"""Imports run down: of every module, inside functions too, through the links to export/, kernels/ and train/."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "longclip_rt"

FLOORS = (
    {"__main__"},
    {"cli"},
    {"commands"},
    {"evaluation"},
    {"train", "integrations", "serving"},
    {"bench", "embedding", "search"},
    {"export"},
    {"runtime"},
    {"opening"},
    {"parity"},
    {"tensorrt"},
    {"backends"},
    {"kernels"},
    {"bundle"},
    {"weights"},
    {"model"},
    {"pca"},
    {"formats"},
    {"system"},
    {"metrics"},
    {"choices", "errors", "version"},
)
"""The rooms from the top down: each imports only from floors below its own, and from itself."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Dotted name, without the package's, to file; the package's own face, which only hands names on, aside."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")) + [
        path for link in ("export", "kernels", "train") for path in sorted((PACKAGE / link).rglob("*.py"))
    ]:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and "assets" not in parts:
            found[name] = path
    return found


MODULES = modules()


def imported(name: str, path: Path) -> Iterator[str]:
    """The modules of this package that a module names in an import, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        for target in targets:
            if target.split(".")[0] == "longclip_rt":
                parts = target.split(".")[1:]
                while parts and ".".join(parts) not in MODULES:
                    parts.pop()
                if parts:
                    yield ".".join(parts)


ARROWS = {name: set(imported(name, path)) - {name} for name, path in MODULES.items()}


def test_every_room_has_a_floor() -> None:
    assert {name.split(".")[0] for name in MODULES} == set(FLOOR)


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_imports_run_down(room: str) -> None:
    up = [
        f"{name} -> {target}"
        for name, targets in ARROWS.items()
        for target in sorted(targets)
        if name.split(".")[0] == room != target.split(".")[0] and FLOOR[target.split(".")[0]] <= FLOOR[room]
    ]
    assert up == []


def test_no_circle() -> None:
    try:
        TopologicalSorter(ARROWS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
