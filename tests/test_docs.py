from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "commands.md")


def test_the_command_reference_is_what_the_commands_say(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "make_commands.py", tmp_path / "commands.md"], check=True)
    expected = (tmp_path / "commands.md").read_text(encoding="utf-8")
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == expected, "run: make docs"


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_run(name: str, tmp_path: Path) -> None:
    """One after the other, in one folder that has the examples, with the built-in model."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        program = {"sh": ["bash", "-euc", block], "python": [sys.executable, "-c", block]}[language]
        result = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110)
        assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("name", PAGES)
def test_a_block_that_does_not_run_says_why(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for block in re.findall(r"(?:^    \S.*\n)+", outside, re.MULTILINE):
        after = outside[outside.index(block) + len(block) :].lstrip()
        assert after.startswith("<!-- not run: "), f"{name}: neither fenced, so that it runs, nor explained:\n{block}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{name}" for name in PAGES)])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


def commands_in(text: str) -> list[str]:
    """What a page tells people to type: after `longclip-rt`, up to the end of the line, the quote or the comment."""
    text = text.replace("\\\n", " ")
    return [match[1] for match in re.finditer(r"\blongclip-rt ([a-z][^`\n#<>|;]*)", text)]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{name}" for name in PAGES)])
def test_every_command_and_option_that_a_page_names_exists(page: str) -> None:
    from click import Command, Context, Group

    from longclip_rt.cli import COMMANDS, longclip_rt

    text = (ROOT / page).read_text(encoding="utf-8")
    for line in commands_in(text):
        words = line.split()
        if words[0] not in COMMANDS:
            assert not re.match(r"longclip-rt [a-z]+ +--", f"longclip-rt {line}"), f"{page}: {line}"
            continue
        command: Command | None = longclip_rt.get_command(Context(longclip_rt), words.pop(0))
        while isinstance(command, Group) and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        assert command is not None
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for option in re.findall(r"(?<=\s)--?[a-z][a-z0-9-]*", line):
            assert option in {*known, "--help", "-h"}, f"{page}: longclip-rt {line} has no {option}"
