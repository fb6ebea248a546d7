from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_command_reference_is_what_the_commands_say(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "make_commands.py", tmp_path / "commands.md"], check=True)
    expected = (tmp_path / "commands.md").read_text(encoding="utf-8")
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == expected, "run: make docs"
