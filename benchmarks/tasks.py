"""What the benchmarked pools run.

In a module of its own, so that every pool sends these functions by name.
"""

from __future__ import annotations

import os
import signal
from typing import Any


def nothing(*_: Any) -> None:
    """Return at once."""


def length(array: Any) -> int:
    """Take an array, and read its first and last byte."""
    return len(array) + int(array[0]) + int(array[-1])


def give_back(array: Any) -> Any:
    """Return the argument."""
    return array


def die() -> None:
    """Kill the worker."""
    os.kill(os.getpid(), signal.SIGKILL)
