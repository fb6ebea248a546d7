"""A fork of a process ends, though the libraries it inherits wait in their destructors for threads that it lacks."""

from __future__ import annotations

import ctypes
import os
import weakref

_held: list[weakref.ref[object]] = []


def ends_in_forks(holder: object) -> None:
    """Lets forks of this process end by themselves, with their own exit status.

    A fork then runs neither the destructors of what `holder` refers to nor those of the libraries that were loaded
    before it: Python ends as always (its exit handlers run, its streams are flushed), and then the process does.

    Args:
        holder: Refers to objects of native libraries. It must not let go of them in a fork.
    """
    _held.append(weakref.ref(holder))


def _after_in_child() -> None:
    for holder in [reference() for reference in _held]:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(holder))  # for good: Python clears variables as it ends
    c = ctypes.CDLL(None)
    if _held and hasattr(c, "on_exit"):  # glibc's, which tells the status; the last one registered runs first
        c.on_exit(c._exit, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)
