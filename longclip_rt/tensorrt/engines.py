"""The engines of a bundle: what each was built for, which one this machine can run, and why not the others.

    engines/<key>/    text.plan  image.plan  engine.json  timing.cache, and the PCA head's files where there is one

Nothing here touches a GPU, and TensorRT is imported only by `import_library`. Load only engines that you made: a plan
can carry code.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longclip_rt.bundle.bundle import TOWERS, Bundle
from longclip_rt.choices import LIBRARIES
from longclip_rt.errors import EngineError
from longclip_rt.system.machine import cuda_devices
from longclip_rt.tensorrt.key import EngineKey, Target, graph_hashes, head_hash
from longclip_rt.tensorrt.manifest import MANIFEST, plan_name, read_engine_manifest, write_engine_manifest
from longclip_rt.tensorrt.profiles import Profile

__all__ = [
    "ENGINES",
    "MANIFEST",
    "TIMING_CACHE",
    "Engine",
    "EngineKey",
    "Target",
    "engine_at",
    "engines_of",
    "find_engine",
    "graph_hashes",
    "head_hash",
    "import_library",
    "plan_name",
    "why_not_here",
    "write_engine_manifest",
]

ENGINES = "engines"
TIMING_CACHE = "timing.cache"
AGAIN = "longclip-rt engine build"
# TensorRT 10.14 is the first with attention layers in its bindings; of TensorRT-RTX none older was tried than 1.7.
_OLDEST = {"tensorrt": (10, 14), "tensorrt-rtx": (1, 7)}


def import_library(backend: str) -> Any:
    """Imports `tensorrt` or `tensorrt_rtx`.

    Args:
        backend: One of `LIBRARIES`.

    Raises:
        EngineError: It is not installed, one of its own libraries is missing, or it is too old.
    """
    package = LIBRARIES[backend]
    install = f"Install it with: pip install {backend}"
    try:
        library = importlib.import_module(package)
    except (ImportError, OSError, RuntimeError) as error:  # its loader raises each, depending on what is missing
        raise EngineError(f"The Python package {package} cannot be imported ({error}). {install}") from error
    if not hasattr(library, "Builder"):  # a folder that was left behind imports as an empty package
        raise EngineError(f"The Python package {package} is there and is empty. {install}")
    found = tuple(int(part) for part in str(library.__version__).split(".")[:2])
    if found < _OLDEST[backend]:
        oldest = ".".join(map(str, _OLDEST[backend]))
        raise EngineError(f"{package} {library.__version__} is too old; {oldest} or newer is needed. {install} -U")
    return library


@dataclass(frozen=True)
class Engine:
    """An engine on disk.

    Attributes:
        path: Its folder.
        key: What it belongs to.
        files: SHA-256 of each file: plans, timings, and the PCA head's where it has one.
        towers: What the builder noted of each tower: `profiles`, `weights`, `layers` and so on; empty where it did not.
    """

    path: Path
    key: EngineKey
    files: Mapping[str, str]
    towers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def profiles(self, tower: str) -> tuple[Profile, ...]:
        """A tower's profiles, in the plan's order; the plan itself holds the same."""
        noted = self.towers.get(tower, {}).get("profiles", ())
        return tuple(Profile(entry["index"], entry["length"], entry["least"], entry["most"]) for entry in noted)

    @property
    def device_bytes(self) -> int | None:
        """GPU memory for the weights and the largest profile of both towers; None where it is not known."""
        total = 0
        for facts in self.towers.values():
            needed = [facts.get("weights"), *(entry["memory"] for entry in facts.get("profiles", ()))]
            if None in needed or len(needed) < 2:
                return None
            total += needed[0] + max(needed[1:])
        return total or None

    def mismatch(self, bundle: Bundle, target: Target, precision: str) -> str:
        """Why it cannot run a bundle on a machine, in words; empty where it can. It is not read."""
        reason = self.key.mismatch(bundle, target, precision)
        needed = self.device_bytes
        if not reason and needed and target.memory is not None and needed > target.memory:
            return (
                f"it needs {needed / 2**20:,.0f} MiB of GPU memory, and this GPU has {target.memory / 2**20:,.0f} MiB"
            )
        return reason

    def damage(self) -> str:
        """What is wrong with its files, in words; empty where they are as they were written. Reads them all."""
        try:
            for name in self.files:
                self._read(name)
        except EngineError as error:
            return str(error)
        return ""

    def check_head(self) -> None:
        """Makes sure that the PCA head's files are as they were written, before they are loaded.

        Raises:
            EngineError: One is absent or damaged.
        """
        for name in sorted({*self.files} - {TIMING_CACHE, *map(plan_name, TOWERS)}):
            self._read(name)

    def plan(self, tower: str) -> bytes:
        """Reads a tower's plan.

        Raises:
            EngineError: It is absent or damaged.
        """
        return self._read(plan_name(tower))

    def _read(self, name: str) -> bytes:
        file, wanted = self.path / name, self.files[name]
        try:
            content = file.read_bytes()
        except OSError as error:
            raise EngineError(f"{file} cannot be read: {error}. Build it again with: {AGAIN}") from error
        if (found := hashlib.sha256(content).hexdigest()) != wanted:
            raise EngineError(
                f"{file} is damaged: its SHA-256 is {found[:12]}..., not {wanted[:12]}.... Build it again with: {AGAIN}"
            )
        return content


def engine_at(folder: Path) -> Engine:
    """The engine in a folder.

    Raises:
        OSError: Its `engine.json` cannot be read.
        ValueError: It is damaged, or of another version.
    """
    return Engine(folder, *read_engine_manifest(folder))


def engines_of(bundle: Bundle) -> tuple[list[Engine], list[str]]:
    """The engines of a bundle, newest first; and what is wrong with the folders that hold none."""
    found: list[tuple[int, Engine]] = []
    wrong: list[str] = []
    home = bundle.path / ENGINES
    try:
        folders = sorted(folder for folder in home.iterdir() if not folder.name.startswith(".") and folder.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    except OSError as error:
        return [], [f"{ENGINES}: the folder cannot be read ({error}); ask its owner, or copy the bundle"]
    for folder in folders:
        try:
            found.append(((folder / MANIFEST).stat().st_mtime_ns, engine_at(folder)))
        except (OSError, ValueError) as error:
            again = f"build it again with: {AGAIN} (and remove this folder if it stays)"  # one of another layout does
            wrong.append(f"{folder.name}: its {MANIFEST} cannot be used ({error}); {again}")
    return [engine for _, engine in sorted(found, key=lambda pair: -pair[0])], wrong


def find_engine(bundle: Bundle, target: Target, precision: str) -> Engine:
    """The newest engine of a bundle that a machine can run.

    Raises:
        EngineError: There is none; the message says of each engine why not.
    """
    engines, reasons = engines_of(bundle)
    for engine in engines:
        reason = engine.mismatch(bundle, target, precision)
        if not reason:
            return engine
        reasons.append(f"{engine.path.name}: {reason}")
    others = f" Passed over: {'; '.join(reasons)}." if reasons else ""
    raise EngineError(
        f"The bundle {bundle.path} has no {target.library} engine in {precision} for {target.gpu} (sm_{target.arch}, "
        f"version {target.version}).{others} Build one with: {_command_for(bundle, target, precision)}"
    )


def _command_for(bundle: Bundle, target: Target, precision: str) -> str:
    """What builds an engine for that very card, where there may be others."""
    command = f"{AGAIN} {shlex.quote(str(bundle.path))} --engine {target.library}"
    if precision != "fp16":
        command += f" --precision {precision}"
    if target.library == "tensorrt-rtx":
        return f"{command} --arch sm{target.arch}"
    cards = [(device.name, device.arch) for device in cuda_devices()]
    number = cards.index((target.gpu, target.arch)) if (target.gpu, target.arch) in cards else 0
    if number == 0:
        return command
    # TensorRT builds for the first card, and that variable may already count some of them.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return f"CUDA_VISIBLE_DEVICES={visible[number].strip() if number < len(visible) else number} {command}"


def why_not_here(engine: Engine, bundle: Bundle) -> str:
    """Why this machine cannot run one of a bundle's engines, in words; empty where it can. Reads its files."""
    devices = cuda_devices()
    if not devices:
        return "there is no NVIDIA GPU with a driver here"
    try:
        version = str(import_library(engine.key.library).__version__)
    except EngineError as error:
        return str(error)
    reasons = []
    for device in devices:
        target = Target(engine.key.library, version, device.name, device.arch, device.memory)
        reasons.append(engine.mismatch(bundle, target, engine.key.precision))
    return (reasons[0] if all(reasons) else "") or engine.damage()
