"""What must have ended before the interpreter may exit."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Protocol

__all__ = ["end_before_exit"]


class EndsAtExit(Protocol):
    """Something that has threads, or waits for one."""

    def end_at_exit(self) -> None:
        """The interpreter exits: do what is to be done before it may."""


_running: weakref.WeakSet[EndsAtExit] = weakref.WeakSet()


def end_before_exit(something: EndsAtExit) -> None:
    """Have its `end_at_exit` called, if it is still there when the interpreter exits."""
    _running.add(something)


def _end_all() -> None:
    ended: set[EndsAtExit] = set()
    while left := _all_but(ended):  # one may bring others
        for something in left:
            something.end_at_exit()
        ended |= left


def _all_but(ended: set[EndsAtExit]) -> set[EndsAtExit]:
    while True:
        with contextlib.suppress(RuntimeError):  # another thread has added one meanwhile
            return set(_running) - ended


# Before the interpreter waits for threads, as concurrent.futures does it; what
# `atexit` offers comes too late to finish work that needs threads.
threading._register_atexit(_end_all)  # type: ignore[attr-defined]
