"""Real TensorRT-RTX engines, built on a machine without a GPU from the graphs of the built-in model."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from longclip_rt.bundle.bundle import BUILT_IN, Bundle, load_bundle
from longclip_rt.choices import EVERY
from longclip_rt.cli import longclip_rt
from longclip_rt.errors import BundleError, EngineError, MissingExtraError
from longclip_rt.export.tensorrt.build import EngineOptions, build_engines, choose_builders, without_effect
from longclip_rt.export.tensorrt.plan import PlanRequest, build_plan
from longclip_rt.system.machine import CudaDevice
from longclip_rt.tensorrt.engines import Target, engines_of, find_engine, graph_hashes

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not to be had for this system")

MODEL = BUILT_IN  # named here, since no test finds it by itself
SMALL = EngineOptions("fp16", (32,), (8,))
SMALL_ARGUMENTS = ["--engine", "tensorrt-rtx", "--text-buckets", "32", "--batches", "8"]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(longclip_rt, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The built-in model with an engine for every compute capability, and how the command ended that built them."""
    path = shutil.copytree(MODEL, tmp_path_factory.mktemp("engines") / "bundle")
    return path, run("engine", "build", path, "--arch", "all", *SMALL_ARGUMENTS)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return load_bundle(shutil.copytree(MODEL, tmp_path / "bundle"))


def offered() -> list[int]:
    return sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if name.startswith("SM"))


def test_every_compute_capability_gets_an_engine_that_the_runtime_finds(engines: tuple[Path, Any]) -> None:
    path, result = engines
    assert result.exit_code == 0, result.output
    bundle = load_bundle(path)  # its own files are as they were
    assert len(result.stdout.splitlines()) == len(offered()) >= 6
    for arch in offered():
        found = find_engine(bundle, Target("tensorrt-rtx", trt.__version__, "any card", arch), "fp16")
        assert found.key.archs == (arch,) and str(found.path) in result.stdout
        assert found.key.onnx == graph_hashes(bundle, "fp16")
        for tower in ("text", "image"):
            assert len(found.plan(tower)) > bundle.onnx(tower, "fp16").stat().st_size  # the weights, and code
        assert [(one.index, one.length, one.most) for one in found.profiles("text")] == [(0, 32, 8), (1, 248, 8)]
        assert [(one.index, one.length, one.most) for one in found.profiles("image")] == [(0, None, 8)]
    assert not [entry for entry in (path / "engines").iterdir() if entry.name.startswith(".")]


def test_the_summary_tells_of_attention_precision_memory_size_and_time(engines: tuple[Path, Any]) -> None:
    path, result = engines
    for engine in engines_of(load_bundle(path))[0]:
        for tower, facts in engine.towers.items():
            assert facts["attention"] == facts["blocks"] == facts["changed_nodes"] == 4 and facts["decomposable"] == 0
            # Four in a block, and the projection; nothing in fp32.
            assert facts["layers"]["MATRIX_MULTIPLY HALF"] == 17 and facts["fp32_products"] == 0
            assert not [name for name in facts["layers"] if name.startswith("SOFTMAX")]
            memory = [profile["memory"] for profile in facts["profiles"]]
            assert min(memory) > 1_000_000 and memory == sorted(memory) and facts["weights"] > 3_000_000
            assert facts["plan_bytes"] == (engine.path / f"{tower}.plan").stat().st_size and facts["seconds"] > 0
        assert engine.device_bytes and engine.device_bytes > 7_000_000
    assert "text: 4 of 4 attention blocks fused, 0 matrix products in fp32; plan" in result.stderr
    assert "softmax_precision was taken out of 4 Attention nodes" in result.stderr
    assert "layers in HALF: SHUFFLE" in result.stderr and "layers in FLOAT" in result.stderr
    assert "32        1-8" in result.stderr and "100%" in result.stderr


def test_list_names_each_and_why_it_is_not_for_this_machine(
    engines: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = engines
    monkeypatch.setattr("longclip_rt.tensorrt.engines.cuda_devices", lambda: [])
    text = run("engine", "list", path).stdout
    assert text.count("not usable here: there is no NVIDIA GPU with a driver here") == len(offered())
    monkeypatch.setattr("longclip_rt.tensorrt.engines.cuda_devices", lambda: [CudaDevice("RTX 4090", 89, 24 << 30)])
    rows = json.loads(run("engine", "list", path, "--json").stdout)
    assert [row["archs"] for row in rows if row["usable"]] == [[89]]
    reasons = {row["reason"] for row in rows if row["archs"] == [120]}
    assert reasons == {"it was built for sm_120, and this GPU is sm_89"}
    text = run("engine", "list", path).stdout
    assert f"tensorrt-rtx {trt.__version__}, any card of sm_89, fp16; texts of 32, 248 tokens, batches up to 8" in text
    monkeypatch.setattr("longclip_rt.tensorrt.engines.cuda_devices", lambda: [CudaDevice("RTX 4090", 89, 1 << 20)])
    assert "MiB of GPU memory, and this GPU has 1 MiB" in run("engine", "list", path).stdout


def test_missing_builds_what_is_absent_or_damaged_and_nothing_else(engines: tuple[Path, Any], tmp_path: Path) -> None:
    path = shutil.copytree(engines[0], tmp_path / "bundle")
    bundle = load_bundle(path)
    by_arch = {engine.key.archs[0]: engine.path for engine in engines_of(bundle)[0]}
    shutil.rmtree(by_arch[75])
    with (by_arch[120] / "image.plan").open("r+b") as plan:
        plan.write(b"XX")
    (by_arch[121] / "engine.json").write_text("{")
    before = {arch: (by_arch[arch] / "engine.json").stat().st_mtime_ns for arch in (80, 86, 89)}
    results = build_engines(bundle, choose_builders("tensorrt-rtx", EVERY), SMALL, missing=True)
    assert [result.engine.key.archs[0] for result in results if result.built] == [75, 120, 121]
    assert not any(result.engine.damage() for result in results)
    assert before == {arch: (by_arch[arch] / "engine.json").stat().st_mtime_ns for arch in before}
    other = dataclasses.replace(SMALL, batches=(4,))
    (result,) = build_engines(bundle, choose_builders("tensorrt-rtx", (80,)), other, missing=True)
    assert result.built and result.engine.path != by_arch[80] and by_arch[80].is_dir()


def test_building_needs_neither_torch_nor_the_weights(bundle: Bundle) -> None:
    arguments = ["engine", "build", str(bundle.path), "--arch", "sm_86", *SMALL_ARGUMENTS]
    assert not Path(bundle.manifest["source"]["weights"]).exists()
    script = (
        "import sys\n"
        "for name in ('torch', 'open_clip', 'onnxruntime', 'openvino'): sys.modules[name] = None\n"
        "from longclip_rt.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0 and "tensorrt-rtx-sm86-" in result.stdout, result.stderr


def test_the_librarys_own_reason_is_told_where_there_is_no_gpu(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    few = ("--engine", "tensorrt-rtx", "--arch", "sm89", "--text-buckets", "32")
    result = run("engine", "build", bundle.path, *few, "--batches", "2000000000")
    assert isinstance(result.exception, EngineError)
    assert "kOPT values for profile 0 violate shape constraints" in str(result.exception)
    assert "tensor volume exceeds 1099511627776" in str(result.exception) and "driver" not in str(result.exception)
    with caplog.at_level("DEBUG", "longclip_rt"):
        build_engines(bundle, choose_builders("tensorrt-rtx", (89,)), SMALL)
    assert "cudaError" not in caplog.text and "TensorRT: " in caplog.text


def test_an_architecture_that_fails_ends_none_of_the_others(bundle: Bundle) -> None:
    archs = ("--arch", "sm75", "--arch", "sm80", "--arch", "sm89")
    result = run("engine", "build", bundle.path, *archs, *SMALL_ARGUMENTS, "--precision", "fp32")
    assert isinstance(result.exception, EngineError) and result.exit_code == 1
    assert str(result.exception).startswith("1 of 3 engines could not be built. sm_75: tensorrt_rtx could not build")
    assert "Build it with --precision fp16, or leave its architecture out." in str(result.exception)
    built = {engine.key.archs: str(engine.path) for engine in engines_of(bundle)[0]}
    assert result.stdout.split() == [built[(80,)], built[(89,)]]
    # In fp32 there is no fused kernel, and none is claimed.
    assert result.stderr.count("0 of 4 attention blocks fused, ") == 4
    assert result.stderr.count("4 attention blocks are in fp32, which no fused kernel takes; they are taken apart") == 4


def test_what_was_built_before_ctrl_c_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    archs: list[int] = []

    def build(request: Any, *others: Any) -> Any:
        archs.append(request.arch)
        if request.arch == 86:
            raise KeyboardInterrupt
        return build_plan(request, *others)

    monkeypatch.setattr("longclip_rt.export.tensorrt.build.build_plan", build)
    result = run("engine", "build", bundle.path, "--arch", "sm80,sm86,sm89", *SMALL_ARGUMENTS)
    (made,) = engines_of(bundle)[0]
    assert result.exit_code == 1 and result.stdout == f"{made.path}\n" and archs == [80, 80, 86]
    assert f"{made.path.name}: tensorrt-rtx" in result.stderr and "Aborted!" in result.stderr


def test_options_that_do_nothing_are_said_and_change_no_key(bundle: Bundle) -> None:
    plain = run("engine", "build", bundle.path, "--arch", "sm89", *SMALL_ARGUMENTS)
    assert plain.exit_code == 0 and "left out" not in plain.stderr and "bucket" not in plain.stderr
    more = ("--optimization-level", "5", "--text-buckets", "32,300,500", "--missing")
    result = run("engine", "build", bundle.path, "--arch", "sm89", *SMALL_ARGUMENTS, *more)
    assert result.exit_code == 0 and result.stdout == plain.stdout and "kept, it was there already" in result.stderr
    assert "tensorrt-rtx heeds no optimisation level; 5 is left out." in result.stderr
    assert "at most 248 tokens: a bucket of 248 is built, and of 300, 500 none." in result.stderr
    assert without_effect(EngineOptions(optimization_level=5), "tensorrt", 77) == []


def test_a_workspace_beyond_any_gpu_is_a_usage_error(bundle: Bundle) -> None:
    result = run("engine", "build", bundle.path, *SMALL_ARGUMENTS, "--workspace", "99999999999999")
    assert result.exit_code == 2 and "1<=x<=1048576" in result.stderr
    with pytest.raises(EngineError, match="should be 1 to 1048576 MiB"):
        EngineOptions(workspace_mib=99999999999999)


def test_timings_that_cannot_be_read_are_done_without(bundle: Bundle) -> None:
    (first,) = build_engines(bundle, choose_builders("tensorrt-rtx", (89,)), SMALL)
    cache = first.engine.path / "timing.cache"
    cache.unlink()
    cache.mkdir()  # as unreadable as another user's file
    assert "timing.cache cannot be read" in first.engine.damage()
    (second,) = build_engines(bundle, choose_builders("tensorrt-rtx", (89,)), SMALL, missing=True)
    assert second.built and not second.engine.damage()


def test_a_model_of_one_head_is_built_with_the_default_batches(tiny_bundle: Path, tmp_path: Path) -> None:
    """TensorRT-RTX has no fused attention for one row of one head, and has one for 1 to 32 rows."""
    bundle = load_bundle(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    arguments = ("engine", "build", bundle.path, "--engine", "tensorrt-rtx", "--arch", "sm89", "--text-buckets", "32")
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("no fused attention takes batches of one row alone; they are in one range") == 1
    (engine,) = engines_of(bundle)[0]
    rows = {tower: [(one.least, one.most) for one in engine.profiles(tower)] for tower in ("text", "image")}
    assert rows == {"text": [(1, 32), (33, 256)] * 2, "image": [(1, 1), (2, 32), (33, 256)]}
    assert [one.index for one in engine.profiles("text")] == [0, 1, 2, 3]
    assert engine.key.options["batches"] == [1, 32, 256]
    assert "kept, it was there already" in run(*arguments, "--missing").stderr
    result = run(*arguments, "--batches", "1")
    assert isinstance(result.exception, EngineError)
    assert str(result.exception).endswith(
        "It may be the range of one row: build with another, such as --batches 2,32,256."
    )


def test_too_little_memory_is_a_sentence_and_leaves_nothing(bundle: Bundle) -> None:
    result = run("engine", "build", bundle.path, "--arch", "sm89", *SMALL_ARGUMENTS, "--workspace", "1")
    assert isinstance(result.exception, EngineError)
    assert "could not build the text engine for sm_89: there is too little memory." in str(result.exception)
    assert not list((bundle.path / "engines").iterdir())


def test_ctrl_c_stops_a_build_and_leaves_nothing(bundle: Bundle) -> None:
    told: list[str] = []

    def report(stage: str, done: float) -> None:
        told.append(stage)
        if len(told) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, choose_builders("tensorrt-rtx", (89,)), SMALL, report=report)
    assert len(told) == 20 and not list((bundle.path / "engines").iterdir())


def test_ctrl_c_within_the_librarys_own_code_does_no_harm(bundle: Bundle) -> None:
    """A signal that comes while the library works is handled where it next calls Python, such as for its log."""
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from longclip_rt.export.tensorrt.progress import BuildLog\n"
        "from longclip_rt.cli import main\n"
        "noted, count = BuildLog.note, [0]\n"
        "def note(log, message, is_error):\n"
        "    count[0] += 1\n"
        "    if count[0] == 300: os.kill(os.getpid(), signal.SIGINT)\n"
        "    noted(log, message, is_error)\n"
        "BuildLog.note = note\n"
        f"main({['engine', 'build', str(bundle.path), '--arch', 'sm_86', *SMALL_ARGUMENTS]!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1 and "Aborted!" in result.stderr, (result.returncode, result.stderr[-2000:])
    assert not list((bundle.path / "engines").iterdir())


def test_fp32_graphs_give_fp32_engines(bundle: Bundle) -> None:
    options = EngineOptions("fp32", (32,), (1,))
    (result,) = build_engines(bundle, choose_builders("tensorrt-rtx", (89,)), options)
    facts = result.engine.towers["image"]
    assert facts["fp32_products"] == 18 and facts["attention"] == facts["decomposable"] == 4
    assert result.engine.key.precision == "fp32"
    only_fp32 = dataclasses.replace(bundle, manifest={**bundle.manifest, "precisions": ["fp32"]})
    with pytest.raises(BundleError, match=r"holds fp32, not fp16.*--fp16"):
        build_engines(only_fp32, choose_builders("tensorrt-rtx", (89,)), SMALL)


def test_further_outputs_are_in_the_engine(tiny_bundle: Path, tmp_path: Path) -> None:
    """An exported model with odd sizes and with states of its blocks among the outputs."""
    bundle = load_bundle(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (result,) = build_engines(bundle, choose_builders("tensorrt-rtx", (89,)), EngineOptions("fp16", (8,), (3,)))
    assert {tower: facts["attention"] for tower, facts in result.engine.towers.items()} == {"text": 3, "image": 2}


def test_options_that_mean_nothing_are_usage_errors(bundle: Bundle) -> None:
    for arguments in (["--arch", "blackwell"], ["--batches", "8,1"], ["--text-buckets", "0"], ["--engine", "none"]):
        assert run("engine", "build", bundle.path, *arguments).exit_code == 2
    with pytest.raises(EngineError, match="ascending"):
        EngineOptions(batches=(8, 1))


@pytest.mark.parametrize(("library", "extra"), [("tensorrt", "tensorrt"), ("tensorrt_rtx", "rtx")])
def test_onnx_is_installed_with_the_library_that_builds(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, extra: str
) -> None:
    named = SimpleNamespace(__name__=library, ILogger=trt.ILogger, Builder=trt.Builder)
    request = PlanRequest(named, bundle, "text", "fp16", SMALL.profiles("text", 248), 89, here=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=rf"'onnx' is not installed.*longclip-rt\[{extra}\]"):
        build_plan(request, tmp_path / "text.plan", b"", lambda stage, done: None)


@pytest.mark.parametrize(
    ("context", "lengths"), [(248, [32, 77, 128, 248]), (77, [32, 77]), (16, [16]), (512, [32, 77, 128, 248, 512])]
)
def test_every_text_has_a_profile(context: int, lengths: list[int]) -> None:
    options = EngineOptions()
    profiles = options.profiles("text", context)
    assert [profile.index for profile in profiles] == list(range(3 * len(lengths)))
    assert sorted({profile.length for profile in profiles}) == lengths == options.for_key(context)["text_buckets"]
    for length in lengths:
        rows = [(profile.least, profile.most) for profile in profiles if profile.length == length]
        assert rows == [(1, 1), (2, 32), (33, 256)]
    assert [profile.length for profile in options.profiles("image", context)] == [None] * 3
