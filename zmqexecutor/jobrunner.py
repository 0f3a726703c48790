"""`JobRunner`: the public master, which pushes jobs to registered workers."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from .errors import BrokenPoolError, ForkedExecutorError, JobFailedError, TaskTimeoutError
from .master.attendance import check_wait
from .master.channels import joining_entrance
from .master.coordinator import MasterOptions
from .master.lean import LeanFuture
from .master.master import Master
from .master.peers import WorkerInfo
from .master.tasks import Task
from .system.arguments import check_timeout
from .wire import codecs, security
from .wire.liveness import LOST_AFTER
from .wire.protocol import DEFAULT_SERVICE, Frame, Result, check_service

if TYPE_CHECKING:
    from .keys import Keys

__all__ = ["JobRunner"]

Data: TypeAlias = Any
"""`str` or `bytes`; with a codec, what that one can carry."""

PATIENCE = 10.0
"""Default of how long a job waits while no worker is registered, in seconds."""


class JobRunner:
    """A master at an endpoint, where workers register to be sent jobs.

    Example:
        With workers at the same endpoint that square numbers::

            with JobRunner("ipc:///tmp/master.ipc") as runner:
                print(runner.execute("1", "12"))  # 144
    """

    def __init__(
        self,
        endpoint: str,
        *,
        patience: float | None = PATIENCE,
        work_address: str | None = None,
        lost_after: float = LOST_AFTER,
        keys: Keys | str | os.PathLike[str] | None = None,
        allow_plaintext_tcp_from_anyone: bool = False,
    ) -> None:
        """Check the arguments; nothing is opened before `start`.

        Args:
            endpoint: where to listen to workers, `ipc://PATH` or `tcp://HOST:PORT`.
            patience: seconds that a job waits while no worker is registered, or
                None to wait for ever.
            work_address: the second address, where workers that name no workpoint connect;
                by default any free port of the same host, or a file beside that of the
                endpoint.
            lost_after: seconds after which a worker on another host, from which nothing
                is heard any more, is taken for lost.
            keys: for tcp://, the master's keys or their directory. None means those in
                the default directory, if it is there; without keys only addresses of
                the loopback interface can be used, in plain text.
            allow_plaintext_tcp_from_anyone: use tcp:// without keys at any address:
                whoever can reach it can read and forge all that is sent.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: the endpoint cannot be used, or not without keys.
            OSError: keys are missing, or other users could read them.
        """
        access = security.Access.decide(
            endpoint,
            "master",
            keys,
            allow_plaintext_tcp_from_anyone=allow_plaintext_tcp_from_anyone,
        )
        joining = joining_entrance(endpoint, work_address, lost_after, access)
        self._entrance = msgspec.structs.replace(joining, calls=True)
        self._patience = check_timeout("patience", patience)
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a finalizer or a signal handler may submit, too
        self._master: Master | None = None

    def start(self) -> None:
        """Listen at the endpoint, in a background thread.

        Raises:
            RuntimeError: it has been started already.
            ForkedExecutorError: this is a forked child of the process that made it.
            OSError: the endpoint is in use, or cannot be bound.
        """
        self._check_owner()
        with self._lock:
            if self._master is not None:
                raise RuntimeError("this JobRunner has been started; call stop() first")
            master = Master(MasterOptions([self._entrance], patience=self._patience))
            master.start()
            self._master = master
            # Dropped without `stop`, it finishes what is pending, and gives the endpoint back.
            self._release = weakref.finalize(self, master.close)
            self._release.atexit = False

    def stop(self) -> None:
        """Stop listening. Workers stay, and look for the next master at the endpoint.

        Jobs that no worker has yet are cancelled, others fail with JobFailedError. In a forked
        child of the process that made it, it does nothing.
        """
        if self._pid != os.getpid():
            return  # not even wait for the lock, which a thread may have held at the fork
        with self._lock:
            master, self._master = self._master, None
        if master is not None:
            self._release.detach()
            master.abort(JobFailedError("the master was stopped before the result came"))
            master.join()

    @property
    def workers(self) -> Sequence[WorkerInfo]:
        """The workers that are registered and ready, oldest first."""
        master = self._master
        return master.workers if master else ()

    @property
    def refused(self) -> Mapping[str, int]:
        """How many connections were refused over TCP with keys, since `start`, by reason."""
        master = self._master
        return master.refused if master else {}

    def wait_for_workers(self, number: int, timeout: float | None = None) -> None:
        """Return when at least so many workers are registered and ready.

        Args:
            number: of workers.
            timeout: seconds to wait for them, or None to wait for as long as it takes.

        Raises:
            TimeoutError: they were not there in time.
            TypeError, ValueError: an argument makes no sense.
            RuntimeError: the runner is not started, or was stopped.
        """
        timeout = check_wait(number, timeout)
        self._check_owner()
        if (master := self._master) is None:
            raise RuntimeError("this JobRunner is not running; call start() first")
        master.wait_for_workers(number, timeout)

    def submit(
        self,
        job_id: str,
        data: Data,
        *,
        service: str = DEFAULT_SERVICE,
        codec: str | None = None,
    ) -> Future[Data]:
        """Queue a job, and return a future of its result.

        Args:
            job_id: a name for the job; the target gets it, and messages show it.
            data: what the target gets, as `str` or `bytes` just as given here.
            service: what is asked for: only workers that offer it are sent the job.
            codec: "json" or "msgpack" for other data, which is sent in that encoding;
                the result comes back in the same. Or "pickle", for any Python objects:
                the worker must be started with `allow_pickle`, and as its answer is
                unpickled here, this process must trust it too.

        Raises:
            RuntimeError: the runner is not started.
            TypeError: an argument has the wrong type.
            ValueError: an argument is text that UTF-8 cannot carry, or there is no such
                codec.
        """
        if not isinstance(job_id, str):
            raise TypeError(f"job_id must be str, not {type(job_id).__name__}")
        check_service(service)
        job_id.encode()  # text that is no text must fail here, and only its caller
        encoded, encoding = codecs.encode(data, codec)
        future: LeanFuture[Data] = LeanFuture()
        task = Task(
            kind=service,
            size=len(encoded),
            future=future,
            data=encoded,
            decode=_Decoder(job_id, codec),
            name=f"job {job_id!r}",
            id=job_id,
            codec=encoding,
            service=service,
        )
        self._check_owner()
        with self._lock:
            if self._master is None:
                raise RuntimeError("this JobRunner is not running; call start() first")
            if self._master.broken:
                raise BrokenPoolError(self._master.broken)
            self._master.submit(task)
        return future

    def execute(
        self,
        job_id: str,
        data: Data,
        timeout: float | None = None,
        *,
        service: str = DEFAULT_SERVICE,
        codec: str | None = None,
    ) -> Data:
        """Have a worker do a job, and return its result.

        Args:
            job_id: as for `submit`.
            data: as for `submit`.
            timeout: seconds to wait for the result, or None to wait for as long as
                it takes; a worker that dies ends the wait in any case.
            service: as for `submit`.
            codec: as for `submit`.

        Raises:
            NoWorkerError: no worker for this service registered within the runner's
                `patience`.
            TaskTimeoutError: the result did not come in time.
            JobFailedError: the target raised; the message has its traceback.
            WorkerLostError: the worker died while it ran the job.
            RuntimeError: the runner is not started.
            TypeError: an argument has the wrong type.
        """
        timeout = check_timeout("timeout", timeout)
        future = self.submit(job_id, data, service=service, codec=codec)
        # Not `future.result(timeout)`: a Ctrl-C in the middle of a Condition's wait can
        # come out as a RuntimeError about its lock. This one is a single step.
        done: SimpleQueue[Future[Data]] = SimpleQueue()
        future.add_done_callback(done.put)
        try:
            return done.get(timeout=timeout).result(0)
        except CancelledError:
            raise JobFailedError("the master was stopped before a worker had the job") from None
        except Empty:
            queued = future.cancel()
            raise TaskTimeoutError(
                f"job {job_id!r} had no result after {timeout:g} s: "
                + ("no worker was free to take it" if queued else "a worker is still running it")
            ) from None

    def _check_owner(self) -> None:
        if self._pid != os.getpid():
            raise ForkedExecutorError(
                "this JobRunner belongs to the process that made it, not to its forked child"
            )

    def __enter__(self) -> JobRunner:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


class _Decoder:
    """Makes data of a result, or raises what went wrong."""

    __slots__ = ("_codec", "_job_id")

    def __init__(self, job_id: str, codec: str | None) -> None:
        self._job_id = job_id
        self._codec = codec

    def __call__(self, result: Result, buffers: Sequence[Frame]) -> Data:
        data = bytes(buffers[0]) if buffers else result.data
        if not result.ok:
            text = data.decode(errors="replace").rstrip()
            raise JobFailedError(f"job {self._job_id!r} failed in its worker:\n{text}")
        try:
            return codecs.decode_as_asked(data, result.codec, self._codec)
        except Exception as error:
            raise JobFailedError(
                f"job {self._job_id!r} has an answer that cannot be decoded: {error}"
            ) from error
