"""An executor's engine (`pool`), which is opened when it is first used.

To open it is to import pyzmq and more, if the program has not done so. The supervisor process,
which has to import as much, is started before, so that it does that at the same time.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from .errors import AFTER_EXIT, AFTER_SHUTDOWN, FORKED, ForkedExecutorError
from .settings import PoolSettings
from .supervision.supervisor_process import SupervisorProcess
from .system import interpreter
from .system.descriptors import check_descriptors
from .system.shutdown import end_before_exit

if TYPE_CHECKING:
    from .pool import Pool

__all__ = ["Opening"]

LONGEST_WAIT: Final = 2.0
"""Seconds for which a fork is put off, while another thread imports the engine."""


class Opening:
    """For any thread. What is dropped without having been opened leaves nothing.

    Attributes:
        opened: the engine, or None if it has not been opened.
    """

    def __init__(self, settings: PoolSettings) -> None:
        """Start a supervisor, unless this is a worker.

        Raises:
            OSError: too few file descriptors are left.
            RuntimeError: there is no interpreter for workers.
        """
        self.opened: Pool | None = None
        self._settings = settings
        self._supervisor: SupervisorProcess | None = None
        self._refusal = ""
        self._making = False
        self._pid = os.getpid()
        # A signal handler may come to `end` while this thread holds it.
        self._lock = threading.RLock()
        if settings.max_workers:
            check_descriptors()
            interpreter.python_command()  # there is none in a frozen program
        # A worker has most likely imported the module that makes this for its functions.
        if settings.max_workers and not interpreter.depth:
            with suppress(OSError, RuntimeError):  # the engine tries again, and tells of it
                # With resource limits workers are not forked from a template.
                preload = "" if settings.worker_rlimits else interpreter.WORKER
                self._supervisor = SupervisorProcess(preload)
                weakref.finalize(self, self._supervisor.discard)
        end_before_exit(self)

    def pool(self) -> Pool:
        """Open it, if it is not open.

        Raises:
            RuntimeError: that is not to be any more; or this thread is opening an executor already,
                and has been interrupted by a signal handler or a finalizer that uses one.
            ForkedExecutorError: this is a fork of the process that made it.
            OSError: it cannot be opened now.
        """
        if self.opened is not None:
            return self.opened
        if self._pid != os.getpid():
            raise ForkedExecutorError(FORKED)
        # Not under the lock: Python sees it when import locks are waited for in a circle.
        engine = import_engine()
        with self._lock:
            if self._making:
                raise RuntimeError(_INTERRUPTED_ITSELF)
            if self.opened is None:
                self._check()
                self._making = True
                try:
                    pool = engine(self._settings, self._supervisor)
                    if self._refusal:  # meanwhile, by a signal handler or another thread
                        pool.shutdown(wait=True, cancel_futures=True)
                    self._check()
                    self.opened = pool
                finally:
                    self._making = False
                    self._discard()  # unless it is in use
            return self.opened

    def _check(self) -> None:
        if self._refusal:
            raise RuntimeError(self._refusal)

    def end(self) -> Pool | None:
        """Open it no more; return it if it is open."""
        self._refuse(AFTER_SHUTDOWN)
        return self.opened

    def end_at_exit(self) -> None:
        """The interpreter exits. What is open has an end of its own."""
        self._refuse(AFTER_EXIT)

    def _refuse(self, reason: str) -> None:
        if self.opened is None and self._pid == os.getpid():
            self._refusal = self._refusal or reason
            with self._lock:  # another thread may be opening it
                if not self._making:
                    self._discard()

    def _discard(self) -> None:
        # Taken first: a signal handler may come here while this waits for the process's end.
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.discard()


_threads: set[int] = set()
"""Those that are importing the engine."""
_interrupted = False
_INTERRUPTED_ITSELF: Final = (
    "a signal handler or a finalizer uses an executor for the first time, while its thread is "
    "opening one; let it do that later, or call wait_for_workers(1) before"
)


def import_engine() -> type[Pool]:
    """Import what takes long.

    Raises:
        RuntimeError: this has interrupted an import of it; or an interrupt, such as Ctrl-C, has
            left it half imported.
    """
    global _interrupted
    thread = threading.get_ident()
    if thread in _threads:
        raise RuntimeError(_INTERRUPTED_ITSELF)
    try:
        _threads.add(thread)
        from .pool import Pool
    except Exception as error:
        if _interrupted:  # pyzmq cannot be imported then, and says so in odd ways
            raise RuntimeError(
                "the import of what executors need was interrupted before; start the program again"
            ) from error
        raise
    except BaseException:
        _interrupted = True
        raise
    finally:
        _threads.discard(thread)
    return Pool


def _wait_for_others() -> None:
    """Before a fork: the child would find import locks that nobody there releases.

    Not for ever: they may need one that this thread holds.
    """
    deadline = time.monotonic() + LONGEST_WAIT
    while _threads - {threading.get_ident()} and time.monotonic() < deadline:
        time.sleep(0.001)


def _forget_others() -> None:
    _threads.intersection_update({threading.get_ident()})


os.register_at_fork(before=_wait_for_others, after_in_child=_forget_others)
