"""What must have ended before the interpreter may exit."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

__all__ = ["end_before_exit"]


class EndsAtExit(Protocol):
    """Something that has threads, or waits for one."""

    def end_at_exit(self) -> None:
        """The interpreter exits: do what is to be done before it may."""


_running: weakref.WeakSet[EndsAtExit] = weakref.WeakSet()
_lock = threading.RLock()  # a finalizer may come to it while its thread holds it


def end_before_exit(something: EndsAtExit) -> None:
    """Have its `end_at_exit` called, if it is still there when the interpreter exits."""
    with _lock:
        _running.add(something)


def _end_all() -> None:
    ended: set[EndsAtExit] = set()
    while True:  # one may bring others
        with _lock:
            left = set(_running) - ended
        if not left:
            return
        for something in left:
            something.end_at_exit()
        ended |= left


# Before the interpreter waits for threads, as concurrent.futures does it; what
# `atexit` offers comes too late to finish work that needs threads.
threading._register_atexit(_end_all)  # type: ignore[attr-defined]
