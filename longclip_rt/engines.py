"""The engines of a bundle: what each was built for, which one this machine can run, and why not the others.

    engines/<key>/    text.plan  image.plan  engine.json  timing.cache, and the PCA head's files where there is one

Nothing here touches a GPU, and TensorRT is imported only by `import_library`. Load only engines that you made: a plan
can carry code.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longclip_rt.backends.profiles import Profile
from longclip_rt.bundle import TOWERS, Bundle, onnx_name
from longclip_rt.errors import EngineError
from longclip_rt.files import sha256_of_file, sha256_of_json, write_text_atomically
from longclip_rt.machine import cuda_devices

FORMAT_VERSION = 1
ENGINES = "engines"
MANIFEST = "engine.json"
TIMING_CACHE = "timing.cache"
LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backend -> the Python package that builds and runs its engines."""

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
class Target:
    """The machine that an engine is to run on.

    Attributes:
        library: `tensorrt` or `tensorrt-rtx`.
        version: The library's version, in full.
        gpu: The card's name.
        arch: Its compute capability times ten.
        memory: Its memory in bytes; None where it is not known.
    """

    library: str
    version: str
    gpu: str
    arch: int
    memory: int | None = None


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
        graphs = graph_hashes(bundle, precision)
        for tower in TOWERS:
            if tower not in graphs or self.onnx.get(tower) != graphs[tower]:
                return f"it was built from another {onnx_name(tower, precision)}"
        return ""


def graph_hashes(bundle: Bundle, precision: str) -> dict[str, str]:
    """Tower -> SHA-256 of its graph in a precision, for those that the bundle has; weights beside the graph count."""
    files = bundle.manifest["files"]
    hashes = {}
    for tower in TOWERS:
        name = onnx_name(tower, precision)
        if name in files:
            beside = files.get(f"{name}.data")
            own = str(files[name]["sha256"])
            hashes[tower] = own if beside is None else sha256_of_json([own, beside["sha256"]])
    return hashes


@dataclass(frozen=True)
class Engine:
    """An engine on disk.

    Attributes:
        path: Its folder.
        key: What it belongs to.
        plans: SHA-256 of each tower's plan.
        towers: What the builder noted of each tower: `profiles`, `weights`, `layers` and so on; empty where it did not.
    """

    path: Path
    key: EngineKey
    plans: Mapping[str, str]
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
        """What is wrong with its plans, in words; empty where they are as they were written. Reads them all."""
        try:
            for tower in TOWERS:
                self.plan(tower)
        except EngineError as error:
            return str(error)
        return ""

    def plan(self, tower: str) -> bytes:
        """Reads a tower's plan.

        Raises:
            EngineError: It is absent or damaged.
        """
        file = self.path / plan_name(tower)
        again = "Build it again with: longclip-rt engine build"
        try:
            if (found := sha256_of_file(file)) != self.plans[tower]:
                raise EngineError(
                    f"{file} is damaged: its SHA-256 is {found[:12]}..., not {self.plans[tower][:12]}.... {again}"
                )
            return file.read_bytes()
        except (OSError, KeyError) as error:
            raise EngineError(f"{file} cannot be read: {error}. {again}") from error


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
            engine = Engine(folder, EngineKey(**fields), dict(about["plans"]), dict(about.get("towers", {})))
            found.append(((folder / MANIFEST).stat().st_mtime_ns, engine))
        except (OSError, ValueError, KeyError, TypeError) as error:
            wrong.append(f"{folder.name}: its {MANIFEST} cannot be read ({error})")
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
        f"version {target.version}).{others} Build one with: longclip-rt engine build {bundle.path}"
    )


def why_not_here(engine: Engine, bundle: Bundle) -> str:
    """Why this machine cannot run one of a bundle's engines, in words; empty where it can. Reads the plans."""
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


def write_engine_manifest(folder: Path, key: EngineKey, facts: Mapping[str, Any]) -> None:
    """Writes `engine.json` around the plans in `folder`.

    Args:
        folder: The engine's, with the plans in it.
        key: What it belongs to.
        facts: What else is worth keeping; `towers` holds what `Engine.towers` gives back.
    """
    plans = {
        tower: sha256_of_file(folder / plan_name(tower)) for tower in TOWERS if (folder / plan_name(tower)).exists()
    }
    about = {"format": FORMAT_VERSION, "key": asdict(key), "plans": plans, **facts}
    write_text_atomically(folder / MANIFEST, json.dumps(about, indent=2) + "\n")
