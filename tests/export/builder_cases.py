"""Cases of the builder over TensorRT's bindings; `test_engine_conformance.py` runs them in a process of its own."""

from __future__ import annotations

import importlib
import linecache
import os
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from imitated_builder import Imitated, Library, World, network_of, overrides_like

from longclip_rt.bundle.bundle import BUILT_IN, Bundle, load_bundle
from longclip_rt.errors import EngineError
from longclip_rt.export.tensorrt import build as engine
from longclip_rt.export.tensorrt import builders as engine_builders
from longclip_rt.export.tensorrt import network as engine_network
from longclip_rt.export.tensorrt import plan as engine_plan
from longclip_rt.export.tensorrt.build import EngineOptions, build_engines, choose_builders
from longclip_rt.system.machine import CudaDevice
from longclip_rt.tensorrt.engines import Target, engines_of, find_engine

BACKEND = os.environ["IMITATED_BACKEND"]
REAL: Any = importlib.import_module({"tensorrt": "tensorrt_bindings"}.get(BACKEND, "tensorrt_rtx"))
PACKAGE = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}[BACKEND]
OPTIONS = EngineOptions("fp16", (32, 77), (1, 8), optimization_level=2, workspace_mib=64)
CARD = CudaDevice("NVIDIA L4", 89, 24 << 30)
BLOCKS = 4  # of the built-in model's towers
BLOCK = [("ATTENTION_INPUT", "HALF"), ("ATTENTION_OUTPUT", "HALF"), *[("MATRIX_MULTIPLY", "HALF")] * 4]
LAYERS = [*BLOCK * BLOCKS, ("CONVOLUTION", "HALF"), ("REDUCE", "FLOAT")]
# What gives what is there already: the build would not have come so far.
ACCESSORS = {"INetworkDefinition.get_layer", "ILayer.get_output", "OnnxParser.get_error"}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(REAL)
    made.answers |= network_of(made, LAYERS)
    profiles: dict[int, list[Any]] = {}

    def add_profile(config: Any, profile: Any) -> int:
        """Counts within a configuration, which is kept so that no other one gets its identity."""
        known = profiles.setdefault(id(config), [config])
        known.append(profile)
        return len(known) - 2

    made.answers["IBuilderConfig.add_optimization_profile"] = add_profile
    made.answers["ICudaEngine.get_device_memory_size_for_profile_v2"] = lambda engine, index: 1000 + index
    made.answers["Builder.build_serialized_network"] = build
    monkeypatch.setitem(sys.modules, PACKAGE, Library(made, PACKAGE))
    monkeypatch.setattr(engine_builders, "cuda_devices", lambda: [CARD])
    return made


def build(builder: Any, network: Any, config: Any) -> bytes:
    """Does with the monitor what a build does."""
    monitor = config._own["progress_monitor"]
    overrides_like(REAL.IProgressMonitor, monitor)
    monitor.phase_start("Building", None, 2)
    monitor.phase_start("Timing", "Building", 4)
    assert monitor.step_complete("Timing", 1) and monitor.step_complete("Building", 0)
    monitor.phase_finish("Timing")
    monitor.phase_finish("Building")
    return b"a plan"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return load_bundle(shutil.copytree(BUILT_IN, tmp_path / "bundle"))


def built(bundle: Bundle, **keywords: Any) -> list[engine.BuiltEngine]:
    return build_engines(bundle, choose_builders(BACKEND), OPTIONS, **keywords)


def test_a_whole_build_asks_for_nothing_that_the_library_lacks(world: World, bundle: Bundle) -> None:
    stages: list[tuple[str, float]] = []
    (result,) = built(bundle, report=lambda stage, done: stages.append((stage, done)))
    made = result.engine
    calls = [name for name, _ in world.calls]
    assert ("Builder.create_network", (1 << int(REAL.NetworkDefinitionCreationFlag.STRONGLY_TYPED),)) in world.calls
    flags = [
        arguments for name, arguments in world.calls if name in ("IBuilderConfig.set_flag", "IBuilderConfig.flags")
    ]
    wanted = getattr(REAL.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)  # of TensorRT-RTX alone; none is of precision
    assert flags == ([] if wanted is None else [(wanted,)] * 2) and (wanted is None) == (BACKEND == "tensorrt")
    levels = [arguments for name, arguments in world.calls if name == "IBuilderConfig.builder_optimization_level"]
    # TensorRT-RTX takes no heed of it: engines that are the same have one key.
    assert levels == ([(2,)] * 2 if BACKEND == "tensorrt" else [])
    assert made.key.options["optimization_level"] == (2 if BACKEND == "tensorrt" else None)
    assert ("IBuilderConfig.set_memory_pool_limit", (REAL.MemoryPoolType.WORKSPACE, 64 << 20)) in world.calls
    shapes = [arguments[1:] for name, arguments in world.calls if name == "IOptimizationProfile.set_shape"]
    texts = [((least, n), (most, n), (most, n)) for n in (32, 77, 248) for least, most in ((1, 1), (2, 8))]
    images = [((least, 3, 96, 96), (most, 3, 96, 96), (most, 3, 96, 96)) for least, most in ((1, 1), (2, 8))]
    assert shapes == [*texts, *images]
    assert calls.count("Builder.build_serialized_network") == 2
    assert made.key.gpu == ("NVIDIA L4" if BACKEND == "tensorrt" else "") and made.key.archs == (89,)
    assert [entry["memory"] for entry in made.towers["text"]["profiles"]] == [*range(1000, 1006)]
    assert made.towers["text"]["attention"] == BLOCKS and made.plan("image") == b"a plan"
    assert find_engine(bundle, Target(BACKEND, REAL.__version__, "NVIDIA L4", 89), "fp16").path == made.path
    assert [done for _, done in stages] == sorted(done for _, done in stages)
    assert stages[-1][0] == "sm_89 image Building"


def test_every_refusal_of_the_library_is_an_error(world: World, bundle: Bundle) -> None:
    built(bundle)
    shutil.rmtree(bundle.path / "engines")
    refusals = {"bool": False, "int": -1}
    tried = []
    for name, documented in list(world.returns.items()):
        is_object = name == documented or world.resolve(documented) is not None
        is_enumeration = hasattr(world.resolve(documented), "__members__")
        is_refusable = is_object or documented == "bool" or name.endswith("add_optimization_profile")
        if name in ACCESSORS or is_enumeration or not is_refusable:
            continue
        answers = dict(world.answers)
        world.answers[name] = None if is_object else refusals[documented]
        with pytest.raises(EngineError, match=r"the library gave no reason\.$"):
            built(bundle)
        world.answers = answers
        tried.append(name)
        assert not list((bundle.path / "engines").iterdir()), f"{name} left something behind"
    assert {"Builder", "OnnxParser.parse", "Builder.build_serialized_network"} <= set(tried)
    assert ("ITimingCache.serialize" in tried) == (BACKEND == "tensorrt")
    assert len(tried) >= 10


def test_the_parsers_errors_carry_the_node(world: World, bundle: Bundle) -> None:
    error = Imitated(world, REAL.ParserError)
    world.answers |= {
        "OnnxParser.parse": False, "OnnxParser.num_errors": 5, "OnnxParser.get_error": error,
        "ParserError.node_name": "node_1", "ParserError.node_operator": "Attention", "ParserError.desc": "No\n good.",
    }  # fmt: skip
    with pytest.raises(EngineError, match=r"node node_1 \(Attention\): No good; .*; and 2 more like it\."):
        built(bundle)


@pytest.mark.parametrize(
    ("member", "message", "sentence"),
    [
        ("Builder.build_serialized_network", "OutOfMemory: no.", "sm_89: there is too little memory. Free memory"),
        ("Runtime.deserialize_cuda_engine", "expecting compute 8.6 got compute 8.9", "it was built for another GPU"),
        ("Runtime.deserialize_cuda_engine", "Version tag does not match.", "by another version of the library"),
        ("Runtime.deserialize_cuda_engine", "Something\nelse.", "the library said: Something else."),
    ],
)
def test_what_the_library_logs_becomes_the_reason(
    world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, member: str, message: str, sentence: str
) -> None:
    loggers: list[Any] = []
    original = engine_plan.logger_for
    monkeypatch.setattr(engine_plan, "logger_for", lambda *given: loggers.append(original(*given)) or loggers[-1])

    def refuse(owner: Any, *arguments: Any) -> None:
        overrides_like(REAL.ILogger, loggers[-1])
        loggers[-1].log(REAL.ILogger.Severity.WARNING, "Magic tag, but only a warning.")
        loggers[-1].log(REAL.ILogger.Severity.ERROR, message)

    world.answers[member] = refuse
    with pytest.raises(EngineError, match=sentence):
        built(bundle)


if BACKEND == "tensorrt":

    def test_timings_are_kept_and_shared(world: World, bundle: Bundle) -> None:
        world.answers["ITimingCache.serialize"] = lambda cache: b"timings %d" % len(world.calls)

        def given() -> list[bytes]:
            found = [arguments[0] for name, arguments in world.calls if name == "IBuilderConfig.create_timing_cache"]
            world.calls.clear()
            return found

        (first,) = built(bundle)
        cold, from_text = given()
        assert cold == b"" and from_text.startswith(b"timings")
        kept = (first.engine.path / "timing.cache").read_bytes()
        (second,) = build_engines(bundle, choose_builders(BACKEND), EngineOptions("fp16", (32,), (4,)))
        assert given()[0] == kept
        newest = (second.engine.path / "timing.cache").read_bytes()
        world.answers["IBuilderConfig.create_timing_cache"] = lambda config, data: (
            None if data else Imitated(world, REAL.ITimingCache)
        )
        built(bundle)  # of another driver, say: the build begins without it
        assert given()[:2] == [newest, b""]
        assert len(engines_of(bundle)[0]) == 2

    def test_timings_that_cannot_be_read_are_done_without(world: World, bundle: Bundle) -> None:
        (first,) = built(bundle)
        cache = first.engine.path / "timing.cache"
        cache.unlink()
        cache.mkdir()  # as unreadable as another user's file
        assert "timing.cache cannot be read" in first.engine.damage()
        (second,) = built(bundle, missing=True)
        assert second.built and not second.engine.damage()

else:

    def test_nothing_is_asked_about_timings(world: World, bundle: Bundle) -> None:
        (first,) = built(bundle)
        assert not [name for name, _ in world.calls if "iming" in name] and "timing.cache" not in first.engine.files


def test_fp32_is_not_lowered_to_tf32(world: World, bundle: Bundle) -> None:
    built(bundle)
    assert not [name for name, _ in world.calls if name == "IBuilderConfig.clear_flag"]
    world.answers |= network_of(world, [(kind, kinds.replace("HALF", "FLOAT")) for kind, kinds in LAYERS])
    build_engines(bundle, choose_builders(BACKEND), EngineOptions("fp32", (32,), (2,)))
    cleared = [arguments for name, arguments in world.calls if name == "IBuilderConfig.clear_flag"]
    assert cleared == [(REAL.BuilderFlag.TF32,)] * 2


def test_the_gate(world: World, bundle: Bundle) -> None:
    world.answers |= network_of(world, [*LAYERS[2:], ("SOFTMAX", "HALF"), ("MATRIX_MULTIPLY", "FLOAT")])
    wanted = "3 of 4 attention blocks.*1 softmax layers stand outside.*1 matrix products compute in fp32, and 0 may"
    with pytest.raises(EngineError, match=wanted):
        built(bundle)


if BACKEND == "tensorrt":

    class Registry:
        """Stands for TensorRT's registry, which is a null pointer here."""

        def __init__(self) -> None:
            self.names: list[str] = []

        def register_creator(self, creator: Any, plugin_namespace: str) -> bool:
            self.names.append(f"{plugin_namespace}::{creator.name}")
            return True

        def get_creator(self, name: str, version: str, plugin_namespace: str) -> Any:
            return None

    def test_the_plugin_is_registered_and_its_code_wanted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """A bundle with the plug-in graphs, whose PCA TensorRT computes inside the engine."""
        from longclip_rt.export import plugin

        registry = Registry()
        monkeypatch.setattr(REAL, "get_plugin_registry", lambda: registry)
        monkeypatch.setitem(sys.modules, "tensorrt", REAL)
        importlib.import_module("tensorrt.plugin")  # TensorRT's own Python code, over its real classes
        monkeypatch.setitem(sys.modules, "tensorrt", Library(world, "tensorrt"))
        monkeypatch.setattr(plugin, "_registered", {})
        bundle = load_bundle(os.environ["PCA_BUNDLE"])
        blocks = {"text": 3, "image": 2}
        towers = iter(blocks.values())
        world.answers["OnnxParser.parse"] = lambda parser, graph, path: (
            world.answers.update(network_of(world, BLOCK * next(towers))) or True
        )
        (result,) = build_engines(bundle, choose_builders(BACKEND), EngineOptions("fp16", (32,), (2,)))
        assert result.engine.key.options["pca_head"] == "plugin"
        assert registry.names == ["longclip::pca_head"]
        flags = REAL.NetworkDefinitionCreationFlag
        wanted = 1 << int(flags.STRONGLY_TYPED) | 1 << int(flags.PREFER_AOT_PYTHON_PLUGINS)
        assert [arguments for name, arguments in world.calls if name == "Builder.create_network"] == [(wanted,)] * 2
        parsed = [arguments for name, arguments in world.calls if name == "OnnxParser.parse"]
        assert [Path(path).name for _, path in parsed] == ["text.fp16.plugin.onnx", "image.fp16.plugin.onnx"]
        assert not (result.engine.path / "pca_head.json").exists()


def lines_run(run: Any) -> dict[str, set[int]]:
    """File -> lines of the builder that ran."""
    files = {module.__file__ for module in (engine, engine_builders, engine_plan, engine_network)}
    lines: dict[str, set[int]] = defaultdict(set)

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        lines[frame.f_code.co_filename].add(frame.f_lineno)
        return trace

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return lines


if BACKEND == "tensorrt":

    def test_the_same_code_builds_for_both_libraries(world: World, bundle: Bundle) -> None:
        """Real TensorRT-RTX and TensorRT's bindings: line for line, but for the card and the account of memory."""
        pytest.importorskip("tensorrt_rtx")
        options = EngineOptions("fp16", (32,), (2,))
        ours = lines_run(lambda: build_engines(bundle, choose_builders("tensorrt"), options))
        theirs = lines_run(lambda: build_engines(bundle, choose_builders("tensorrt-rtx", (86,)), options))
        assert set(ours) == set(theirs) and len(ours) == 4
        plan = engine_plan.__file__
        assert len(ours[plan] & theirs[plan]) > 40
        differing = [linecache.getline(file, line) for file in ours for line in ours[file] ^ theirs[file]]
        source = "".join(differing)
        for once in ("config.num_compute_capabilities = 1", "runtime.deserialize_cuda_engine(plan)", "return chosen"):
            assert once in source
        for never in ("create_network", "parse(", "profile(", "build_serialized"):
            assert never not in source
