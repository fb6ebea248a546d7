"""Hashes of files, and folders and small files that are whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longclip_rt.atomic import output_errors, whole_file
from longclip_rt.errors import OutputError

_CHUNK = 1 << 20


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """The SHA-256 of a value's canonical JSON: sorted keys, no white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_text_atomically(path: Path, text: str) -> None:
    """Writes UTF-8 text so that `path` holds either its old content or all of the new.

    Raises:
        OutputError: The folder cannot be written, or the disk is full.
    """
    with output_errors(path), whole_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def directory_in_the_making(target: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends well, and vanishes when it fails.

    Args:
        target: The folder to make. It must not exist; its parents are made.

    Raises:
        OutputError: `target` exists, or its parent cannot be written.
    """
    if target.exists():
        raise OutputError(f"{target} exists already. Choose another name, or remove it first.")
    staging = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        try:
            yield staging
            staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
