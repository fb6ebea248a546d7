"""`export --engine`: what is decided before and said after an export."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from longclip_rt.bundle.bundle import BUILT_IN, Bundle, load_bundle
from longclip_rt.cli import longclip_rt
from longclip_rt.commands import engine_options
from longclip_rt.commands.export import export
from longclip_rt.errors import BackendError, EngineError, ExportError, MissingExtraError, OutputError
from longclip_rt.export.exporter import ParityReport
from longclip_rt.tensorrt.engines import engines_of

MODEL = BUILT_IN
SMALL = ("--text-buckets", "32", "--batches", "8")


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """What the export gives, which takes no time: the built-in model. No TensorRT and no GPU is here."""
    from longclip_rt.export.precision import BlockActivation

    bundle = load_bundle(shutil.copytree(MODEL, tmp_path / "bundle"))
    activations = tuple(BlockActivation(tower, 0, 1.0, "input") for tower in ("text", "image"))
    given = (bundle, ParityReport((), activations, 1, 1))
    monkeypatch.setattr("longclip_rt.export.exporter.export_bundle", lambda options, progress: given)
    monkeypatch.setattr("longclip_rt.export.tensorrt.builders.cuda_devices", lambda: [])
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    return bundle


def run(*arguments: str) -> Any:
    return CliRunner().invoke(longclip_rt, ["export", "--weights", "random:ViT-B-16", *arguments])


def test_the_flags_that_are_repeated_are_options_of_the_command() -> None:
    assert set(engine_options._FLAGS) <= {parameter.name for parameter in export.params}


def test_auto_says_that_none_was_built_and_why(exported: Bundle) -> None:
    result = run("--fp16")
    assert result.exit_code == 0 and result.stdout == f"{exported.path}\n"
    assert "No engine was built. tensorrt: The Python package tensorrt cannot be imported" in result.stderr
    assert "tensorrt-rtx: " in result.stderr and f"longclip-rt engine build {exported.path}" in result.stderr
    assert not engines_of(exported)[0]


@pytest.mark.parametrize("arguments", [("--fp16", "--engine", "none"), ()])
def test_nothing_is_said_where_nothing_was_asked(exported: Bundle, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0 and result.stdout == f"{exported.path}\n" and "engine" not in result.stderr


def test_what_was_asked_for_by_name_and_cannot_be_had_ends_before_the_export(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(options: object, progress: object) -> None:
        raise AssertionError("exported")

    monkeypatch.setattr("longclip_rt.export.exporter.export_bundle", never)
    result = run("--fp16", "--engine", "tensorrt")
    assert isinstance(result.exception, EngineError) and "pip install tensorrt" in str(result.exception)
    for arguments in (("--engine", "tensorrt-rtx"), ("--arch", "sm89"), ("--batches", "1,32,256")):
        result = run(*arguments)
        assert isinstance(result.exception, ExportError)
        assert f"Add --fp16, or leave {arguments[0]} out" in str(result.exception)
    result = run("--engine", "tensorrt-rtx", "--arch", "sm89", "--text-buckets", "5")
    assert "leave --engine and --arch and --text-buckets out" in str(result.exception)


@pytest.mark.parametrize("archs", [("--arch", "sm98"), ("--arch", "sm89,sm98")])
def test_an_architecture_that_cannot_be_had_ends_before_the_export(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch, archs: tuple[str, ...]
) -> None:
    """Also where the engine is left to `auto`, which may else go without."""

    def never(options: object, progress: object) -> None:
        raise AssertionError("exported")

    monkeypatch.setattr("longclip_rt.export.exporter.export_bundle", never)
    result = run("--fp16", *archs)
    assert isinstance(result.exception, EngineError) and result.exit_code == 1
    assert "No engine can be built. tensorrt: " in str(result.exception)


def test_options_of_engines_and_none_do_not_go_together(exported: Bundle) -> None:
    result = run("--fp16", "--engine", "none", "--arch", "sm98", "--text-buckets", "5")
    assert result.exit_code == 2 and "--engine none builds no engine" in result.stderr
    assert "Leave it out, or --arch and --text-buckets." in result.stderr


def test_auto_goes_on_with_rtx_and_says_why(exported: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    result = run("--fp16", "--arch", "sm89", *SMALL)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{exported.path}\n"
    assert "Building with tensorrt-rtx, since: tensorrt: The Python package tensorrt cannot" in result.stderr
    (engine,) = engines_of(exported)[0]
    assert engine.key.archs == (89,) and "4 of 4 attention blocks fused" in result.stderr


ERRORS = [
    (EngineError("No."), "No."),
    (BackendError("The PCA head is damaged."), "The PCA head is damaged."),
    (MissingExtraError("No onnx."), "No onnx."),
    (
        OSError(28, "No space left on device"),
        "cannot be written: No space left on device. Make room and build again: n",
    ),
    (OutputError("Another run builds it."), "Another run builds it."),
]


@pytest.mark.parametrize(("error", "told"), ERRORS)
def test_a_build_that_fails_leaves_the_bundle_and_tells_of_it(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    pytest.importorskip("tensorrt_rtx")

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("longclip_rt.export.tensorrt.build.build_plan", fail)
    result = run("--fp16", "--engine", "tensorrt-rtx", "--arch", "8.9", *SMALL, "--optimization-level", "3")
    assert isinstance(result.exception, EngineError) and result.stdout == f"{exported.path}\n"
    options = "--engine tensorrt-rtx --arch sm89 --text-buckets 32 --batches 8 --optimization-level 3 --missing"
    message = str(result.exception)
    assert told in message and "it goes on where it stopped" not in message
    assert message.endswith(
        f" The bundle {exported.path} is whole, without that engine; try again: longclip-rt engine build "
        f"{exported.path} {options}"
    )
    assert load_bundle(exported.path) and not list((exported.path / "engines").iterdir())


def test_ctrl_c_in_a_build_tells_of_the_bundle(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("longclip_rt.export.tensorrt.build.build_plan", stop)
    result = run("--fp16", "--arch", "all", *SMALL)
    assert result.exit_code == 1 and result.stdout == f"{exported.path}\n"
    wanted = f"longclip-rt engine build {exported.path} --arch all --text-buckets 32 --batches 8 --missing\n"
    assert f"is whole, without that engine; try again: {wanted}" in result.stderr and "Aborted!" in result.stderr


def test_a_model_that_was_just_exported_gets_its_engine(tiny_weights: Path, tmp_path: Path) -> None:
    """The whole way, from weights."""
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "bundle"
    arguments = ["--fp16", "--out", str(out), "--engine", "tensorrt-rtx", "--arch", "sm120", *SMALL]
    result = CliRunner().invoke(longclip_rt, ["export", "--weights", str(tiny_weights), *arguments])
    assert result.exit_code == 0, result.stderr
    (engine,) = engines_of(load_bundle(out))[0]
    assert engine.key.archs == (120,) and engine.damage() == ""
    assert [profile.length for profile in engine.profiles("text")] == [32, 248]
