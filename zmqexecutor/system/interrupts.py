"""Exceptions that are meant for the program, and not for what it was just calling."""

from __future__ import annotations

import threading
from types import FrameType

__all__ = ["is_interrupt"]


def is_interrupt(error: BaseException) -> bool:
    """Say whether an exception that was caught is one that a signal handler has raised.

    A handler runs in the middle of anything that the main thread does: what it raises, to end
    the program or to limit some time, says nothing of that.
    """
    if isinstance(error, KeyboardInterrupt):
        return True
    if threading.current_thread() is not threading.main_thread():
        return False
    # Not the frame that has caught it: before Python 3.13 one that still runs would keep what
    # it is asked for, and all its variables with it.
    trace = error.__traceback__
    while trace is not None and (trace := trace.tb_next) is not None:
        if _is_handler(trace.tb_frame):
            return True
    return False


def _is_handler(frame: FrameType) -> bool:
    """Whether it was given the frame that it has interrupted, as nothing but a handler is."""
    interrupted = frame.f_back
    if interrupted is None:
        return False
    return any(
        value is interrupted
        or (type(value) is tuple and any(each is interrupted for each in value))
        for value in list(frame.f_locals.values())
    )
