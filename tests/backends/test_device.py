from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STUBS = {
    "libnvinfer.so.11": "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL "
    "getPluginRegistry getBuilderPluginRegistry",
    "libnvonnxparser.so.11": "createNvOnnxParser_INTERNAL createNvOnnxParserRefitter_INTERNAL getNvOnnxParserVersion",
    "libnvinfer_plugin.so.11": "initLibNvInferPlugins",
}
"""What TensorRT's bindings take from its libraries; here each returns null."""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("cc"), reason="needs Linux and cc")
def test_the_device_layer_over_an_imitated_driver(tmp_path: Path) -> None:
    """Runs `device_cases.py`: the real cuda.core on an imitation of the driver, TensorRT held to its real bindings."""
    pytest.importorskip("cuda.core")
    for name, symbols in STUBS.items():
        source = tmp_path / f"{name}.c"
        source.write_text("\n".join(f"void *{symbol}(void) {{ return 0; }}" for symbol in symbols.split()))
        subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / name, source], check=True)
    driver = tmp_path / "libcuda.so.1"
    options = ["-w", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{driver.name}", "-o", str(driver)]
    subprocess.run(["cc", *options, str(HERE / "imitated_driver.c"), "-ldl", "-lpthread"], check=True)
    environment = {**os.environ, "IMITATED_DRIVER": str(driver), "LD_LIBRARY_PATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", str(HERE / "device_cases.py")]
    result = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    # Nothing was skipped or left out.
    cases = len(re.findall(r"^def test_", (HERE / "device_cases.py").read_text(), re.M))
    assert int(re.findall(r"(\d+) passed", result.stdout)[0]) >= cases and "skipped" not in result.stdout
