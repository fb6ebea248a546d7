"""The engines of a bundle: what each was built for, which one this machine can run, and why not the others.

    engines/<key>/    text.plan  image.plan  engine.json, and the PCA head's files where the bundle has a head

Nothing here touches a GPU or imports TensorRT. Load only engines that you made: a plan can carry code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longclip_rt.bundle import TOWERS, Bundle, onnx_name
from longclip_rt.errors import BackendError
from longclip_rt.files import sha256_of_file, sha256_of_json, write_text_atomically

FORMAT_VERSION = 1
ENGINES = "engines"
MANIFEST = "engine.json"
LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backend -> the Python package that builds and runs its engines."""


@dataclass(frozen=True)
class Target:
    """The machine that an engine is to run on.

    Attributes:
        library: `tensorrt` or `tensorrt-rtx`.
        version: The library's version, in full.
        gpu: The card's name.
        arch: Its compute capability times ten.
    """

    library: str
    version: str
    gpu: str
    arch: int


@dataclass(frozen=True)
class EngineKey:
    """What an engine belongs to.

    Attributes:
        library: `tensorrt` or `tensorrt-rtx`.
        version: The library that built it; no other version reads the plan.
        gpu: Name of the card that it was timed on; empty where it runs on every card of its architectures.
        archs: Compute capabilities times ten.
        precision: Of the graphs.
        onnx: SHA-256 of each tower's graph as it is in the bundle.
        options: What else it was built with: buckets, batches, optimisation level.
    """

    library: str
    version: str
    gpu: str
    archs: tuple[int, ...]
    precision: str
    onnx: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's name."""
        arch = "-".join(f"sm{arch}" for arch in self.archs)
        return f"{self.library}-{arch}-{sha256_of_json(asdict(self))[:12]}"

    def mismatch(self, bundle: Bundle, target: Target, precision: str) -> str:
        """Why an engine of this key cannot run a bundle on a machine, in words; empty where it can.

        Args:
            bundle: The model.
            target: The machine.
            precision: The precision that is wanted.
        """
        if self.library != target.library:
            return f"it was built for {self.library}, not {target.library}"
        if self.version != target.version:
            return f"it was built by version {self.version}, and {target.version} is installed"
        if target.arch not in self.archs:
            made = ", ".join(f"sm_{arch}" for arch in self.archs)
            return f"it was built for {made}, and this GPU is sm_{target.arch}"
        if self.gpu and self.gpu != target.gpu:
            return f"it was built on {self.gpu}, and this GPU is {target.gpu}"
        if self.precision != precision:
            return f"it computes in {self.precision}, and {precision} is wanted"
        files = bundle.manifest["files"]
        for tower in TOWERS:
            name = onnx_name(tower, precision)
            if name not in files or self.onnx.get(tower) != files[name]["sha256"]:
                return f"it was built from another {name}"
        return ""


@dataclass(frozen=True)
class Engine:
    """An engine on disk.

    Attributes:
        path: Its folder.
        key: What it belongs to.
        plans: SHA-256 of each tower's plan.
    """

    path: Path
    key: EngineKey
    plans: Mapping[str, str]

    def plan(self, tower: str) -> bytes:
        """Reads a tower's plan.

        Raises:
            BackendError: It is absent or damaged.
        """
        file = self.path / plan_name(tower)
        again = "Build it again with: longclip-rt engine build"
        try:
            if (found := sha256_of_file(file)) != self.plans[tower]:
                raise BackendError(
                    f"{file} is damaged: its SHA-256 is {found[:12]}..., not {self.plans[tower][:12]}.... {again}"
                )
            return file.read_bytes()
        except (OSError, KeyError) as error:
            raise BackendError(f"{file} cannot be read: {error}. {again}") from error


def plan_name(tower: str) -> str:
    """The file of a tower's plan."""
    return f"{tower}.plan"


def engines_of(bundle: Bundle) -> tuple[list[Engine], list[str]]:
    """The engines of a bundle, newest first; and what is wrong with the folders that hold none."""
    found: list[tuple[int, Engine]] = []
    wrong: list[str] = []
    home = bundle.path / ENGINES
    for folder in sorted(home.iterdir()) if home.is_dir() else ():
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        try:
            about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if about["format"] > FORMAT_VERSION:
                wrong.append(f"{folder.name}: it is of a newer version of this program")
                continue
            fields = {**about["key"], "archs": tuple(about["key"]["archs"])}
            engine = Engine(folder, EngineKey(**fields), dict(about["plans"]))
            found.append(((folder / MANIFEST).stat().st_mtime_ns, engine))
        except (OSError, ValueError, KeyError, TypeError) as error:
            wrong.append(f"{folder.name}: its {MANIFEST} cannot be read ({error})")
    return [engine for _, engine in sorted(found, key=lambda pair: -pair[0])], wrong


def find_engine(bundle: Bundle, target: Target, precision: str) -> Engine:
    """The newest engine of a bundle that a machine can run.

    Raises:
        BackendError: There is none; the message says of each engine why not.
    """
    engines, reasons = engines_of(bundle)
    for engine in engines:
        reason = engine.key.mismatch(bundle, target, precision)
        if not reason:
            return engine
        reasons.append(f"{engine.path.name}: {reason}")
    others = f" Passed over: {'; '.join(reasons)}." if reasons else ""
    raise BackendError(
        f"The bundle {bundle.path} has no {target.library} engine in {precision} for {target.gpu} (sm_{target.arch}, "
        f"version {target.version}).{others} Build one with: longclip-rt engine build {bundle.path}"
    )


def write_engine_manifest(folder: Path, key: EngineKey, facts: Mapping[str, Any]) -> None:
    """Writes `engine.json` around the plans in `folder`.

    Args:
        folder: The engine's, with the plans in it.
        key: What it belongs to.
        facts: What else is worth keeping: build time, memory, layers.
    """
    plans = {
        tower: sha256_of_file(folder / plan_name(tower)) for tower in TOWERS if (folder / plan_name(tower)).exists()
    }
    about = {"format": FORMAT_VERSION, "key": asdict(key), "plans": plans, **facts}
    write_text_atomically(folder / MANIFEST, json.dumps(about, indent=2) + "\n")
