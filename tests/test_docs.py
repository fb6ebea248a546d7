from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_command_reference_is_what_the_commands_say() -> None:
    reference = runpy.run_path(str(ROOT / "docs" / "make_commands.py"))["commands_reference"]()
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == reference, "run: make docs"
