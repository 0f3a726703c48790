"""An executor's worker process: it runs calls that `serialization` has packed."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from time import monotonic, sleep
from typing import TYPE_CHECKING, Final

import msgspec

from ..payload.failures import describe
from ..payload.serialization import CallPickler, CallRunner
from ..payload.setups import Initializer, Setup, call_service
from ..payload.shares import is_share
from ..system import interpreter
from ..system.limits import teller
from ..system.machine import resident_memory
from ..system.memory import keep_freed_memory
from ..wire import buffers, security
from ..wire.buffers import Segments
from ..wire.liveness import WORKER_PATIENCE
from ..wire.protocol import CALLS, Frame, Job
from ..worker_errors import RegistrationError
from .handler import Outcome
from .worker import Worker

if TYPE_CHECKING:
    from ..keys import Keys

__all__ = ["main", "serve"]

START_PATIENCE: Final = 30.0
"""Seconds in which a master has to answer its own workers."""


class InitializerError(Exception):
    """The user's initializer raised; its traceback has been logged."""


class CallHandler:
    """Runs packed calls (see `handler.Handler`)."""

    def __init__(
        self,
        directory: str | None,
        rlimits: Mapping[str, int],
        services: Sequence[str] = (CALLS,),
    ) -> None:
        """Start without any function.

        Args:
            directory: the executor's private directory, if this is one of its group.
            rlimits: limits that are set for this process, to be named in errors.
            services: what is offered, as `call_service` names it.
        """
        self.services = services
        self._directory = directory
        self._max_memory = 0
        self._limited = bool(rlimits)
        self._runner = CallRunner(note=teller(rlimits))

    def setup(self, data: bytes) -> None:
        """Take over the parent's settings, and run the initializer."""
        if not data:
            raise RegistrationError("the master at this endpoint is a JobRunner, and has no calls")
        setup = msgspec.msgpack.decode(data, type=Setup)
        setup.take_over()
        if not setup.max_memory:  # what is kept would count
            keep_freed_memory()
        if setup.initializer is not None:
            self._initialize(setup.initializer)
        self._max_memory = setup.max_memory
        if setup.segments and self._directory is not None:
            self._runner.segments = self._open_segments(self._directory, setup.kept_mappings)

    def _open_segments(self, directory: str, kept_mappings: int) -> Segments:
        segments = Segments(directory)
        if kept_mappings and not self._max_memory and not self._limited:  # they would count
            segments.keep_mappings(kept_mappings)
            segments.on_idle = Trimmer(segments).wake
        return segments

    def _initialize(self, call: Initializer) -> None:
        for key, contents in call.shares:
            self._runner.load_share(key, contents)
        self._runner.load_function(call.function_id, call.function)
        outcome = self._runner.run(call.function_id, call.data, call.buffers)
        self._runner.forget(call.function_id)
        for key, _ in call.shares:
            self._runner.forget_share(key)
        try:
            CallPickler().load_outcome(outcome)
        except BaseException as error:
            # Where and how the standard library says it.
            logging.getLogger("concurrent.futures").critical(
                "Exception in initializer:", exc_info=True
            )
            # The pool ends now; exit handlers, which flush queues of logging, may finish.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise InitializerError(f"the initializer raised {describe(error)}") from None

    def define(self, key: bytes, data: bytes) -> None:
        """Keep a function, or a shared object."""
        if is_share(key):
            self._runner.load_share(key, data)
        else:
            self._runner.load_function(key, data)

    def forget(self, key: bytes) -> None:
        """Let go of it."""
        if is_share(key):
            self._runner.forget_share(key)
        else:
            self._runner.forget(key)

    def teardown(self) -> None:
        """Nothing: what tasks have left here ends with the process."""

    def run(self, job: Job, frames: Sequence[Frame]) -> Outcome:
        """Call a function that was defined before."""
        forks = buffers.forks()
        outcome = self._runner.run(job.shared, job.data, frames, job.segment)
        ok, data, result, segment = outcome.ok, outcome.data, outcome.buffers, outcome.segment
        del outcome
        kept = False
        if job.segment is not None:
            if result and self._runner.holds():
                # Perhaps parts of an argument, whose segment could not be used again for them.
                result = [memoryview(bytes(buffer)) for buffer in result]
            kept = self._runner.holds() or buffers.forked_since(forks)
        worn = self._worn() if self._max_memory else ""
        return Outcome(ok, data, "", result, segment, kept, worn)

    def _worn(self) -> str:
        """Why this process should be replaced, told once."""
        limit = self._max_memory
        if (memory := resident_memory()) <= limit:
            return ""
        self._max_memory = 0
        return (
            f"it uses {memory / 2**20:.0f} MiB of memory after a task, "
            f"more than max_worker_memory ({limit / 2**20:.0f} MiB)"
        )


class Trimmer:
    """Trims a worker's segments in time: in a thread, since a task may take hours."""

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self._lock = threading.Lock()
        self._running = False

    def wake(self) -> None:
        """There is something to be trimmed at `trim_at`."""
        thread = threading.Thread(target=self._run, name="zmqexecutor memory", daemon=True)
        with self._lock:
            if self._running:
                return
            try:
                thread.start()
            except RuntimeError:  # there may be no more threads
                pass
            else:
                self._running = True
                return
        self._segments.trim(0.0)

    def _run(self) -> None:
        while True:
            with self._lock:
                at = self._segments.trim_at
                if at is None:
                    self._running = False
                    return
            try:
                sleep(max(0.0, at - monotonic()))
                self._segments.trim()
            except BaseException:
                self._running = False  # the next one may fare better
                raise


def _tell_of_crashes() -> None:
    """Have a crash in native code leave a stack on standard error, if that is open."""
    if faulthandler.is_enabled():
        return  # as the user wants it, by -X faulthandler
    with contextlib.suppress(OSError):
        os.fstat(2)
        faulthandler.enable(2, all_threads=False)


def main(endpoint: str, journals: str, rlimits: Mapping[str, int], depth: int) -> None:
    """Be a worker of the executor at this endpoint, for as long as it lives.

    Args:
        endpoint: the executor's.
        journals: its private directory.
        rlimits: resource limits that are set for this process, to be named in errors.
        depth: how many executors this process is inside of.
    """
    interpreter.depth = depth
    # What this process was started by is not of the user's script.
    script = vars(sys.modules["__main__"])
    for name in [name for name in script if not name.startswith("__")]:
        del script[name]
    _tell_of_crashes()
    handler = CallHandler(journals, rlimits)
    worker = Worker.with_handler(
        endpoint, handler, journals=journals, patience=START_PATIENCE, owned=True
    )
    try:
        worker.run()
    except InitializerError:
        sys.exit(1)
    except RegistrationError as error:
        sys.exit(f"zmqexecutor worker {os.getpid()}: {error}")


def serve(
    endpoint: str,
    services: Sequence[str] = (),
    *,
    patience: float | None = WORKER_PATIENCE,
    keys: Keys | str | os.PathLike[str] | None = None,
    allow_plaintext_tcp_from_anyone: bool = False,
) -> bool:
    """Be a worker of the `ZmqExecutor` at this endpoint, until it is gone, or lets us go.

    Call it in the main thread of a fresh process: tasks leave their modules and globals
    there, so that a second executor needs another process.

    Args:
        endpoint: the executor's.
        services: what this worker is special for (see `ZmqExecutor.options`); it makes
            only calls that ask for one of these. By default those that ask for none.
        patience: seconds to look for the executor, or None to look for as long as it takes.
        keys: as for `ZmqExecutor`, but a worker's.
        allow_plaintext_tcp_from_anyone: use tcp:// without keys: whoever can pose as
            the executor can run any code in this process.

    Returns:
        Whether the executor went away, or had taken this worker for lost; then another
        worker might serve what comes next. Else it was told to leave, by SIGTERM for
        example.

    Raises:
        RegistrationError: no executor was found in time, or it refused this worker.
        ValueError: the endpoint cannot be used, or not without keys.
        OSError: keys are missing, or other users could read them.
    """
    access = security.Access.decide(
        endpoint,
        "worker",
        keys,
        allow_plaintext_tcp_from_anyone=allow_plaintext_tcp_from_anyone,
        allow_plaintext_loopback=False,
    )
    interpreter.depth += 1
    _tell_of_crashes()
    handler = CallHandler(None, {}, [call_service(name) for name in services] or [CALLS])
    worker = Worker.with_handler(
        endpoint, handler, journals=None, patience=patience, once=True, keys=access.keys
    )
    worker.run()
    return worker.lost and not worker.stopped
