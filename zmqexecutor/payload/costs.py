"""What it takes to compare large globals at each `submit`: the user is told, once for each.

So does Dask with large objects in its graphs: nobody looks for the time of a loop in `submit`.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Final

__all__ = ["CHEAP", "Costs"]

CHEAP: Final = 0.0005
"""Seconds that a comparison may take."""
_MUCH: Final = 1.0
"""Seconds for all comparisons of a global, from which on it is worth a warning."""
_REMEMBERED: Final = 1024
_PACKAGE: Final = __name__.partition(".")[0]


class _Cost:
    """Of the comparisons of one global."""

    __slots__ = ("seconds", "times")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.times = 0


class Costs:
    """Adds them up. Threads may race here: what is lost is a measurement.

    Attributes:
        due: warnings that have not been given yet.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self.due: list[str] = []
        self._costs: dict[str, _Cost] = {}

    def timed(self, what: str, checks: Iterable[Callable[[], bool]]) -> Callable[[], bool]:
        """Return a check that is these, and measures them.

        Args:
            what: of which global they are, in words.
            checks: that it has not changed.
        """
        checks = tuple(checks)
        if len(self._costs) >= _REMEMBERED:
            self._costs.clear()
        cost = self._costs.setdefault(what, _Cost())

        def check() -> bool:
            start = time.thread_time()
            for each in checks:
                if not each():
                    return False
            cost.times += 1
            before = cost.seconds
            cost.seconds += time.thread_time() - start
            if before < _MUCH <= cost.seconds and cost.seconds > CHEAP * cost.times:
                self._note(what, cost)
            return True

        return check

    def _note(self, what: str, cost: _Cost) -> None:
        milliseconds = 1000 * cost.seconds / cost.times
        self.due.append(
            f"Each call of submit or map compares {what} with what the workers have, which takes "
            f"{milliseconds:.3g} ms, and has been done {cost.times} times. To save this time let "
            "one map do more of the calls; or pass the object as an argument that is shared, "
            "executor.share(...); or have the initializer make it in the workers."
        )

    def warn(self) -> None:
        """Give the warnings that are due, in the name of the code that called this package.

        Raises:
            PerformanceWarning: the user has asked for warnings to be errors.
        """
        from ..errors import PerformanceWarning

        level, frame = 1, sys._getframe()
        while frame.f_back and _is_ours(frame.f_globals.get("__name__")):
            level, frame = level + 1, frame.f_back
        while True:
            try:
                message = self.due.pop(0)
            except IndexError:  # another thread has given it
                return
            warnings.warn(message, PerformanceWarning, stacklevel=level)


def _is_ours(module: object) -> bool:
    return str(module).partition(".")[0] == _PACKAGE
