"""Closing what may fail to close, such as a model on a GPU that failed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Protocol, TypeVar

from longclip_rt.errors import LongClipError

logger = logging.getLogger("longclip_rt")


class Closable(Protocol):
    """What has a `close`."""

    def close(self) -> None:
        """Lets go of what it holds."""


Thing = TypeVar("Thing", bound=Closable)


@contextlib.contextmanager
def closed_after(thing: Thing) -> Iterator[Thing]:
    """Closes a thing after the block. That it fails to close is logged: it must not hide how the block ended."""
    try:
        yield thing
    finally:
        try:
            thing.close()
        except LongClipError as error:
            logger.warning("%s", error)
