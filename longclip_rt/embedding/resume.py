"""Whether work may begin, go on, or is done already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from longclip_rt.embedding.workspace import Totals, Workspace
from longclip_rt.errors import OutputError, ResumeError
from longclip_rt.formats.outputs import FORMATS, PREFIX, OutputFiles, read_metadata
from longclip_rt.system.files import sha256_of_json

_LONGEST_REJECT = 8 << 20  # bytes; an id has at most one MiB, and JSON's escapes


def fingerprint_of(state: Mapping[str, str]) -> str:
    """The SHA-256 that an output made in this state carries: the same wherever the same files lie."""
    return sha256_of_json({key: value for key, value in state.items() if key != "places"})


def take_up(workspace: Workspace, state: dict[str, str], *, overwrite: bool, restart: bool) -> Totals | None:
    """Prepares a workspace for work, where it can be begun or gone on with.

    Args:
        workspace: Of the output, entered.
        state: All that the output's bytes depend on, in words.
        overwrite: Whether an existing output may be replaced.
        restart: Whether begun work is discarded.

    Returns:
        The totals when the output is complete already, else None.

    Raises:
        ResumeError: When work was begun with another state; the message names the fields.
        OutputError: When the output exists with another state and may not be replaced.
    """
    files = workspace.files
    if restart:
        workspace.discard()
    begun = workspace.begun()
    if begun is not None and not workspace.holds_work():
        begun = None  # stopped before its first shard: it binds nobody
    if begun is not None and not _goes_on(begun, state):
        raise ResumeError(
            f"{str(workspace.folder)!r} holds work that was begun differently: {_difference(begun, state)}. Repeat the "
            "command as it was to go on with it, or add --restart to discard it."
        )
    check_neighbours(files, overwrite=overwrite)
    if begun is not None and workspace.is_ready():
        workspace.publish()
        if begun == state:
            return Totals.from_metadata(read_metadata(files.main), PREFIX)
        begun = None
    existing = [path for path in files.all if path.exists() and path != files.rejects]
    if existing and not overwrite:
        metadata = _metadata_or_none(files.main) or {}
        if metadata.get(PREFIX + "fingerprint") == fingerprint_of(state):
            workspace.discard()
            return Totals.from_metadata(metadata, PREFIX)
        made = {key.removeprefix(PREFIX): value for key, value in metadata.items()}
        difference = _difference(made, state) if metadata else "it is not an output of this program"
        raise OutputError(f"{str(existing[-1])!r} exists already ({difference}). Add --overwrite to replace it.")
    if begun is None:
        workspace.begin(state)
    elif begun != state:
        workspace.note(state)
    return None


def _goes_on(begun: Mapping[str, str], state: Mapping[str, str]) -> bool:
    """Whether begun work fits: all is the same, or the files were moved as they are, or some of them were changed, or
    the output gets another index, which is built at the end.

    The shards that changed files are in are made anew. Where the places and the files both differ, as many files as
    there are may be other ones of the same names.
    """
    differing = {key for key in {*begun, *state} if begun.get(key) != state.get(key)}
    return differing <= {"places"} or differing <= {"files"} or differing <= {"index"}


def check_neighbours(files: OutputFiles, *, overwrite: bool) -> None:
    """Refuses to replace what is not of this output: another's `.meta.json`, or a stranger's list of rejects.

    `a.npy` and `a.jsonl` would share `a.meta.json`.

    Args:
        files: The output's.
        overwrite: Whether a stranger's list may be replaced.

    Raises:
        OutputError: When there is one.
    """
    if not overwrite and files.rejects.exists() and not _lists_rejects(files.rejects):
        raise OutputError(
            f"{str(files.rejects)!r} exists already (it is no list of rejects of this program). Move it away, or add "
            "--overwrite to replace it."
        )
    for suffix in FORMATS:
        other = OutputFiles.from_path(files.main.with_suffix(suffix))
        if other != files and other.meta is not None and other.meta == files.meta and _metadata_or_none(other.main):
            raise OutputError(f"{str(files.meta)!r} belongs to {str(other.main)!r}. Choose another stem with -o.")


def _lists_rejects(path: Path) -> bool:
    """Whether a file is a list of rejects by its first line, or empty."""
    try:
        with path.open("rb") as stream:
            line = stream.readline(_LONGEST_REJECT)
        return not line or {"line", "id", "error"} <= set(json.loads(line))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _metadata_or_none(path: Path) -> dict[str, str] | None:
    try:
        return read_metadata(path)
    except OutputError:
        return None


def _difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs between two states, in words."""
    if before.get("inputs") != now["inputs"] and before.get("entries") == now["entries"]:
        parts = [f"the inputs have changed (both times {now['entries']} entries)"]
    elif before.get("inputs") != now["inputs"]:
        parts = [f"the inputs have changed ({before.get('entries')} entries then, {now['entries']} now)"]
    else:
        parts = []
    if not parts and before.get("files") != now.get("files"):
        moved = before.get("places") != now.get("places")
        parts.append(
            "relative paths lead to other files from this working directory"
            if moved
            else "files that the inputs name have changed since"
        )
    told = ("inputs", "entries", "places", "files")
    for key, value in now.items():
        if key not in told and before.get(key) != value:
            parts.append(f"{key} was {before.get(key, 'not set')} and now is {value}")
    parts += [
        f"{key} was {before[key]} and now is not set"
        for key in before
        if key not in now and key not in told and not _counted(key)
    ]
    return "; ".join(parts)


def _counted(key: str) -> bool:
    """Whether a field of an output's metadata is a result of the work and not one of its conditions."""
    return key == "fingerprint" or key in Totals().to_metadata()
