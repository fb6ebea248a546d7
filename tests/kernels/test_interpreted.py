from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_kernels_agree_with_float64_in_the_interpreter() -> None:
    """Every test of this folder's numbers; what fails is in the output."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    result = subprocess.run(
        run, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout
