"""Are there file descriptors, and threads, left for what is about to be opened?

ZeroMQ ends the process if it cannot have them.
"""

from __future__ import annotations

import os
import threading
from typing import Final

__all__ = ["check_descriptors", "check_threads"]

DESCRIPTORS: Final = 32
"""File descriptors that a master and its supervisor need, and some more."""
THREADS: Final = 3
"""ZeroMQ's two, and the master's."""


def check_descriptors(needed: int = DESCRIPTORS) -> None:
    """Make sure that so many can be opened.

    Args:
        needed: how many; by default what it takes to start a master.

    Raises:
        OSError: this process may open too few files.
    """
    spare: list[int] = []
    try:
        spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        while len(spare) < needed:
            spare.append(os.dup(spare[0]))
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: fewer than {needed} more can be opened by this process; "
            "raise its limit (ulimit -n), or close some",
        ) from None
    finally:
        for descriptor in spare:
            os.close(descriptor)


def check_threads() -> None:
    """Make sure that a master's threads can be started.

    Raises:
        RuntimeError: this process may start too few.
    """
    enough = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(THREADS):
            thread = threading.Thread(target=enough.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        if "shutdown" in str(error):  # of the interpreter: that says it
            raise
        raise RuntimeError(
            f"{error}: fewer than {THREADS} more can be started by this process; raise the limit "
            "of processes of this user (ulimit -u), or of the container"
        ) from None
    finally:
        enough.set()
        for thread in started:
            thread.join()
