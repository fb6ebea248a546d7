"""`engine.json`: what it holds, checked once where it is read, so that nothing behind that meets another type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from longclip_rt.bundle.bundle import TOWERS
from longclip_rt.choices import LIBRARIES
from longclip_rt.system.files import sha256_of_file, write_text_atomically
from longclip_rt.tensorrt.key import EngineKey

FORMAT_VERSION = 2
MANIFEST = "engine.json"

# A field that ends with a question mark may be absent, and `*` stands for any name.
_NUMBER = (int, type(None))
_KEY = {
    "library": str, "version": str, "gpu": str, "archs": [int], "precision": str, "onnx": {"*": str},
    "options": {"text_buckets?": [int], "batches?": [int], "pca_head?": str}, "head": str,
}  # fmt: skip
_PROFILE = {"index": int, "length": _NUMBER, "least": int, "most": int, "memory": _NUMBER}
_TOWERS = {"*": {"profiles": [_PROFILE], "weights": _NUMBER}}
_FIELDS = {"format": int, "key": _KEY, "files": {"*": str}, "towers?": _TOWERS}


def plan_name(tower: str) -> str:
    """The file of a tower's plan."""
    return f"{tower}.plan"


def read_engine_manifest(folder: Path) -> tuple[EngineKey, dict[str, str], dict[str, dict[str, Any]]]:
    """Reads an engine's `engine.json`.

    Returns:
        What it belongs to, the SHA-256 of each file, and what the builder noted of each tower.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON, or a field is absent or of another kind; the message says which.
    """
    try:
        about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if isinstance(about, dict) and isinstance(about.get("format"), int) and about["format"] > FORMAT_VERSION:
        raise ValueError("it is of a newer version of this program; update with: pip install -U longclip-rt")
    _check(about, _FIELDS, "")
    files = about["files"]
    if about["key"]["library"] not in LIBRARIES:
        raise ValueError(f"it is of an unknown library, {about['key']['library']!r}")
    if unsafe := [name for name in files if Path(name).name != name or name in ("", "..") or "\0" in name]:
        raise ValueError(f"it names files outside of its folder: {', '.join(map(repr, unsafe))}")
    if missing := [plan_name(tower) for tower in TOWERS if plan_name(tower) not in files]:
        raise ValueError(f"it does not name {', '.join(missing)}")
    key = {field.name: about["key"][field.name] for field in fields(EngineKey)}
    return EngineKey(**{**key, "archs": tuple(key["archs"])}), files, about.get("towers", {})


def _check(value: Any, wanted: Any, where: str) -> None:
    """Holds a value of JSON to what is wanted of it.

    Raises:
        ValueError: It is something else.
    """
    kind = type(wanted) if isinstance(wanted, (dict, list)) else wanted
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where or 'it'} is of another type than it should be")
    if isinstance(wanted, list):
        for number, each in enumerate(value):
            _check(each, wanted[0], f"{where}[{number}]")
    elif isinstance(wanted, dict):
        for name, inner in wanted.items():
            for found in value if name == "*" else [name.rstrip("?")]:
                path = f"{where}.{found}".lstrip(".")
                if found in value:
                    _check(value[found], inner, path)
                elif not name.endswith("?"):
                    raise ValueError(f"{path} is missing")


def write_engine_manifest(folder: Path, key: EngineKey, facts: Mapping[str, Any]) -> None:
    """Writes `engine.json`, with the SHA-256 of every other file in `folder`.

    Args:
        folder: The engine's, with everything else in it.
        key: What it belongs to.
        facts: What else is worth keeping; `towers` holds what `Engine.towers` gives back.

    Raises:
        OutputError: The folder cannot be written.
    """
    files = {file.name: sha256_of_file(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST}
    about = {"format": FORMAT_VERSION, "key": asdict(key), "files": files, **facts}
    write_text_atomically(folder / MANIFEST, json.dumps(about, indent=2) + "\n")
