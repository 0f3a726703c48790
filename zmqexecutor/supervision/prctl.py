"""What Linux lets a process decide about itself and its parent. Elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

__all__ = ["adopt_orphans", "die_with_parent", "rename"]

_SET_PDEATHSIG: Final = 1
_SET_NAME: Final = 15
_GET_NAME: Final = 16
_SET_CHILD_SUBREAPER: Final = 36
_libc: Final = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, which has this id, ends."""
    if _libc is not None:
        _libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before that took effect
            os._exit(1)


def adopt_orphans(yes: bool) -> bool:
    """Say whether processes below this one become its children when their parent ends.

    Returns:
        False if the system does not allow that.
    """
    return _libc is not None and _libc.prctl(_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0) == 0


def rename(name: bytes) -> bytes:
    """Name this process in lists of processes, by at most 15 bytes; return its last name."""
    before = ctypes.create_string_buffer(16)
    if _libc is not None:
        _libc.prctl(_GET_NAME, before, 0, 0, 0)
        _libc.prctl(_SET_NAME, name, 0, 0, 0)
    return before.value
