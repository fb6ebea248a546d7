"""One tower's plan: profiles, configuration, timing cache, build; each refusal of the library becomes an error."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip_rt.backends.base import INPUT_NAMES
from longclip_rt.bundle.bundle import Bundle
from longclip_rt.errors import EngineError
from longclip_rt.export.plugin import ensure_pca_head
from longclip_rt.export.tensorrt.network import NetworkFacts, gate, network_facts, network_from_graph, tensorrt_graph
from longclip_rt.export.tensorrt.progress import BuildLog, Interruption, Report, logger_for, monitor_for
from longclip_rt.tensorrt.head import HEAD_KERNEL, HEAD_PLUGIN, plugin_graph_name
from longclip_rt.tensorrt.messages import no_fused_attention
from longclip_rt.tensorrt.profiles import Profile


class NoFusedAttention(EngineError):
    """A build that failed since an attention has no fused kernel for the shapes of its profiles."""


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is built from and for.

    Attributes:
        library: `tensorrt` or `tensorrt_rtx`, imported.
        bundle: The model.
        tower: `text` or `image`.
        precision: Of the graph.
        profiles: In the order that the plan gets them.
        arch: Compute capability times ten.
        here: Whether a GPU of this machine can load the plan.
        optimization_level: 0 to 5; None for the library's own.
        workspace: Bytes that a layer may compute in; None for the library's own limit.
        head: What computes the PCA of the embeddings: one of `backends.head_kernel.HEADS`, or empty without a PCA.
    """

    library: Any
    bundle: Bundle
    tower: str
    precision: str
    profiles: tuple[Profile, ...]
    arch: int
    here: bool
    optimization_level: int | None = None
    workspace: int | None = None
    head: str = ""

    @property
    def graph(self) -> Path:
        """The file that it is built from."""
        if self.head == HEAD_PLUGIN:
            return self.bundle.file(plugin_graph_name(self.tower))
        return self.bundle.onnx(self.tower, self.precision)

    def shape(self, rows: int, length: int | None) -> tuple[int, ...]:
        """The input's shape: ids [rows, length], or pixels [rows, 3, H, W]."""
        size = self.bundle.architecture.image_size
        return (rows, 3, size, size) if length is None else (rows, length)


@dataclass(frozen=True)
class PlanFacts:
    """What was built.

    Attributes:
        network: What the network is made of.
        blocks: Transformer blocks of the tower.
        kept_fp32: Of these, the ones that the export kept in fp32.
        changed_nodes: `Attention` nodes whose `softmax_precision` was taken out for the parser.
        decomposable: `Attention` nodes in fp32, for which TensorRT may have no fused kernel.
        profiles: In the plan's order.
        memory: Bytes that each profile computes in; None where neither the log nor a GPU told.
        weights: Bytes of the weights on the device, likewise.
        plan_bytes: Size of the plan.
        seconds: What building took.
    """

    network: NetworkFacts
    blocks: int
    kept_fp32: int
    changed_nodes: int
    decomposable: int
    profiles: tuple[Profile, ...]
    memory: tuple[int | None, ...]
    weights: int | None
    plan_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `engine.json`."""
        return {
            "profiles": [
                {"index": profile.index, "length": profile.length, "least": profile.least, "most": profile.most,
                 "memory": memory}
                for profile, memory in zip(self.profiles, self.memory, strict=True)
            ],
            "weights": self.weights,
            "plan_bytes": self.plan_bytes,
            "seconds": round(self.seconds, 1),
            "layers": self.network.layers,
            "attention": self.network.attention,
            "blocks": self.blocks,
            "fp32_products": self.network.fp32_products,
            "kept_fp32": self.kept_fp32,
            "changed_nodes": self.changed_nodes,
            "decomposable": self.decomposable,
        }  # fmt: skip


def build_plan(request: PlanRequest, target: Path, timing_cache: bytes, report: Report) -> tuple[PlanFacts, bytes]:
    """Builds a tower's plan.

    Args:
        request: What to build.
        target: The plan's file, in a folder in the making.
        timing_cache: What earlier builds on this GPU left; empty for none.
        report: Called with the phase and the part of the build that is done.

    Returns:
        What was built, and the timing cache for the next build; empty with TensorRT-RTX, which times nothing.

    Raises:
        EngineError: The library refused something, or the network fails the gate.
        MissingExtraError: onnx is not installed.
        OSError: The plan cannot be written.
    """
    interruption = Interruption()
    with interruption.keeping_ctrl_c():
        return _build_plan(request, target, timing_cache, report, interruption)


def _build_plan(
    request: PlanRequest, target: Path, timing_cache: bytes, report: Report, interruption: Interruption
) -> tuple[PlanFacts, bytes]:
    started = time.perf_counter()
    library, bundle, log = request.library, request.bundle, BuildLog(request.here)
    logger = logger_for(library, log)
    what = f"the {request.tower} engine"
    try:
        builder = library.Builder(logger)
    except (TypeError, RuntimeError) as error:  # the bindings' way of passing on a null pointer
        raise EngineError(f"{library.__name__} does not start: {log.reason()}.") from error
    path, plugins = request.graph, request.head == HEAD_PLUGIN
    extra = "tensorrt" if library.__name__ == "tensorrt" else "rtx"
    graph = tensorrt_graph(path, request.tower if request.head == HEAD_KERNEL else "", extra)
    if plugins:
        ensure_pca_head(library, request.arch)
    network, parser = network_from_graph(library, builder, logger, log, graph.content, path, plugins)
    interruption.raise_it()
    changed, decomposable = graph.changed, graph.decomposable
    del graph
    facts = network_facts(library, network)
    blocks, kept = _blocks(bundle, request.tower)
    if wrong := gate(facts, blocks, kept, request.precision):
        raise EngineError(
            f"{library.__name__} {library.__version__} does not make a fast network of {path}: {'; '.join(wrong)}. "
            "Take a newer version of it, or export the bundle again."
        )
    config = _given(builder.create_builder_config(), "a configuration", what, log)
    if flag := getattr(library.BuilderFlag, "REQUIRE_USER_ALLOCATION", None):
        # TensorRT-RTX: nothing is allocated while the engine runs, which capturing it as a CUDA graph needs.
        config.set_flag(flag)
    if request.precision == "fp32":
        config.clear_flag(library.BuilderFlag.TF32)  # on by default, and of 10 bits where fp32 has 23
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    if request.workspace is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, request.workspace)
    if capabilities := getattr(library, "ComputeCapability", None):  # TensorRT-RTX alone builds for other machines
        config.num_compute_capabilities = 1
        done = config.set_compute_capability(getattr(capabilities, f"SM{request.arch}"), 0)
        _given(done, f"the architecture sm_{request.arch}", what, log)
    # TensorRT-RTX times nothing, and its calls for timings will go.
    cache = None if extra == "rtx" else _set_timing_cache(config, timing_cache, what, log)
    for profile in request.profiles:
        _add_profile(builder, config, request, profile, log)
    config.progress_monitor = monitor_for(library, report, interruption)
    plan = builder.build_serialized_network(network, config)
    interruption.raise_it()
    if plan is None:
        told = f"{library.__name__} could not build {what} for sm_{request.arch}: {log.reason()}."
        if no_fused_attention(log.errors):
            one = any(profile.most == 1 for profile in request.profiles)
            hint = " It may be the range of one row: build with another, such as --batches 2,32,256." if one else ""
            raise NoFusedAttention(told + hint)
        raise EngineError(told)
    del parser, network  # they hold the weights once more
    target.write_bytes(plan)
    kept_cache = b"" if cache is None else bytes(_given(cache.serialize(), "its timings", what, log))
    memory = _memory_on_device(request, plan, log) if request.here else _logged_memory(request, log)
    size = target.stat().st_size
    seconds = time.perf_counter() - started
    return (
        PlanFacts(facts, blocks, kept, changed, decomposable, request.profiles, memory, log.weights, size, seconds),
        kept_cache,
    )


def _given(value: Any, what: str, whose: str, log: BuildLog) -> Any:
    """What the library gave, unless it is one of its ways to say no."""
    if value is None or value is False:
        raise EngineError(f"The library refused {what} for {whose}: {log.reason()}.")
    return value


def _blocks(bundle: Bundle, tower: str) -> tuple[int, int]:
    """A tower's transformer blocks, and how many of them the export kept in fp32."""
    architecture = bundle.architecture
    noted: Sequence[Any] = bundle.manifest.get("parity", {}).get("activations", ())
    kept = sum(entry["tower"] == tower and bool(entry["kept_fp32"]) for entry in noted)
    return architecture.text_layers if tower == "text" else architecture.vision_layers, kept


def _set_timing_cache(config: Any, content: bytes, what: str, log: BuildLog) -> Any:
    """Gives the builder what earlier builds measured, or an empty cache where that is of another GPU or version."""
    for tried in dict.fromkeys((content, b"")):
        cache = config.create_timing_cache(tried)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return _given(None, "an empty timing cache", what, log)


def _add_profile(builder: Any, config: Any, request: PlanRequest, profile: Profile, log: BuildLog) -> None:
    """One length, so that kernels are chosen for it alone; tuned for the largest batch, which a long run is made of."""
    name = INPUT_NAMES[request.tower]
    whose = f"the {request.tower} engine's profile of {profile}"
    added = _given(builder.create_optimization_profile(), "a profile", whose, log)
    shapes = [request.shape(rows, profile.length) for rows in (profile.least, profile.most, profile.most)]
    try:
        added.set_shape(name, *shapes)
    except (ValueError, RuntimeError, TypeError) as error:
        raise EngineError(f"The library refused the shapes {shapes} for {whose}: {error}.") from error
    index = config.add_optimization_profile(added)
    if index != profile.index:
        raise EngineError(f"The library refused {whose}, with the shapes {shapes}: {log.reason()}.")


def _logged_memory(request: PlanRequest, log: BuildLog) -> tuple[int | None, ...]:
    if len(log.activations) == len(request.profiles):
        return tuple(log.activations)
    return (None,) * len(request.profiles)


def _memory_on_device(request: PlanRequest, plan: Any, log: BuildLog) -> tuple[int | None, ...]:
    """Loads the plan on the GPU that it was built for, which proves that this works, and asks what it needs."""
    library = request.library
    whose = f"the {request.tower} engine that was just built"
    logger = logger_for(library, log)
    try:
        runtime = library.Runtime(logger)
    except (TypeError, RuntimeError) as error:
        raise EngineError(f"{library.__name__} cannot load {whose}: {log.reason()}.") from error
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"{library.__name__} cannot load {whose}: {log.reason()}.")
    return tuple(engine.get_device_memory_size_for_profile_v2(profile.index) for profile in request.profiles)
