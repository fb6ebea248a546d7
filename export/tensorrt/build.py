"""Engines of a bundle: one builder for TensorRT and TensorRT-RTX, which needs neither torch nor the weights."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longclip_rt.bundle.bundle import TOWERS, Bundle
from longclip_rt.choices import BATCHES, LARGEST_WORKSPACE, TEXT_BUCKETS
from longclip_rt.errors import BundleError, EngineError
from longclip_rt.export.plugin import compiled_by
from longclip_rt.export.tensorrt.builders import Builders, choose_builders
from longclip_rt.export.tensorrt.folder import engine_in_the_making
from longclip_rt.export.tensorrt.plan import NoFusedAttention, PlanFacts, PlanRequest, build_plan
from longclip_rt.tensorrt.engines import (
    ENGINES,
    TIMING_CACHE,
    Engine,
    EngineKey,
    engine_at,
    engines_of,
    graph_hashes,
    head_hash,
    plan_name,
    write_engine_manifest,
)
from longclip_rt.tensorrt.head import (
    HEAD_KERNEL,
    HEAD_OPERATORS,
    HEAD_PLUGIN,
    copy_head,
    head_archs,
    plugin_graph_name,
)
from longclip_rt.tensorrt.profiles import Profile
from longclip_rt.version import __version__

__all__ = [
    "WITH_LEVELS",
    "WITH_PLUGINS",
    "Builders",
    "BuiltEngine",
    "EngineOptions",
    "build_engines",
    "choose_builders",
    "has_plugin_graphs",
    "head_for",
    "without_effect",
]

logger = logging.getLogger("longclip_rt")

WITH_PLUGINS = ("tensorrt",)
"""Libraries that take plug-ins written in Python; TensorRT-RTX 1.7 ships without them."""

WITH_LEVELS = ("tensorrt",)
"""Libraries that heed an optimisation level; TensorRT-RTX 1.7 builds the same bytes with each."""


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
    text_buckets: tuple[int, ...] = TEXT_BUCKETS
    batches: tuple[int, ...] = BATCHES
    optimization_level: int | None = None
    workspace_mib: int | None = None

    def __post_init__(self) -> None:
        for name, numbers in (("text buckets", self.text_buckets), ("batches", self.batches)):
            if not numbers or min(numbers) < 1 or sorted(set(numbers)) != list(numbers):
                raise EngineError(
                    f"The {name} {list(numbers)} should be ascending numbers from 1 on, such as 1, 32, 256."
                )
        if self.workspace_mib is not None and not 1 <= self.workspace_mib <= LARGEST_WORKSPACE:
            raise EngineError(f"The workspace of {self.workspace_mib} MiB should be 1 to {LARGEST_WORKSPACE} MiB.")

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


def without_effect(options: EngineOptions, backend: str, context_length: int) -> list[str]:
    """What was asked for and does nothing, a sentence each."""
    told = []
    if options.optimization_level is not None and backend not in WITH_LEVELS:
        told.append(f"{backend} heeds no optimisation level; {options.optimization_level} is left out.")
    beyond = [length for length in options.text_buckets if length > context_length]
    if beyond and options.text_buckets != EngineOptions.text_buckets:
        told.append(
            f"Texts of this model have at most {context_length} tokens: a bucket of {context_length} is built, and of "
            f"{', '.join(map(str, beyond))} none."
        )
    return told


def build_engines(
    bundle: Bundle,
    builders: Builders,
    options: EngineOptions,
    missing: bool = False,
    report: Callable[[str, float], None] = lambda stage, done: None,
    ready: Callable[[BuiltEngine], None] = lambda result: None,
) -> list[BuiltEngine]:
    """Builds a bundle's engines, one for each of the builders' architectures, into `engines/<key>/`.

    Args:
        bundle: The model; its own files and hashes stay as they are.
        builders: What builds.
        options: What to build.
        missing: Keep engines that are there, whole, and have the same key.
        report: Called with what is being done and the part of everything that is done.
        ready: Called with each engine as soon as it is there; those of other architectures may fail after it.

    Raises:
        EngineError: The library refused a graph or an option, or ran out of memory; nothing of that engine is left. Of
            several architectures the others are built first.
        BundleError: The bundle has no graphs of the precision.
        MissingExtraError: onnx is not installed.
        OutputError: The bundle's folder cannot be written, or another process builds the same engine.
    """
    if options.precision not in bundle.precisions:
        raise BundleError(
            f"The bundle {bundle.path} holds {' and '.join(bundle.precisions)}, not {options.precision}, which its "
            f"engines would be built from. Export it again with --{options.precision}."
        )
    if builders.backend not in WITH_LEVELS:
        options = replace(options, optimization_level=None)
    results, failed = [], []
    for number, arch in enumerate(builders.archs):
        share = _share(report, number, len(builders.archs), f"sm_{arch}")
        try:
            result = _built_or_kept(bundle, builders, options, arch, missing, share)
        except EngineError as error:
            if len(builders.archs) == 1:
                raise
            failed.append(f"sm_{arch}: {error}")
            continue
        results.append(result)
        ready(result)
    if failed:
        raise EngineError(f"{len(failed)} of {len(builders.archs)} engines could not be built. {' '.join(failed)}")
    return results


def _share(report: Callable[[str, float], None], number: int, count: int, name: str) -> Callable[[str, float], None]:
    return lambda stage, done: report(f"{name} {stage}", (number + done) / count)


def _built_or_kept(
    bundle: Bundle,
    builders: Builders,
    options: EngineOptions,
    arch: int,
    missing: bool,
    report: Callable[[str, float], None],
) -> BuiltEngine:
    head = head_for(bundle, builders.backend, arch, options.precision)
    chosen = options.for_key(bundle.architecture.context_length) | ({"pca_head": head} if head else {})
    if head == HEAD_PLUGIN:
        chosen["plugin"] = compiled_by()
    key = EngineKey(
        builders.backend, str(builders.library.__version__), builders.gpu, (arch,), options.precision,
        graph_hashes(bundle, options.precision), chosen, head_hash(bundle, head),
    )  # fmt: skip
    there = next((engine for engine in engines_of(bundle)[0] if engine.key == key), None)
    if missing and there is not None and not there.damage():
        return BuiltEngine(there, False)
    target = bundle.path / ENGINES / key.name
    _build_engine(bundle, builders, options, key, target, report)
    return BuiltEngine(engine_at(target), True)


def _build_engine(
    bundle: Bundle,
    builders: Builders,
    options: EngineOptions,
    key: EngineKey,
    target: Path,
    report: Callable[[str, float], None],
) -> None:
    with engine_in_the_making(target) as folder:
        timings, facts = _timings(bundle, key), {}
        for number, tower in enumerate(TOWERS):
            share = _share(report, number, len(TOWERS), tower)
            # The image tower, and every bucket, begins with what was measured before it.
            made, timings = _build_tower(bundle, builders, options, key, tower, folder, timings, share)
            facts[tower] = made.to_dict()
            if made.changed_nodes:
                logger.debug("%s: took softmax_precision out of %d Attention nodes", tower, made.changed_nodes)
        (folder / TIMING_CACHE).write_bytes(timings)
        if key.options.get("pca_head") == HEAD_KERNEL:
            copied = copy_head(bundle.path, folder, key.archs)
            assert copied
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_engine_manifest(folder, key, {"created": created, "longclip_rt": __version__, "towers": facts})


def _build_tower(
    bundle: Bundle,
    builders: Builders,
    options: EngineOptions,
    key: EngineKey,
    tower: str,
    folder: Path,
    timings: bytes,
    report: Callable[[str, float], None],
) -> tuple[PlanFacts, bytes]:
    context, arch = bundle.architecture.context_length, key.archs[0]
    request = PlanRequest(
        builders.library, bundle, tower, options.precision, options.profiles(tower, context), arch,
        arch in builders.here, options.optimization_level,
        None if options.workspace_mib is None else options.workspace_mib << 20, str(key.options.get("pca_head", "")),
    )  # fmt: skip
    try:
        return build_plan(request, folder / plan_name(tower), timings, report)
    except NoFusedAttention:
        # TensorRT-RTX 1.7 has no kernel for one row of one head, and one for a range that begins with one row.
        if options.batches[0] > 1 or len(options.batches) == 1:
            raise
    joined = replace(options, batches=options.batches[1:]).profiles(tower, context)
    return build_plan(replace(request, profiles=joined), folder / plan_name(tower), timings, report)


def _timings(bundle: Bundle, key: EngineKey) -> bytes:
    """The newest timing cache of this bundle that was measured on the same card with the same version."""
    for engine in engines_of(bundle)[0]:
        own = engine.key
        if (own.library, own.version, own.gpu, own.archs) == (key.library, key.version, key.gpu, key.archs):
            try:
                return (engine.path / TIMING_CACHE).read_bytes()
            except OSError as error:
                logger.debug("passed over the timings of %s: %s", engine.path, error)
    return b""
