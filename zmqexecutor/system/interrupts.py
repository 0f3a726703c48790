"""Exceptions that are meant for the program, and not for what it was just calling."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from types import CodeType

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
    handlers = set(_handlers())
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        trace = trace.tb_next
    return False


def _handlers() -> Iterator[CodeType]:
    """The code of the handlers that are installed now."""
    for signum in signal.valid_signals():
        handler = signal.getsignal(signum)
        handler = getattr(handler, "func", handler)  # of a partial
        # A function or method, or an object that is called.
        for what in (handler, vars(type(handler)).get("__call__")):
            code = getattr(what, "__code__", None)
            if isinstance(code, CodeType):
                yield code
