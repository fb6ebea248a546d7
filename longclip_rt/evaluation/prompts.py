"""Texts that stand for a class in zero-shot classification."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longclip_rt.errors import InputError
from longclip_rt.system.extras import require

PLACE = "{}"
"""Where a template takes the class's name."""

PHOTO = "photo"

_OPEN_CLIP = {"openai-80": "OPENAI_IMAGENET_TEMPLATES", "simple-7": "SIMPLE_IMAGENET_TEMPLATES"}

NAMES = (PHOTO, *_OPEN_CLIP)
"""Sets of templates that have a name: one, and open_clip's 80 and 7."""


def templates_from_name(name: str) -> tuple[str, ...]:
    """The templates of a name, or of a file with one a line, each with `{}` for the class.

    Raises:
        InputError: There is no such name or file, or a line has no place for the class.
        MissingExtraError: open_clip is not installed, and its templates were asked for.
    """
    if name == PHOTO:
        return ("a photo of a {}.",)
    if name in _OPEN_CLIP:
        made = getattr(require("open_clip", "evaluate"), _OPEN_CLIP[name])
        return tuple(template(PLACE) for template in made)
    lines = _lines(Path(name), f"Name a file of templates, or one of {', '.join(NAMES)}.")
    for line in lines:
        if line.count(PLACE) != 1:
            raise InputError(f"{name!r}: the template {line!r} should have {PLACE} once, where the class's name goes.")
    return tuple(lines)


def filled(templates: Sequence[str], name: str) -> tuple[str, ...]:
    """A class's prompts."""
    return tuple(template.replace(PLACE, name) for template in templates)


def class_names(path: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """Names of classes from a file: one a line in the order of the classes, or FOLDER, a tab and a name.

    Args:
        path: The file.
        folders: What the data set calls its classes, in order.

    Raises:
        InputError: It cannot be read, or does not name every class once.
    """
    lines = _lines(path, "Name a file with a class a line.")
    if all("\t" in line for line in lines):
        named = dict(line.split("\t", 1) for line in lines)
        missing = [folder for folder in folders if folder not in named]
        if missing:
            raise InputError(f"{str(path)!r} has no name for the class {missing[0]!r}. Add a line with it and a tab.")
        return tuple(named[folder] for folder in folders)
    if len(lines) != len(folders):
        raise InputError(
            f"{str(path)!r} names {len(lines)} classes, and the data have {len(folders)}: {', '.join(folders[:3])}, "
            "... Give one a line in this order, or each class's folder, a tab and its name."
        )
    return tuple(lines)


def _lines(path: Path, advice: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror or error}. {advice}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8. Save it as UTF-8.") from error
    lines = [line.strip(" \r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise InputError(f"{str(path)!r} is empty. {advice}")
    return lines
