"""What the benchmarked pools run.

In a module of its own, so that every pool can send these functions by name.
"""

from __future__ import annotations

import ctypes
import io
import math
import os
import random
import signal
import time
import tokenize
from collections.abc import Callable
from typing import Any

MIB = 1024 * 1024


def nothing(*_: Any, **__: Any) -> None:
    """Return at once."""


def closure(value: int) -> Callable[..., None]:
    """A function that refers to a variable of this call."""

    def nothing_with_a_variable(*_: Any) -> None:
        if value < 0:
            raise ValueError(value)

    return nothing_with_a_variable


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def keep_interpreter(seconds: float) -> None:
    """Sleep as native code does that does not let other threads run."""
    if seconds:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def pid_after(seconds: float) -> int:
    """This worker's process id, after a while in which another worker may come up."""
    time.sleep(seconds)
    return os.getpid()


def wait_until_gone(path: str) -> None:
    """Keep the worker busy for as long as this file exists."""
    while os.path.exists(path):
        time.sleep(0.001)


def die() -> None:
    """Kill the worker."""
    os.kill(os.getpid(), signal.SIGKILL)


def memory() -> tuple[int, int]:
    """Resident and proportional set size of this worker in bytes (0 where not told)."""
    import psutil

    information = psutil.Process().memory_full_info()
    return information.rss, getattr(information, "pss", 0)


# ---------------------------------------------------------------- big data


def length(array: Any) -> int:
    """Take an array, and read its first and last byte."""
    return len(array) + int(array[0]) + int(array[-1])


def give_back(array: Any) -> Any:
    """Return the argument."""
    return array


_arrays: dict[int, Any] = {}


def give(size: int) -> Any:
    """Return an array of this many bytes; it is made once, since making it costs time."""
    if size not in _arrays:
        import numpy as np

        _arrays.clear()
        _arrays[size] = np.ones(size, dtype=np.uint8)
    return _arrays[size]


# ---------------------------------------------------------------- real work


def thumbnail(picture: bytes) -> bytes:
    """A JPEG, made small."""
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as image:
        image.thumbnail((128, 128))
        file = io.BytesIO()
        image.save(file, "JPEG")
    return file.getvalue()


def count_names(path: str) -> dict[str, int]:
    """How often each name is in a source file."""
    counts: dict[str, int] = {}
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.NAME:
                counts[token.string] = counts.get(token.string, 0) + 1
    return counts


def block_product(blocks: tuple[Any, Any]) -> Any:
    """The product of some rows of a matrix and some columns of another."""
    rows, columns = blocks
    return rows @ columns


def arithmetic(job: tuple[int, int]) -> float:
    """A formula over arrays of `count` numbers, with as many for what is in between."""
    import numpy as np

    seed, count = job
    x = np.arange(seed, seed + count, dtype=np.float64)
    y = 1 / (1 + x)
    return float((np.sqrt(x * y) + (x - 2 * y) ** 2).sum())


def points_in_circle(job: tuple[int, int]) -> int:
    """How many of `count` random points of the unit square are in the circle."""
    seed, count = job
    draw = random.Random(seed).random
    return sum(draw() ** 2 + draw() ** 2 <= 1 for _ in range(count))


def swing(parameters: tuple[float, float]) -> float:
    """Where a damped pendulum is after ten seconds."""
    from scipy.integrate import solve_ivp

    damping, start = parameters
    solution = solve_ivp(
        lambda _t, y: (y[1], -damping * y[1] - math.sin(y[0])), (0, 10), (start, 0), rtol=1e-6
    )
    return float(solution.y[0, -1])
