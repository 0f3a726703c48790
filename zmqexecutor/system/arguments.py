"""Checks of the numbers that users give."""

from __future__ import annotations

import math
from typing import Any, Final

__all__ = ["check_integer", "check_seconds", "check_timeout"]


_LONGEST: Final = 2_000_000.0
"""Seconds, some three weeks: what polls wait for at most, as they count milliseconds in 31 bits."""


def check_integer(what: str, number: Any) -> int:
    """Return an integer.

    Raises:
        TypeError: it is none; True and False are none.
    """
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{what} must be an integer, not {number!r}")
    return number


def check_seconds(what: str, seconds: Any) -> float:
    """Return a number of seconds, which may be infinite.

    Raises:
        TypeError: it is no number.
        ValueError: it is not a number.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{what} must be a number of seconds, not {seconds!r}")
    if seconds != seconds:
        raise ValueError(f"{what} must be a number of seconds, not {seconds}")
    try:
        return float(seconds)
    except OverflowError:
        return math.inf if seconds > 0 else -math.inf


def check_timeout(what: str, seconds: Any) -> float | None:
    """Return how long to wait: 0 or more seconds, or None for as long as it takes.

    Raises:
        TypeError: it is neither a number nor None.
        ValueError: it is not a number.
    """
    if seconds is None:
        return None
    seconds = check_seconds(what, seconds)
    return None if seconds > _LONGEST else max(0.0, seconds)
