"""Libraries that let TensorRT's real Python bindings be imported without TensorRT."""

from __future__ import annotations

import subprocess
from pathlib import Path

_SYMBOLS = {
    "libnvinfer.so.11": "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL "
    "getPluginRegistry getBuilderPluginRegistry",
    "libnvonnxparser.so.11": "createNvOnnxParser_INTERNAL createNvOnnxParserRefitter_INTERNAL getNvOnnxParserVersion",
    "libnvinfer_plugin.so.11": "initLibNvInferPlugins",
}


def compile_stubs(folder: Path) -> None:
    """Compiles what the bindings link to; each function returns null."""
    for name, symbols in _SYMBOLS.items():
        source = folder / f"{name}.c"
        source.write_text("\n".join(f"void *{symbol}(void) {{ return 0; }}" for symbol in symbols.split()))
        subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / name, source], check=True)


def run_cases(cases: Path, folder: Path, environment: dict[str, str]) -> None:
    """Runs a file of tests in a process of its own that finds the stubs, and asserts that all of it passed."""
    import os
    import re
    import sys

    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", str(cases)]
    result = subprocess.run(
        command, env={**os.environ, "LD_LIBRARY_PATH": str(folder), **environment}, cwd=cases.parents[2],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    wanted = len(re.findall(r"^def test_", cases.read_text(), re.M))
    assert int(re.findall(r"(\d+) passed", result.stdout)[0]) >= wanted and "skipped" not in result.stdout
