"""Libraries that let TensorRT's real Python bindings be imported without TensorRT, and a process that has them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

# What the bindings link to; each function returns null here.
_SYMBOLS = {
    "libnvinfer.so.11": "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL "
    "getPluginRegistry getBuilderPluginRegistry",
    "libnvonnxparser.so.11": "createNvOnnxParser_INTERNAL createNvOnnxParserRefitter_INTERNAL getNvOnnxParserVersion",
    "libnvinfer_plugin.so.11": "initLibNvInferPlugins",
}


def compile_library(folder: Path, name: str, source: str) -> Path:
    """Compiles C to a shared library."""
    (folder / f"{name}.c").write_text(source)
    target = folder / name
    subprocess.run(["cc", "-w", "-shared", "-fPIC", "-o", target, folder / f"{name}.c"], check=True)
    return target


def compile_stubs(folder: Path) -> None:
    """Compiles what the bindings link to."""
    for name, symbols in _SYMBOLS.items():
        compile_library(folder, name, "\n".join(f"void *{symbol}(void) {{ return 0; }}" for symbol in symbols.split()))


def run_cases(cases: Path, folder: Path, environment: dict[str, str]) -> None:
    """Runs a file of tests in a process of its own that finds the stubs, and asserts that all of it passed."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", str(cases)]
    paths = [str(cases.parent), str(cases.parents[1]), os.environ.get("PYTHONPATH", "")]
    libraries = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    found = {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)), "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(
        command,
        env={**os.environ, **found, **environment},
        cwd=cases.parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    wanted = len(re.findall(r"^def test_", cases.read_text(), re.M))
    assert int(re.findall(r"(\d+) passed", result.stdout)[0]) >= wanted and "skipped" not in result.stdout
