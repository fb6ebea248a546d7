"""Engines of a bundle: one builder for TensorRT and TensorRT-RTX, which needs neither torch nor the weights."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longclip_rt.backends.base import INPUT_NAMES
from longclip_rt.backends.tensorrt import import_library
from longclip_rt.bundle import TOWERS, Bundle, onnx_name
from longclip_rt.engines import ENGINES, EngineKey, engines_of, plan_name, write_engine_manifest
from longclip_rt.errors import BackendError, EngineError
from longclip_rt.extras import require

BUCKETS = (32, 77, 128, 248)
BATCHES = (1, 32, 256)


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is built with.

    Attributes:
        buckets: Token counts of the text profiles; those beyond the model's context are left out.
        batches: Fewest rows, the rows that it is tuned for, and most rows.
        level: Optimisation level 0 to 5; None for the library's own.
    """

    buckets: tuple[int, ...] = BUCKETS
    batches: tuple[int, int, int] = BATCHES
    level: int | None = None

    def lengths(self, context: int) -> tuple[int, ...]:
        """The buckets of a model, shortest first; the whole context is always among them."""
        return tuple(sorted({length for length in self.buckets if length < context} | {context}))


@dataclass(frozen=True)
class TowerSummary:
    """What was built of one tower.

    Attributes:
        layers: Layers of the network by type and precision.
        attention: Fused attention layers.
        plan_bytes: Size of the plan.
        seconds: Build time.
    """

    layers: dict[str, int]
    attention: int
    plan_bytes: int
    seconds: float


def offered_archs(library: Any) -> tuple[int, ...]:
    """The compute capabilities times ten that TensorRT-RTX builds for."""
    names = library.ComputeCapability.__members__
    return tuple(sorted(int(name[2:]) for name in names if name.startswith("SM")))


def build_engines(
    bundle: Bundle, backend: str, archs: Sequence[int], options: EngineOptions, gpu: str = "", *, missing: bool = False
) -> list[tuple[Path, dict[str, TowerSummary]]]:
    """Builds one engine per architecture from a bundle's fp16 graphs.

    Args:
        bundle: The model.
        backend: `tensorrt` or `tensorrt-rtx`.
        archs: Compute capabilities times ten.
        options: What to build with.
        gpu: The card's name, for TensorRT, whose engines belong to it.
        missing: Leave out what is there already.

    Returns:
        Each new engine's folder, and its towers' summaries.

    Raises:
        BackendError: The library cannot be imported.
        EngineError: A graph or an option is refused, or the build fails.
    """
    library = import_library(backend)
    if "fp16" not in bundle.precisions:
        raise EngineError(f"The bundle {bundle.path} has no fp16 graphs. Export it again with --fp16.")
    least, tuned, most = options.batches
    if not 1 <= least <= tuned <= most or min(options.buckets, default=0) < 1:
        raise EngineError(
            f"Batches must be three numbers that do not fall, and buckets at least 1; given were {options.batches} "
            f"and {options.buckets}."
        )
    if backend == "tensorrt-rtx" and (unknown := set(archs) - set(offered_archs(library))):
        raise EngineError(
            f"TensorRT-RTX does not build for {', '.join(f'sm{arch}' for arch in sorted(unknown))}; it offers "
            f"{', '.join(f'sm{arch}' for arch in offered_archs(library))}."
        )
    hashes = {tower: bundle.manifest["files"][onnx_name(tower, "fp16")]["sha256"] for tower in TOWERS}
    built = []
    for arch in archs:
        kept: dict[str, Any] = asdict(options) | {"buckets": list(options.buckets), "batches": list(options.batches)}
        key = EngineKey(backend, str(library.__version__), gpu, (arch,), "fp16", hashes, kept)
        if missing and any(engine.key.name == key.name for engine in engines_of(bundle)[0]):
            continue
        home = bundle.path / ENGINES
        home.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=".building-") as scratch:
            work = Path(scratch) / key.name
            work.mkdir()
            towers = {tower: _build(library, bundle, backend, tower, arch, options, work) for tower in TOWERS}
            write_engine_manifest(work, key, {"towers": {tower: asdict(one) for tower, one in towers.items()}})
            shutil.rmtree(home / key.name, ignore_errors=True)
            work.rename(home / key.name)
        built.append((home / key.name, towers))
    return built


def graph_bytes(file: Path) -> bytes:
    """A graph without `softmax_precision`, which TensorRT's parser refuses; its weights stay in their own file."""
    onnx = require("onnx", "export")
    model = onnx.load(str(file), load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "Attention":
            kept = [attribute for attribute in node.attribute if attribute.name != "softmax_precision"]
            del node.attribute[:]
            node.attribute.extend(kept)
    return bytes(model.SerializeToString())


def parse_network(library: Any, logger: Any, builder: Any, file: Path) -> tuple[Any, Any]:
    """Parses a graph into a strongly typed network; returns it with the parser, which owns its weights.

    Raises:
        EngineError: The parser refuses the graph; the message names the nodes.
    """
    flags = library.NetworkDefinitionCreationFlag.__members__
    typed = flags.get("STRONGLY_TYPED")
    network = _need(builder.create_network(0 if typed is None else 1 << int(typed)), "create a network")
    parser = library.OnnxParser(network, logger)
    if not parser.parse(graph_bytes(file), str(file)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        told = "; ".join(
            f"node {error.node_name() or '?'} ({error.node_operator()}): {error.desc()}" for error in errors
        )
        raise EngineError(f"The parser refuses {file}: {told or 'it gave no reason'}.")
    return network, parser


def check_network(library: Any, network: Any, blocks: int, fp32_matmuls: int = 0) -> tuple[dict[str, int], int]:
    """Counts a network's layers, and holds them to the gate.

    Raises:
        EngineError: An attention is not fused, or a MatMul runs in fp32.
    """
    layers: Counter[str] = Counter()
    attention = wide = 0
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        kind = layer.get_output(0).dtype if layer.num_outputs else None
        layers[f"{layer.type.name} {getattr(kind, 'name', '-')}"] += 1
        attention += layer.type == library.LayerType.ATTENTION_INPUT
        wide += layer.type == library.LayerType.MATRIX_MULTIPLY and kind == library.DataType.FLOAT
    if attention != blocks or wide > fp32_matmuls:
        raise EngineError(
            f"The network has {attention} fused attention layers for {blocks} blocks, and {wide} fp32 MatMuls where "
            f"{fp32_matmuls} are allowed. Export the bundle again with this version."
        )
    return dict(layers), attention


def _build(
    library: Any, bundle: Bundle, backend: str, tower: str, arch: int, options: EngineOptions, work: Path
) -> TowerSummary:
    started = time.monotonic()
    logger = library.Logger(library.Logger.ERROR)
    builder = _need(library.Builder(logger), "create a builder")
    network, parser = parse_network(library, logger, builder, bundle.onnx(tower, "fp16"))
    shape = bundle.architecture
    blocks = shape.text_layers if tower == "text" else shape.vision_layers
    noted = bundle.manifest.get("parity", {}).get("activations", ())
    kept = sum(entry["tower"] == tower and entry["kept_fp32"] for entry in noted)
    layers, attention = check_network(library, network, blocks, 4 * kept)  # query-key-value, output, and the MLP's two
    config = _need(builder.create_builder_config(), "create a configuration")
    if options.level is not None:
        config.builder_optimization_level = options.level
    if backend == "tensorrt-rtx":
        config.num_compute_capabilities = 1
        _need(config.set_compute_capability(getattr(library.ComputeCapability, f"SM{arch}"), 0), f"take sm{arch}")
    cache_file = bundle.path / ENGINES / f"{backend}-sm{arch}.timing"
    cache = None
    if backend == "tensorrt":  # RTX times nothing when it builds
        cache = config.create_timing_cache(cache_file.read_bytes() if cache_file.is_file() else b"")
        _need(config.set_timing_cache(cache, False), "take the timing cache")
    config.progress_monitor = _monitor(library, tower)
    name = INPUT_NAMES[tower]
    size = shape.image_size
    tails = [(n,) for n in options.lengths(shape.context_length)] if tower == "text" else [(3, size, size)]
    for tail in tails:
        profile = _need(builder.create_optimization_profile(), "create a profile")
        # set_shape returns nothing in these bindings, and raises ValueError for what does not fit.
        profile.set_shape(name, *((rows, *tail) for rows in options.batches))
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"The library refuses the profile {options.batches} x {tail} of {name}.")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(
            f"The {tower} engine for sm{arch} could not be built; the library's messages are above. Where memory ran "
            "out, give a smaller last number to --batches."
        )
    del parser
    (work / plan_name(tower)).write_bytes(plan)
    if cache is not None:
        cache_file.write_bytes(_need(cache.serialize(), "write the timing cache"))
    return TowerSummary(layers, attention, (work / plan_name(tower)).stat().st_size, time.monotonic() - started)


def _need(value: Any, what: str) -> Any:
    if value is None or value is False:
        raise EngineError(f"The library could not {what}; its messages are above.")
    return value


def _monitor(library: Any, tower: str) -> Any:
    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.bars: dict[str, Any] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.bars[phase_name] = tqdm(total=num_steps, desc=f"{tower}: {phase_name}", file=sys.stderr, leave=False)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if bar := self.bars.get(phase_name):
                bar.update(step + 1 - bar.n)
            return True

        def phase_finish(self, phase_name: str) -> None:
            if bar := self.bars.pop(phase_name, None):
                bar.close()

    return Monitor()


def choose_library(engine: str) -> str:
    """`auto`: TensorRT where it can be imported, else TensorRT-RTX."""
    if engine != "auto":
        return engine
    try:
        import_library("tensorrt")
    except BackendError:
        return "tensorrt-rtx"
    return "tensorrt"
