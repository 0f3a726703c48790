"""An executor's worker process: it runs calls that `serialization` has packed."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import process
from multiprocessing.process import current_process
from typing import TYPE_CHECKING

import msgspec

from . import buffers, interpreter, security
from .buffers import Segments
from .handler import Outcome
from .inheritance import Descriptor, share_tracker, tracker
from .limits import teller
from .machine import resident_memory
from .protocol import CALLS, Frame, Job
from .serialization import CallPickler, CallRunner
from .shares import is_share
from .worker import PATIENCE, Worker
from .worker_errors import RegistrationError

if TYPE_CHECKING:
    from .keys import Keys

__all__ = ["Initializer", "Setup", "boot_code", "call_service", "main", "serve"]


def call_service(name: str | None) -> str:
    """The service of an executor's calls for which some workers are special.

    Raises:
        TypeError: the name is not text.
        ValueError: it is too short or too long.
    """
    if name is None:
        return CALLS
    if not isinstance(name, str):
        raise TypeError(f"a service is named by text, not {name!r}")
    if not 0 < len(name) <= 200:
        raise ValueError(f"a service's name has 1 to 200 characters: {name!r}")
    name.encode()  # text that is no text cannot be sent
    return f"{CALLS}/{name}"


class Initializer(msgspec.Struct, frozen=True):
    """The call that each worker makes before its first task."""

    function_id: bytes
    function: bytes
    data: bytes
    buffers: list[bytes]


class Setup(msgspec.Struct, frozen=True):
    """What a worker takes over from the process of the executor, at its first submit.

    Text is encoded by `os.fsencode`, since it may hold names that are not UTF-8.
    """

    argv: list[bytes]
    path: list[bytes]
    """The module search path, in its order; as in the parent."""
    directory: bytes | None
    """The working directory, unless it has been removed."""
    environment: dict[bytes, bytes]
    pid: int
    authkey: bytes
    """multiprocessing's, so that a Manager's proxies work in tasks."""
    umask: int
    initializer: Initializer | None
    tracker: Descriptor | None = None
    """multiprocessing's resource tracker, to be shared."""
    segments: bool = False
    """Whether big buffers go through segments."""
    max_memory: int = 0
    """Bytes of memory with which a worker wants to be replaced; 0 for no limit."""
    elsewhere: bool = False
    """Whether it is for workers that are not of the executor's own group."""

    @classmethod
    def of_this_process(
        cls, initializer: Initializer | None, *, segments: bool, max_memory: int
    ) -> Setup:
        """What there is to be taken over now."""
        umask = os.umask(0o077)
        os.umask(umask)
        try:
            directory = os.getcwdb()
        except FileNotFoundError:
            directory = None
        return cls(
            argv=[os.fsencode(argument) for argument in sys.argv],
            path=[os.fsencode(entry) for entry in interpreter.search_path()],
            directory=directory,
            environment=dict(os.environb),
            pid=os.getpid(),
            authkey=bytes(current_process().authkey),
            umask=umask,
            initializer=initializer,
            tracker=tracker(),
            segments=segments,
            max_memory=max_memory,
        )

    @classmethod
    def for_others(cls, initializer: Initializer | None, *, max_memory: int) -> Setup:
        """What workers get that somebody else has started, on other hosts for example.

        Nothing that may be secret, such as the environment, or that means something on
        this host only.
        """
        return cls(
            argv=[],
            path=[os.fsencode(entry) for entry in interpreter.search_path()],
            directory=None,
            environment={},
            pid=0,
            authkey=b"",
            umask=0,
            initializer=initializer,
            max_memory=max_memory,
            elsewhere=True,
        )

    def take_over(self) -> None:
        """Make this process a likeness of that one, as far as it is to be."""
        if self.elsewhere:
            # Its own modules first; then the parent's, where the folders are the same.
            known = set(interpreter.search_path())
            path = [os.fsdecode(entry) for entry in self.path]
            sys.path += [entry for entry in path if entry not in known and os.path.exists(entry)]
            return
        sys.argv[:] = [os.fsdecode(argument) for argument in self.argv]
        sys.path[:] = [os.fsdecode(entry) for entry in self.path]
        if self.directory is not None:
            os.chdir(self.directory)
        if os.environb != self.environment:
            os.environb.clear()
            os.environb.update(self.environment)
        os.umask(self.umask)
        current_process().authkey = self.authkey
        self._become_a_child()
        if self.tracker is not None:
            share_tracker(self.tracker)

    def _become_a_child(self) -> None:
        """Have multiprocessing, and records of logging, know this process for a worker."""
        current_process().name = f"ZmqExecutorWorker-{os.getpid()}"
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                sentinel = os.pidfd_open(self.pid)  # readable when that process has ended
                process._parent_process = process._ParentProcess(  # type: ignore[attr-defined]
                    "MainProcess", self.pid, sentinel
                )


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
        self._runner = CallRunner(note=teller(rlimits))

    def setup(self, data: bytes) -> None:
        """Take over the parent's settings, and run the initializer."""
        if not data:
            raise RegistrationError("the master at this endpoint is a JobRunner, and has no calls")
        setup = msgspec.msgpack.decode(data, type=Setup)
        setup.take_over()
        if setup.initializer is not None:
            self._initialize(setup.initializer)
        self._max_memory = setup.max_memory
        if setup.segments and self._directory is not None:
            self._runner.segments = Segments(self._directory)

    def _initialize(self, call: Initializer) -> None:
        self._runner.load_function(call.function_id, call.function)
        outcome = self._runner.run(call.function_id, call.data, call.buffers)
        self._runner.forget(call.function_id)
        try:
            CallPickler().load_outcome(outcome.ok, outcome.data, outcome.buffers)
        except BaseException as error:
            # Where and how the standard library says it.
            logging.getLogger("concurrent.futures").critical(
                "Exception in initializer:", exc_info=True
            )
            # The pool ends now; exit handlers, which flush queues of logging, may finish.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise InitializerError(
                f"the initializer raised {type(error).__name__}: {error}"
            ) from None

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
        ok, data, out_of_band, segment = self._runner.run(job.shared, job.data, frames, job.segment)
        kept = job.segment is not None and (
            self._runner.holds(job.segment) or forks != buffers.forks()
        )
        worn = self._worn() if self._max_memory else ""
        return Outcome(ok, data, "", out_of_band, segment, kept, worn)

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


def boot_code(path: Sequence[str], endpoint: str, journals: str, rlimits: Mapping[str, int]) -> str:
    """Source for `python -c` that becomes a worker with this module search path.

    The resource limits are set by the supervisor; the worker names them in errors.
    """
    return (
        f"import sys; sys.path[:] = {list(path)!r}; "
        f"from zmqexecutor import interpreter; interpreter.depth = {interpreter.depth + 1}; "
        f"from zmqexecutor.calls import main; main({endpoint!r}, {journals!r}, {dict(rlimits)!r})"
    )


def _tell_of_crashes() -> None:
    """Have a crash in native code leave a stack on standard error, if that is open."""
    if faulthandler.is_enabled():
        return  # as the user wants it, by -X faulthandler
    with contextlib.suppress(OSError):
        os.fstat(2)
        faulthandler.enable(2, all_threads=False)


def main(endpoint: str, journals: str, rlimits: Mapping[str, int]) -> None:
    """Be a worker of the executor at this endpoint, for as long as it lives."""
    _tell_of_crashes()
    handler = CallHandler(journals, rlimits)
    worker = Worker.with_handler(endpoint, handler, journals=journals, patience=0)
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
    patience: float = PATIENCE,
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
        patience: seconds to look for the executor.
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
