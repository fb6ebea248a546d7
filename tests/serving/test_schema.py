from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx

# 422 is for what no schema can say: that a file is an image, that an id is in the vocabulary.
CONFIG = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", 422]
"""


def test_requests_drawn_from_the_servers_schema(url: str, tmp_path: Path) -> None:
    """What the schema allows is taken, what it does not is refused as it says, and every answer is of its shape."""
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{url}/openapi.json"]
    options = ["--phases", "fuzzing", "--mode", "all", "--max-examples", "10", "--generation-deterministic"]
    quiet = ["--no-color", "--suppress-health-check", "all"]
    result = subprocess.run([*command, *options, *quiet], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert httpx.get(f"{url}/health").status_code == 200
