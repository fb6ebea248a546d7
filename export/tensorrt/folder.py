"""An engine's folder in the making: one build of it at a time, and whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from longclip_rt.errors import OutputError
from longclip_rt.system.lock import lock_folder

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def engine_in_the_making(target: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `target` when the block ends well, and vanishes when it fails.

    What killed builds of the same engine left is removed first. The old engine stays until the new one is whole.

    Args:
        target: The engine's folder, in `engines` of a bundle.

    Raises:
        OutputError: Another process builds this engine, or the disk refuses.
    """
    making = target.with_name(f".{target.name}.making")
    new, old = making / "new", making / "old"
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock_folder(making, f"is building the engine {target.name}"):
            try:
                _put_back(old, target)
                for left in (*target.parent.glob(f".{target.name}.*"), new, old):
                    if left != making:
                        _remove(left)
                new.mkdir()
                yield new
                if os.path.lexists(target):  # a link that leads nowhere too
                    target.rename(old)
                new.rename(target)
            finally:
                with contextlib.suppress(OSError):
                    _put_back(old, target)
                    for left in (new, old, making):
                        _remove(left)


def _put_back(old: Path, target: Path) -> None:
    """Gives the old engine its name again where a build ended between the two renames."""
    if os.path.lexists(old) and not os.path.lexists(target):
        old.rename(target)


def _remove(path: Path) -> None:
    """Removes a folder, or a link or file in its place; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """The disk's failures as sentences, with advice that is true of engines: a build begins anew, in its bundle."""
    try:
        yield
    except (OSError, OutputError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        bundle = target.parent.parent
        if cause.errno in _FULL:
            advice = "Make room and build again: nothing of this engine is left, others that were built stay."
        elif cause.errno in _DENIED:
            advice = f"Engines lie in their bundle: copy {bundle} to a folder that you may write to, and build there."
        else:
            advice = f"Copy {bundle} to another place, and build there."
        reason = cause.strerror or str(cause)
        raise OutputError(f"The engine {str(target)!r} cannot be written: {reason}. {advice}") from error
