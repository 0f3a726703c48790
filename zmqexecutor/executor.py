"""`ZmqExecutor`: a drop-in ProcessPoolExecutor.

It checks what it is asked for, starts a supervisor process, and has its engine (`pool`) opened
when it is first used. What is imported here has to be there before the supervisor can start:
only that, and nothing that takes long.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from .errors import BrokenPoolError
from .futures import TaskFuture
from .mapping import MappingExecutor
from .opening import Opening, import_engine
from .settings import PoolSettings
from .system import interpreter
from .wire.liveness import LOST_AFTER

if TYPE_CHECKING:
    from .keys import Keys
    from .master.peers import WorkerInfo
    from .master.tasks import TaskOptions
    from .payload.serialization import Made
    from .payload.shares import SharedObject
    from .pool import Pool

__all__ = ["ExecutorView", "ZmqExecutor"]

P = ParamSpec("P")
T = TypeVar("T")


class ZmqExecutor(MappingExecutor):
    """Runs calls in worker processes that Circus supervises and ZeroMQ reaches.

    It is used like `concurrent.futures.ProcessPoolExecutor`, and differs where that
    one disappoints: lambdas, closures and functions of a script or notebook can be
    submitted, no `__main__` guard is needed, and a worker that dies costs the task
    that it ran and nothing else.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: object = None,  # noqa: ARG002  (part of the signature to be replaced)
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        max_worker_memory: int | None = None,
        worker_rlimits: Mapping[str, int] | None = None,
        endpoint: str | None = None,
        work_address: str | None = None,
        lost_after: float = LOST_AFTER,
        keys: Keys | str | os.PathLike[str] | None = None,
        allow_plaintext_tcp_from_anyone: bool = False,
    ) -> None:
        """Start the pool in the background, and return at once.

        Args:
            max_workers: the most worker processes there may be; by default as many
                as this process may use processors. They start as work demands it. 0,
                if there is an endpoint, for none but those that come there.
            mp_context: accepted for compatibility; it has no effect, since workers
                are never copies of this process.
            initializer: called in each worker before its first task. If it raises,
                the pool is broken.
            initargs: the initializer's arguments.
            max_tasks_per_child: how many tasks a worker does before it is replaced,
                or None for no limit. Its successor is started before, so that for a
                while there may be up to twice as many processes.
            max_worker_memory: bytes of memory (resident set size) from which on a worker
                is replaced when a task has ended, or None for no limit. It goes on
                until its successor is ready; the logger `zmqexecutor` tells (INFO).
            worker_rlimits: resource limits of each worker process, by their names
                in lower case without `RLIMIT_`: "as", "data", "stack", "core" and
                "fsize" in bytes, "cpu" in seconds of processor time, "nofile" and
                "nproc" in numbers, and so on (see the module `resource`).
                `{"data": 2 * 2**30}` makes what needs more than 2 GiB raise
                MemoryError in its task. Each is both the soft and the hard limit;
                one that the system refuses breaks the pool.
            endpoint: where workers can join that something else has started
                (`zmqexecutor workers --calls`), on other hosts for example:
                `tcp://HOST:PORT` or `ipc://PATH`. They come beside those that are kept
                here, may come and go at any time, keep their own environment and
                directory, and import modules from the folders of this program's
                `sys.path` that they have too.
            work_address: the second address that they use, by default any free port
                of the same host, or a file beside that of the endpoint.
            lost_after: seconds after which a worker that joined from another host, and
                is not heard of any more, is taken for lost, with the task that it runs.
            keys: for an endpoint on tcp://, the master's keys or their directory. None
                means those in the default directory, if it is there. Without keys
                tcp:// is refused, also on the loopback interface.
            allow_plaintext_tcp_from_anyone: use tcp:// without keys: whoever can reach
                the endpoint, or is on the way, can run any code as you, here and in the
                workers.

        Raises:
            ValueError: a number is not positive, there is no such resource limit, or an
                address cannot be used.
            TypeError: an argument has the wrong type.
            SerializationError: the initializer or its arguments cannot be pickled.
            OSError: there are too few file descriptors, or no place for the pool's private
                directory. Of the latter the first executor of a program tells at its first use.
            RuntimeError: executors are nested too deep, or there is no interpreter for workers.
        """
        if interpreter.depth >= interpreter.DEEPEST:
            raise RuntimeError(
                f"executors are nested more than {interpreter.DEEPEST} deep. Most likely a module "
                "makes one when it is imported, and its functions are the tasks: each worker "
                "then imports the module too. Make the executor in a function, or below "
                "`if __name__ == '__main__':`"
            )
        settings = PoolSettings.checked(
            max_workers,
            initializer=initializer,
            initargs=initargs,
            max_tasks_per_child=max_tasks_per_child,
            max_worker_memory=max_worker_memory,
            worker_rlimits=worker_rlimits,
            endpoint=endpoint,
            work_address=work_address,
            lost_after=lost_after,
            keys=keys,
            allow_plaintext_tcp_from_anyone=allow_plaintext_tcp_from_anyone,
        )
        # It keeps what the initargs are made of, too: later workers look for that here.
        self._settings = settings
        self._max_workers = settings.max_workers  # read by others, private as it is
        self._opening = Opening(settings)
        # What only the engine can check is to be raised here.
        if initializer is not None or endpoint is not None or "zmqexecutor.pool" in sys.modules:
            self._opening.pool()

    @property
    def _engine(self) -> Pool:
        return self._opening.pool()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> TaskFuture[T]:
        """Schedule `fn(*args, **kwargs)` in a worker, and return its future.

        What cannot be pickled fails the future, with SerializationError.

        Raises:
            RuntimeError: the executor was shut down, or the interpreter is exiting.
            BrokenPoolError: the pool cannot run tasks any more.
            ForkedExecutorError: the executor was made before this process was forked.
        """
        return self._submit(fn, args, kwargs)

    def options(
        self,
        *,
        timeout: float | None = None,
        retries: int = 0,
        retry_on: type[BaseException] | tuple[type[BaseException], ...] = Exception,
        retry_delay: float = 0.1,
        priority: int = 0,
        name: str | None = None,
        kill_on_cancel: bool = False,
        service: str | None = None,
    ) -> ExecutorView:
        """Return a view of this pool whose `submit` and `map` have the standard signatures.

        Args:
            timeout: seconds that a task may run, counted from when a worker begins with
                it (to load its function and arguments is a part of it). Then its worker
                is killed and replaced, and the task fails with TaskTimeoutError, which
                shows where it was. None for no limit. With `map`, a chunk is a task.
            retries: how often a task is tried again after a failure, 0 for never.
            retry_on: the failures that are worth another try: classes of exceptions
                that tasks raise, TaskTimeoutError, WorkerLostError. What could not be
                pickled is not, unless SerializationError itself is named.
            retry_delay: seconds before the first other try; the wait is doubled before
                each further one, up to a minute.
            priority: tasks of higher priority leave the queue first; may be negative.
            name: what error messages call the tasks, instead of the function's name.
            kill_on_cancel: make `cancel` of a future kill the task if it runs, as
                `TaskFuture.kill` does. asyncio cancels the futures of
                `loop.run_in_executor` when their awaiting task is cancelled.
            service: have these tasks done by workers that joined (see `endpoint`) as
                special ones, for their hardware for example:
                `zmqexecutor workers --calls --service gpu`. Others do not take them.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument is out of range.
        """
        import_engine()  # of which these are parts
        from .master.tasks import make_options
        from .payload.setups import call_service

        options = make_options(
            timeout, retries, retry_on, retry_delay, priority, name, kill_on_cancel, service
        )
        call_service(service)  # checked now, not by each submit
        if service is not None and not self._settings.joinable:
            raise ValueError(
                f"no worker can offer the service {service!r}: give the pool an endpoint, where "
                "such workers can join"
            )
        return ExecutorView(self, options)

    def share(self, obj: T) -> SharedObject[T]:
        """Make an object known that many tasks use, and return a handle to pass to them.

        It is pickled now, once: later changes of it do not count. Wherever the handle is
        among the arguments of this executor's tasks, the task gets the object in its
        place. Each worker unpickles it once, and its tasks get the same object, whose
        arrays are read-only and lie in memory that all workers share.

        It is freed when no handle is left and no pending task uses it. A handle cannot
        be sent in a result or through a global, nor used with another executor.

        Raises:
            SerializationError: it cannot be pickled.
            RuntimeError, BrokenPoolError, ForkedExecutorError: as `submit`.
        """
        return self._engine.share(obj)

    def _submit(self, *call: Any, **others: Any) -> TaskFuture[Any]:
        """Called once: from then on the engine's own method is in its place."""
        submit = vars(self)["_submit"] = self._engine.submit
        return submit(*call, **others)

    def _submitter(self, fn: Callable[..., T], *, same: bool) -> Callable[..., Future[T]]:
        bound: Any = self.submit
        ours = getattr(bound, "__func__", None) is _SUBMIT and bound.__self__ is self
        if not ours:  # somebody has put theirs in its place
            return super()._submitter(fn, same=same)
        return self._submitter_with(fn, same)

    def _submitter_with(
        self, fn: Callable[..., T], same: bool, *options: TaskOptions
    ) -> Callable[..., Future[T]]:
        made: Made | None = {} if same else None
        return lambda *args: self._submit(fn, args, {}, *options, made=made)

    def wait_for_workers(self, number: int, timeout: float | None = None) -> None:
        """Return when at least so many workers are ready, of all kinds.

        Workers of this pool's own are started for it, as many as `max_workers` allows.
        A pool that is to have its workers ready before its first task needs this.

        Args:
            number: of workers.
            timeout: seconds to wait for them, or None to wait for as long as it takes.

        Raises:
            TimeoutError: they were not there in time.
            ValueError: there will never be so many.
            TypeError: an argument has the wrong type.
            RuntimeError, BrokenPoolError, ForkedExecutorError: as `submit`.
        """
        self._engine.wait_for_workers(number, timeout)

    @property
    def workers(self) -> Sequence[WorkerInfo]:
        """The workers that are ready, oldest first."""
        pool = self._opening.opened
        return () if pool is None else pool.workers

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks, and end the workers when the pending ones are done.

        Args:
            wait: return when all is done and the workers have ended; otherwise at
                once, and they end in the background.
            cancel_futures: cancel the tasks that have not been sent to a worker, and
                try none again that fails or has failed.
        """
        if (pool := self._opening.end()) is not None:
            pool.shutdown(wait=wait, cancel_futures=cancel_futures)

    def terminate_workers(self) -> None:
        """Shut down now: cancel what is queued, and end the workers by SIGTERM.

        Returns at once. Tasks that were running fail with BrokenPoolError. What they have
        started in their process groups gets the SIGTERM too. Workers that do not heed it
        within seconds are killed.
        """
        self._end_workers("terminate_workers")

    def kill_workers(self) -> None:
        """Shut down now: cancel what is queued, and end the workers by SIGKILL.

        Returns at once. Tasks that were running fail with BrokenPoolError. What they have
        started in their process groups is killed too.
        """
        self._end_workers("kill_workers", kill=True)

    def _end_workers(self, name: str, *, kill: bool = False) -> None:
        self._abort(BrokenPoolError(f"{name}() ended the worker of this task"), kill=kill)

    def _abort(self, reason: BaseException, *, wait: bool = False, kill: bool = False) -> None:
        if (pool := self._opening.end()) is not None:
            pool.abort(reason, wait=wait, kill=kill)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        if exc_type is not None and issubclass(exc_type, KeyboardInterrupt):
            # Whoever pressed Ctrl-C does not want to wait for what was running.
            self._abort(exc or KeyboardInterrupt(), wait=True)
        else:
            self.shutdown(wait=True)
        return None


_SUBMIT: Final = ZmqExecutor.submit


class ExecutorView(MappingExecutor):
    """A `ZmqExecutor` seen with certain options; made by its `options`.

    It is an executor of its own for those who are handed one. To shut it down is to
    shut down the pool.
    """

    def __init__(self, executor: ZmqExecutor, options: TaskOptions) -> None:
        self._executor = executor
        self._options = options

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> TaskFuture[T]:
        """As `ZmqExecutor.submit`, with the options of this view."""
        return self._executor._submit(fn, args, kwargs, self._options)

    def _submitter(self, fn: Callable[..., T], *, same: bool) -> Callable[..., Future[T]]:
        return self._executor._submitter_with(fn, same, self._options)

    def options(self, **changes: Any) -> ExecutorView:
        """Return a view that has these options (see `ZmqExecutor.options`) and its own others."""
        mine = {name: getattr(self._options, name) for name in self._options.__struct_fields__}
        return self._executor.options(**{**mine, **changes})

    def share(self, obj: T) -> SharedObject[T]:
        """As `ZmqExecutor.share`; the handle is good for the pool and all its views."""
        return self._executor.share(obj)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut down the pool that this is a view of."""
        self._executor.shutdown(wait, cancel_futures=cancel_futures)
