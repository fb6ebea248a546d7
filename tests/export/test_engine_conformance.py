from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from trt_stubs import compile_stubs, run_cases

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("cc"), reason="needs Linux and a C compiler"
)


@pytest.mark.parametrize(("backend", "needed"), [("tensorrt", "tensorrt_bindings"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_the_builder_asks_only_for_what_the_real_bindings_have(
    pca_bundle: Path, tmp_path: Path, backend: str, needed: str
) -> None:
    if not importlib.util.find_spec(needed):
        pytest.skip(f"{needed} is not installed")
    compile_stubs(tmp_path)
    bundle = shutil.copytree(pca_bundle, tmp_path / "bundle")
    environment = {"IMITATED_BACKEND": backend, "PCA_BUNDLE": str(bundle)}
    run_cases(Path(__file__).parent / "builder_cases.py", tmp_path, environment)
