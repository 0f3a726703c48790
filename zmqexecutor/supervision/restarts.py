"""How often a supervisor that ends unasked is replaced."""

from __future__ import annotations

from collections import deque
from typing import Final

__all__ = ["PERIOD", "RESTARTS", "Restarts"]

RESTARTS: Final = 3
"""So often within `PERIOD`; what ends at once again and again would go on so for ever."""
PERIOD: Final = 60.0
"""Seconds."""


class Restarts:
    """When the last ones were."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=RESTARTS)

    def add(self, now: float) -> bool:
        """Note one more, on the monotonic clock; False if there were too many lately."""
        times = self._times
        if len(times) == RESTARTS and now - times[0] < PERIOD:
            return False
        times.append(now)
        return True
