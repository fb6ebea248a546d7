from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from trt_stubs import compile_stubs, run_cases

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("cc"), reason="needs Linux and a C compiler"
)


@pytest.mark.parametrize(
    ("cases", "library"),
    [
        (cases, library)
        for cases in ("device_cases.py", "trouble_cases.py", "head_cases.py", "tensorrt_cases.py")
        for library in ("tensorrt_bindings", "tensorrt_rtx")
    ],
)
def test_the_device_layer_over_an_imitated_driver(tmp_path: Path, cases: str, library: str) -> None:
    """The real cuda.core on an imitation of the driver, with TensorRT held to its real bindings."""
    if not importlib.util.find_spec(library):
        pytest.skip(f"{library} is not installed")
    compile_stubs(tmp_path)
    driver = tmp_path / "libcuda.so.1"
    options = ["-w", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{driver.name}", "-o", str(driver)]
    subprocess.run(["cc", *options, str(HERE / "imitated_driver.c"), "-ldl", "-lpthread"], check=True)
    run_cases(HERE / cases, tmp_path, {"IMITATED_DRIVER": str(driver), "IMITATED_LIBRARY": library})


@pytest.mark.skipif(
    not importlib.util.find_spec("triton") or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton's compiler",
)
def test_the_plugin_with_tensorrts_real_bindings(tmp_path: Path) -> None:
    """Registration, signatures and expressions are judged by TensorRT's own Python code."""
    compile_stubs(tmp_path)
    run_cases(HERE / "plugin_cases.py", tmp_path, {})
