"""What tasks do that run on several hosts. They share the files of this machine.

Each appends a line to a diary when it starts, so that it is known whether, how often and
where it ran.
"""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Diary", "hold_the_interpreter", "note", "random_bytes", "wait_for", "work"]


def note(diary: str, number: int) -> int:
    """Append that this task has started here."""
    with open(diary, "a") as file:  # one small write, so lines are whole
        file.write(f"{number} {socket.gethostname()}\n")
    return number


def wait_for(diary: str, number: int, gate: str, timeout: float = 60) -> int:
    """Run until there is a file."""
    note(diary, number)
    deadline = time.monotonic() + timeout
    while not os.path.exists(gate):
        if time.monotonic() > deadline:
            raise TimeoutError(gate)
        time.sleep(0.01)
    return number


def hold_the_interpreter(diary: str, number: int, seconds: int) -> int:
    """Compute without letting any other Python thread run, as a long regular expression does."""
    note(diary, number)
    ctypes.PyDLL(None).sleep(seconds)
    return number


def work(diary: str, number: int, seconds: float) -> int:
    """Take some time."""
    note(diary, number)
    time.sleep(seconds)
    return number


def random_bytes(number: int) -> np.ndarray[Any, Any]:
    """The same each time; nothing on the way can make less of them."""
    return np.random.default_rng(1).integers(0, 255, number, dtype=np.uint8)


class Diary:
    """The file in which tasks write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def __str__(self) -> str:
        return str(self.path)

    def entries(self) -> list[tuple[int, str]]:
        """Number and host of each task that has started, in this order."""
        lines = (line.split() for line in self.path.read_text().splitlines())
        return [(int(number), host) for number, host in lines]

    def where(self, number: int) -> str | None:
        """The host on which this task has started last, if it has."""
        return dict(self.entries()).get(number)

    def on(self, host: str) -> list[int]:
        """The tasks that have started on this host."""
        return [number for number, name in self.entries() if name == host]

    def repeated(self) -> list[int]:
        """The tasks that have started more than once."""
        counts = Counter(number for number, _ in self.entries())
        return [number for number, times in counts.items() if times > 1]
