"""The `longclip-rt` command: finds the command that was named, and prints an error as one sentence."""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Sequence

import click

from longclip_rt.errors import LongClipError
from longclip_rt.system.streams import close_standard_streams, open_standard_streams
from longclip_rt.version import __version__

COMMANDS = {
    "train": "Turn CLIP weights and long captions into Long-CLIP weights.",
    "export": "Turn weights into a verified bundle.",
    "embed": "Turn images and texts into one file of vectors.",
    "search": "Find what is nearest to a text or an image.",
    "evaluate": "Measure retrieval and zero-shot classification.",
    "serve": "Answer over HTTP: embeddings, search, and a page for people.",
    "pca": "Fit a PCA that makes vectors shorter.",
    "convert": "Write weights in another library's layout.",
    "engine": "Build TensorRT engines of a bundle, list them, and check them on the GPU.",
    "bench": "Measure how fast the backends are here.",
    "kernels": "Compile the Triton kernels ahead of time.",
    "info": "Show what can be used on this machine.",
}
"""Name -> what the help says, in the order of use. Each lives in `longclip_rt.commands.<name>`."""


HIDDEN = ("kernels",)
"""For those who work on this program; left out of the first screen."""


class _Commands(click.Group):
    """Lists commands in the order of `COMMANDS` and imports each when it is needed."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names of the commands."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command, or None where there is none of this name."""
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"longclip_rt.commands.{name}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, words in COMMANDS.items() if name not in HIDDEN])


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="longclip-rt")
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
def longclip_rt(verbose: bool) -> None:
    """Long-CLIP inference: texts of up to 248 tokens and images to vectors in one space.

    \b
    Examples:
      longclip-rt export --fp16 --weights BeichenZhang/LongCLIP-B
      longclip-rt embed files.txt
      longclip-rt search files.parquet "a long description of what you look for" -k 5
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("longclip_rt").setLevel(logging.DEBUG if verbose else logging.INFO)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. Errors a user can mend are one sentence on stderr and exit status 1."""
    open_standard_streams()
    try:
        longclip_rt(list(arguments) if arguments is not None else None, prog_name="longclip-rt")
    except LongClipError as error:
        _end(str(error))
    except Exception as error:
        if (shortage := _shortage_of_memory(error)) is not None:
            _end(f"There is not enough memory{shortage}{_LIMITED}")
        if not isinstance(error, OSError):
            raise
        _end(f"{error.filename or 'Something of the system'} cannot be used: {error.strerror or error}.")
    finally:
        close_standard_streams()


_LIMITED = ". Free some, raise the limit (ulimit -v), or use fewer --workers; begun work goes on with the same command."
# What is said of memory that is not given to a library, a thread, OpenVINO or C++.
_SIGNS = re.compile(r"failed to map segment|allocate memory|start new thread|can't alloc|bad_alloc")


def _shortage_of_memory(error: BaseException | None) -> str | None:
    """What an error, or one that it came from, says of too little memory; None where that is not what it says."""
    while error is not None:
        if sign := next((line.strip() for line in str(error).splitlines() if _SIGNS.search(line)), ""):
            return f" ({sign})"
        if isinstance(error, MemoryError):
            return ""
        error = error.__cause__ or error.__context__
    return None


def _end(message: str) -> None:
    click.echo(f"Error: {message}", err=True)
    sys.exit(1)
