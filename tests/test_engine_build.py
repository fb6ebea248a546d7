from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from longclip_rt.bundle import load_bundle
from longclip_rt.engines import Target, find_engine
from longclip_rt.errors import EngineError
from longclip_rt.export.engine import EngineOptions, build_engines, check_network, offered_archs, parse_network

trt = pytest.importorskip("tensorrt_rtx")
OPTIONS = EngineOptions((8,), (1, 2, 4))


def test_real_engines_for_every_capability_are_found_by_the_runtime(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = load_bundle(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    archs = offered_archs(trt)
    built = build_engines(bundle, "tensorrt-rtx", archs, OPTIONS)
    assert len(built) == len(archs) >= 6
    for arch in archs:
        engine = find_engine(bundle, Target("tensorrt-rtx", trt.__version__, "any", arch), "fp16")
        assert engine.plan("text") and engine.plan("image")
    shutil.rmtree(built[0][0])
    again = build_engines(bundle, "tensorrt-rtx", archs, OPTIONS, missing=True)
    assert [folder for folder, _ in again] == [built[0][0]]


def test_the_gate_refuses_a_network_with_too_few_fused_attentions(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network, _parser = parse_network(trt, logger, builder, bundle.onnx("text", "fp16"))
    with pytest.raises(EngineError, match="fused attention"):
        check_network(trt, network, bundle.architecture.text_layers + 1)
