"""What evaluations keep: pictures taken out of archives, and embeddings, so that the next run need not make them again.

    <home>/<data>/lock                        held by the run that uses the folder
    <home>/<data>/pictures/<sha256>.<suffix>  pictures that were no files: of shards, of tables, drawn scenes
    <home>/<data>/<content>/images.jsonl      what is embedded, texts.jsonl beside it
    <home>/<data>/<content>/<model>-images.parquet ...     what `embed` wrote

The folders of the data sets that were not used for longest go when all of them hold more than `MOST_BYTES`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from longclip_rt.errors import OutputError
from longclip_rt.system.files import output_errors, sha256_of_json
from longclip_rt.system.lock import lock_folder

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger("longclip_rt")

MOST_BYTES = 10 << 30
"""What is kept at most, beside what the run at hand uses."""

_ENTRY = re.compile(r".+-[0-9a-f]{12}")
_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PN": ".png", b"RIF": ".webp"}


def evaluations_home() -> Path:
    """Where it is kept unless told otherwise: `evaluations` in the user's cache folder for this program."""
    from platformdirs import user_cache_path

    return user_cache_path("longclip-rt") / "evaluations"


class Entry:
    """What is kept of one data set.

    Attributes:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def store(self, picture: bytes | Image.Image) -> Path:
        """Writes a picture, where the same one is not there already.

        Raises:
            OutputError: The disk refuses.
        """
        if not isinstance(picture, bytes):
            stream = io.BytesIO()
            picture.save(stream, "PNG")
            picture = stream.getvalue()
        suffix = _SUFFIXES.get(picture[:3], ".img")
        path = self.folder / "pictures" / (hashlib.sha256(picture).hexdigest()[:32] + suffix)
        with output_errors(path):
            if not path.exists() or path.stat().st_size != len(picture):
                path.parent.mkdir(exist_ok=True)
                made = path.with_name(path.name + ".tmp")
                made.write_bytes(picture)
                made.replace(path)
        return path


@contextlib.contextmanager
def opened_entry(home: Path | None, name: str, what: object, fresh: bool = False) -> Iterator[Entry]:
    """Opens what is kept of a data set, for this run alone; when it ends, what is too much goes.

    Args:
        home: Where all of it is kept; None: `evaluations_home()`.
        name: Begins the folder's name.
        what: What tells this data set from others, as JSON.
        fresh: Whether what was kept is removed first.

    Raises:
        OutputError: The folder cannot be made, or another run uses it.
    """
    home = evaluations_home() if home is None else home.absolute()
    folder = home / f"{name}-{sha256_of_json(what)[:12]}"
    with output_errors(folder):
        home.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder, f"evaluates on {name!r} with {str(folder)!r}")
    with lock:
        with output_errors(folder):
            os.utime(folder / "lock")
            if fresh:
                _empty(folder)
        yield Entry(folder)
    prune(home, MOST_BYTES, keep=folder)


def prune(home: Path, most: int, keep: Path) -> None:
    """Removes the entries that were not used for longest, until what is left has `most` bytes.

    Args:
        home: Folder of the entries. What is not an entry by its name is left alone, for `home` may be any folder.
        most: Bytes.
        keep: The entry that stays in any case.
    """
    entries = []
    for lock in home.glob("*/lock"):
        if not _ENTRY.fullmatch(lock.parent.name):
            continue
        with contextlib.suppress(OSError):  # another run may be removing it
            size = sum(path.stat().st_size for path in lock.parent.rglob("*") if path.is_file())
            entries.append((lock.stat().st_mtime_ns, size, lock.parent))
    total = 0
    for _, size, folder in sorted(entries, reverse=True):
        total += size
        if total > most and folder != keep:
            with contextlib.suppress(OutputError, OSError), lock_folder(folder, "uses it"):
                logger.info("removing %s: evaluations keep %d GiB at most", folder, most >> 30)
                shutil.rmtree(folder)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
