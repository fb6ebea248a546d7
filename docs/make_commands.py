"""Writes docs/commands.md from the commands' own help; tests/test_docs.py fails when the two differ."""

from __future__ import annotations

import sys
from pathlib import Path

from click import Command, Context, Group

from longclip_rt.cli import COMMANDS, longclip_rt

_HEAD = """# Commands

Written by `make docs` from the commands' own help; do not edit.
"""


# Independent of the terminal in which it is written.
_SETTINGS = {**longclip_rt.context_settings, "terminal_width": 100, "max_content_width": 100}


def commands_reference() -> str:
    """The reference: the help of `longclip-rt` and of each command and its parts, as Markdown."""
    parent = Context(longclip_rt, info_name="longclip-rt", **_SETTINGS)
    sections = [_HEAD, _section("longclip-rt", longclip_rt, parent)]
    for name in COMMANDS:
        command = longclip_rt.get_command(parent, name)
        assert command is not None
        context = Context(command, info_name=name, parent=parent, **_SETTINGS)
        sections.append(_section(f"longclip-rt {name}", command, context))
        for part in command.commands.values() if isinstance(command, Group) else ():
            inner = Context(part, info_name=part.name, parent=context, **_SETTINGS)
            sections.append(_section(f"longclip-rt {name} {part.name}", part, inner))
    return "\n".join(sections)


def _section(title: str, command: Command, context: Context) -> str:
    return f"## {title}\n\n```text\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "commands.md"
    target.write_text(commands_reference(), encoding="utf-8")
