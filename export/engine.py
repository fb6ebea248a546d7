"""Engines of a bundle: one builder for TensorRT and TensorRT-RTX, which needs neither torch nor the weights."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longclip_rt.backends.head_kernel import HEAD_KERNEL, HEAD_OPERATORS, HEAD_PLUGIN, copy_head, head_archs
from longclip_rt.backends.profiles import Profile
from longclip_rt.bundle import TOWERS, Bundle
from longclip_rt.engines import (
    ENGINES,
    LIBRARIES,
    TIMING_CACHE,
    Engine,
    EngineKey,
    engines_of,
    graph_hashes,
    import_library,
    plan_name,
    write_engine_manifest,
)
from longclip_rt.errors import BundleError, EngineError
from longclip_rt.export.engine_plan import PlanRequest, build_plan
from longclip_rt.export.head_graph import plugin_graph_name
from longclip_rt.files import output_errors
from longclip_rt.machine import cuda_devices
from longclip_rt.version import __version__

logger = logging.getLogger("longclip_rt")

WITH_PLUGINS = ("tensorrt",)
"""Libraries that take plug-ins written in Python; TensorRT-RTX 1.7 ships without them."""

EVERY = "all"
"""Instead of architectures: every one that the library builds for."""


@dataclass(frozen=True)
class EngineOptions:
    """What engines are built with; part of their key.

    Attributes:
        precision: `fp16` or `fp32`: which graphs. It is theirs alone; the builder is asked for none.
        text_buckets: Lengths in tokens that text batches are padded to; a profile each. The model's context length is
            always one of them, and those beyond it are left out, so that every text has a profile.
        batches: Last rows of the ranges of batch sizes, ascending; a profile each. 1, 32, 256: 1, 2 to 32, 33 to 256.
        optimization_level: 0 to 5; None for the library's own.
        workspace_mib: Most MiB that a layer may compute in; None for the library's own limit.
    """

    precision: str = "fp16"
    text_buckets: tuple[int, ...] = (32, 77, 128, 248)
    batches: tuple[int, ...] = (1, 32, 256)
    optimization_level: int | None = None
    workspace_mib: int | None = None

    def __post_init__(self) -> None:
        for name, numbers in (("text buckets", self.text_buckets), ("batches", self.batches)):
            if not numbers or min(numbers) < 1 or sorted(set(numbers)) != list(numbers):
                raise EngineError(
                    f"The {name} {list(numbers)} should be ascending numbers from 1 on, such as 1, 32, 256."
                )

    def profiles(self, tower: str, context_length: int) -> tuple[Profile, ...]:
        """One profile per length and range of batch sizes; for images per range alone."""
        lengths: list[int | None] = [None]
        if tower == "text":
            lengths = [*(length for length in self.text_buckets if length < context_length), context_length]
        starts = (1, *(last + 1 for last in self.batches[:-1]))
        ranges = list(zip(starts, self.batches, strict=True))
        shapes = [(length, least, most) for length in lengths for least, most in ranges]
        return tuple(Profile(index, *shape) for index, shape in enumerate(shapes))

    def for_key(self, context_length: int) -> dict[str, Any]:
        """Plain values of what shapes a plan."""
        lengths = {profile.length for profile in self.profiles("text", context_length)}
        return {
            "text_buckets": sorted(length for length in lengths if length is not None),
            "batches": list(self.batches),
            "optimization_level": self.optimization_level,
            "workspace_mib": self.workspace_mib,
        }


@dataclass(frozen=True)
class Builders:
    """The library that builds, and for which cards.

    Attributes:
        backend: `tensorrt` or `tensorrt-rtx`.
        library: Its imported package.
        archs: Compute capabilities times ten; an engine each.
        gpu: The card that plans belong to; empty where they run on every card of their architecture.
        here: Those of `archs` whose plans a GPU of this machine can load.
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
            chosen, gpu, here = _cards(backend, library, archs)
        except EngineError as error:
            reasons.append(f"{backend}: {str(error).rstrip('.')}.")
            continue
        return Builders(backend, library, chosen, gpu, here, " ".join(reasons))
    raise EngineError(f"No engine can be built. {' '.join(reasons)}")


def _cards(backend: str, library: Any, archs: Sequence[int] | str) -> tuple[tuple[int, ...], str, tuple[int, ...]]:
    devices = cuda_devices()
    own = devices[0].arch if devices else None
    if not hasattr(library, "ComputeCapability"):
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
        chosen = (own,)
    if unknown := [arch for arch in chosen if arch not in offered]:
        raise EngineError(
            f"{library.__name__} {library.__version__} does not build for "
            f"{', '.join(f'sm_{arch}' for arch in unknown)}; it builds for {listed}."
        )
    return chosen, "", tuple(arch for arch in chosen if arch == own)


@dataclass(frozen=True)
class BuiltEngine:
    """An engine of the bundle.

    Attributes:
        engine: It.
        built: False where it was there already.
    """

    engine: Engine
    built: bool


def has_plugin_graphs(bundle: Bundle) -> bool:
    """Whether the bundle was exported with the PCA as a plug-in (`--pca-in-engine`)."""
    return all(bundle.file(plugin_graph_name(tower)).is_file() for tower in TOWERS)


def head_for(bundle: Bundle, library: str, arch: int, precision: str) -> str:
    """What computes the PCA of an engine's embeddings.

    Args:
        bundle: The model.
        library: `tensorrt` or `tensorrt-rtx`.
        arch: Compute capability times ten.
        precision: Of the graphs.

    Returns:
        One of `backends.head_kernel.HEADS`: the plug-in where the bundle was exported with it and the library has
        plug-ins in Python, else the kernel where one was compiled for the architecture; empty without a PCA.

    Raises:
        BackendError: The bundle's head is damaged.
    """
    if not bundle.manifest.get("pca"):
        return ""
    archs = head_archs(bundle.path) if precision == "fp16" else ()
    if archs and library in WITH_PLUGINS and has_plugin_graphs(bundle):
        return HEAD_PLUGIN
    return HEAD_KERNEL if arch in archs else HEAD_OPERATORS


def build_engines(
    bundle: Bundle,
    builders: Builders,
    options: EngineOptions,
    missing: bool = False,
    report: Callable[[str, float], None] = lambda stage, done: None,
) -> list[BuiltEngine]:
    """Builds a bundle's engines, one for each of the builders' architectures, into `engines/<key>/`.

    Args:
        bundle: The model; its own files and hashes stay as they are.
        builders: What builds.
        options: What to build.
        missing: Keep engines that are there, whole, and have the same key.
        report: Called with what is being done and the part of everything that is done.

    Raises:
        EngineError: The library refused a graph or an option, or ran out of memory; nothing of that engine is left.
        BundleError: The bundle has no graphs of the precision.
        MissingExtraError: onnx is not installed.
        OutputError: The bundle's folder cannot be written.
    """
    if options.precision not in bundle.precisions:
        raise BundleError(
            f"The bundle {bundle.path} holds {' and '.join(bundle.precisions)}, not {options.precision}, which its "
            f"engines would be built from. Export it again with --{options.precision}."
        )
    results = []
    for number, arch in enumerate(builders.archs):
        head = head_for(bundle, builders.backend, arch, options.precision)
        chosen = options.for_key(bundle.architecture.context_length) | ({"pca_head": head} if head else {})
        key = EngineKey(
            builders.backend, str(builders.library.__version__), builders.gpu, (arch,), options.precision,
            graph_hashes(bundle, options.precision), chosen,
        )  # fmt: skip
        there = next((engine for engine in engines_of(bundle)[0] if engine.key == key), None)
        built = there is None or not missing or bool(there.damage())
        if built:
            share = _share(report, number, len(builders.archs), f"sm_{arch}")
            _build_engine(bundle, builders, options, key, share)
            there = next(engine for engine in engines_of(bundle)[0] if engine.key == key)
        assert there is not None
        results.append(BuiltEngine(there, built))
    return results


def _share(report: Callable[[str, float], None], number: int, count: int, name: str) -> Callable[[str, float], None]:
    return lambda stage, done: report(f"{name} {stage}", (number + done) / count)


def _build_engine(
    bundle: Bundle, builders: Builders, options: EngineOptions, key: EngineKey, report: Callable[[str, float], None]
) -> None:
    home = bundle.path / ENGINES
    target, staging, old = (home / name for name in (key.name, f".{key.name}.{os.getpid()}", f".{key.name}.old"))
    timings, head = _timings(bundle, key), str(key.options.get("pca_head", ""))
    with output_errors(target):
        staging.mkdir(parents=True)
        try:
            facts = {}
            for number, tower in enumerate(TOWERS):
                request = PlanRequest(
                    builders.library, bundle, tower, options.precision,
                    options.profiles(tower, bundle.architecture.context_length), key.archs[0],
                    key.archs[0] in builders.here, options.optimization_level,
                    None if options.workspace_mib is None else options.workspace_mib << 20, head,
                )  # fmt: skip
                share = _share(report, number, len(TOWERS), tower)
                # The image tower, and every bucket, begins with what was measured before it.
                made, timings = build_plan(request, staging / plan_name(tower), timings, share)
                facts[tower] = made.to_dict()
                if made.changed_nodes:
                    logger.debug("%s: took softmax_precision out of %d Attention nodes", tower, made.changed_nodes)
            (staging / TIMING_CACHE).write_bytes(timings)
            if head == HEAD_KERNEL:
                copied = copy_head(bundle.path, staging, key.archs)
                assert copied
            created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            write_engine_manifest(staging, key, {"created": created, "longclip_rt": __version__, "towers": facts})
            # Engines are opened whole: the old one stays until the new one is there.
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            staging.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _timings(bundle: Bundle, key: EngineKey) -> bytes:
    """The newest timing cache of this bundle that was measured on the same card with the same version."""
    for engine in engines_of(bundle)[0]:
        own = engine.key
        same = (own.library, own.version, own.gpu, own.archs) == (key.library, key.version, key.gpu, key.archs)
        if same and (engine.path / TIMING_CACHE).is_file():
            return (engine.path / TIMING_CACHE).read_bytes()
    return b""
