"""Are there file descriptors left for what is about to be opened?"""

from __future__ import annotations

import os
from typing import Final

__all__ = ["check_descriptors"]

DESCRIPTORS: Final = 32
"""File descriptors that a master and its supervisor need, and some more."""


def check_descriptors(needed: int = DESCRIPTORS) -> None:
    """Make sure that so many can be opened: ZeroMQ ends the process if it cannot open one.

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
