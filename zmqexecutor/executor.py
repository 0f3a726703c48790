"""`ZmqExecutor`: a drop-in replacement for `ProcessPoolExecutor`."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import msgspec

from .errors import BrokenPoolError, ForkedExecutorError, SerializationError
from .futures import TaskFuture
from .mapping import MappingExecutor
from .master.attendance import check_wait
from .master.channels import LOST_AFTER, Entrance, joining_entrance
from .master.coordinator import MasterOptions
from .master.master import Master
from .master.peers import WorkerInfo
from .master.tasks import PLAIN, Task, TaskOptions, make_options
from .payload.definitions import Definition
from .payload.inheritance import inheritable
from .payload.serialization import CallPickler
from .payload.setups import Initializer, Setup, boot_code, call_service, main_of_workers
from .payload.shares import Share, SharedObject
from .supervision.workers import Workers
from .system import interpreter
from .system.directories import PrivateDirectory
from .system.interpreter import python_command, start_path
from .system.limits import check_rlimits
from .system.machine import usable_cpus
from .wire import security
from .wire.buffers import Segments
from .wire.protocol import CALLS

if TYPE_CHECKING:
    from .keys import Keys

__all__ = ["ExecutorView", "ZmqExecutor"]

PATIENCE = 10.0
"""Seconds after which it is said that tasks wait for workers that nobody has started."""

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
            OSError: there is no place for the pool's private directory.
            RuntimeError: executors are nested too deep.
        """
        if interpreter.depth >= interpreter.DEEPEST:
            raise RuntimeError(
                f"executors are nested more than {interpreter.DEEPEST} deep. Most likely a module "
                "makes one when it is imported, and its functions are the tasks: each worker "
                "then imports the module too. Make the executor in a function, or below "
                "`if __name__ == '__main__':`"
            )
        self._max_workers = _check_max_workers(max_workers, endpoint)
        joining = None
        if endpoint is not None:
            access = security.Access.decide(
                endpoint,
                "master",
                keys,
                allow_plaintext_tcp_from_anyone=allow_plaintext_tcp_from_anyone,
                allow_plaintext_loopback=False,
            )
            joining = joining_entrance(endpoint, work_address, lost_after, access)
        elif work_address is not None:
            raise ValueError("work_address is the second address of an endpoint: give that too")
        elif keys is not None or allow_plaintext_tcp_from_anyone:
            raise ValueError("keys are for an endpoint on tcp://: give that too")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if max_tasks_per_child is not None:
            if not isinstance(max_tasks_per_child, int):
                raise TypeError("max_tasks_per_child must be an integer")
            if max_tasks_per_child <= 0:
                raise ValueError("max_tasks_per_child must be >= 1")
        if max_worker_memory is not None:
            if isinstance(max_worker_memory, bool) or not isinstance(max_worker_memory, int):
                raise TypeError("max_worker_memory must be an integer, in bytes")
            if max_worker_memory <= 0:
                raise ValueError("max_worker_memory must be > 0 bytes")
        self._max_worker_memory = max_worker_memory or 0
        rlimits = check_rlimits(worker_rlimits)
        self._pickler = CallPickler()
        self._pickler.packer.elsewhere = endpoint is not None
        self._lock = threading.RLock()  # a finalizer or a signal handler may submit, too
        self._closed = False
        self._pid = os.getpid()
        # Workers that start later look in this process for what these are made of.
        self._initargs = initargs
        self._initializer = _pack_initializer(self._pickler, initializer, initargs)
        self._pickler.clear()  # from now on there may be segments
        self._equipped = False
        if joining is not None:
            setup = Setup.for_others(self._initializer, max_memory=self._max_worker_memory)
            joining = msgspec.structs.replace(
                joining,
                setup=msgspec.msgpack.encode(setup),
                python=".".join(map(str, sys.version_info[:2])),
            )
        options = MasterOptions(
            [joining] if joining else [],
            max_workers=self._max_workers,
            service=CALLS,
            allowance=max_tasks_per_child,
            patience=PATIENCE if joining else None,
            lenient=True,
            finish_at_exit=True,
        )
        self._joinable = joining is not None
        if self._max_workers:
            self._master = self._with_group(options, rlimits or {})
        else:
            self._decode = CallPickler().load
            self._master = Master(options, cleanup=self._pickler.clear)
        self._master.start()
        self._master_reference = weakref.ref(self._master)
        self._pickler.packer.on_share = partial(_look_after, self._master_reference)
        # A forgotten executor's workers finish what is pending, and go away.
        weakref.finalize(self, self._master.close).atexit = False

    def _with_group(self, options: MasterOptions, rlimits: dict[str, int]) -> Master:
        """The master of a pool that has workers of its own, in a private directory."""
        directory = PrivateDirectory()
        segments = self._pickler.packer.segments = Segments.create(directory.path)
        self._decode = CallPickler(segments).load
        endpoint = f"ipc://{directory.path}/control"
        work = f"ipc://{directory.path}/work"
        bell = f"{directory.path}/bell"
        own = Entrance(endpoint, work, setup=None, group_only=True, bell=bell)
        main = main_of_workers(endpoint, directory.path, rlimits)
        group = Workers(
            python_command("-c", boot_code(start_path(), main)),
            1,
            directory=directory.path,
            remove_directory=True,
            rlimits=rlimits,
        )
        if not rlimits:  # some of them count from a program's start
            group.preloaded = main
        return Master(
            msgspec.structs.replace(
                options, entrances=[own, *options.entrances], segments=segments
            ),
            group,
            cleanup=partial(_clean_up, self._pickler, directory),
        )

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> TaskFuture[T]:
        """Schedule `fn(*args, **kwargs)` in a worker, and return its future.

        What cannot be pickled fails the future, with SerializationError.

        Raises:
            RuntimeError: the executor was shut down, or the interpreter is exiting.
            BrokenPoolError: the pool cannot run tasks any more.
            ForkedExecutorError: the executor was made before this process was forked.
        """
        return self._submit(PLAIN, fn, args, kwargs)

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
        options = make_options(
            timeout, retries, retry_on, retry_delay, priority, name, kill_on_cancel, service
        )
        call_service(service)  # checked now, not by each submit
        if service is not None and not self._joinable:
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
        self._check_open()
        share = self._pickler.dump_share(obj)
        _look_after(self._master_reference, share)
        return SharedObject(share, obj)

    def _submit(
        self,
        options: TaskOptions,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        made: list[Definition] | None = None,
    ) -> TaskFuture[T]:
        self._check_open()
        future: TaskFuture[T] = TaskFuture()
        try:
            call = self._pickler.dump_call(fn, args, kwargs, made)
        except SerializationError as error:
            future.set_exception(error)
            return future
        task = Task(
            kind=call.shared.key,
            size=len(call.data) if not call.buffers else call.nbytes,
            priority=options.priority,
            service=call_service(options.service) if options.service else CALLS,
            future=future,
            data=call.data,
            decode=self._decode,
            name=options.name or getattr(fn, "__qualname__", None) or type(fn).__name__,
            shared=call.shared,
            buffers=call.buffers,
            lease=call.lease,
            shares=call.shares,
            options=options,
        )
        with self._lock:
            if self._closed:
                self._check_open()
            if not self._equipped:
                self._equip()
            # Not before: of a task that is refused the future must keep nothing.
            future.belongs_to(self._master_reference, task)
            self._master.submit(task)
        return future

    def _submitter(self, fn: Callable[..., T], *, same: bool) -> Callable[..., Future[T]]:
        bound: Any = self.submit
        ours = getattr(bound, "__func__", None) is _SUBMIT and bound.__self__ is self
        if not ours:  # somebody has put theirs in its place
            return super()._submitter(fn, same=same)
        return self._submitter_with(PLAIN, fn, same)

    def _submitter_with(
        self, options: TaskOptions, fn: Callable[..., T], same: bool
    ) -> Callable[..., Future[T]]:
        made: list[Definition] | None = [] if same else None
        return lambda *args: self._submit(options, fn, args, {}, made)

    def _equip(self) -> None:
        """Have workers prepare for the first task.

        Not before: as with the standard library, what the program changes up to its first
        task (sys.path, directory, environment) is seen there.
        """
        if self._equipped:
            return
        setup = Setup.of_this_process(
            self._initializer,
            segments=self._pickler.packer.segments is not None,
            max_memory=self._max_worker_memory,
        )
        self._master.equip(msgspec.msgpack.encode(setup))
        self._equipped = True

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
        check_wait(number, timeout)
        if number > self._max_workers and not self._joinable:
            raise ValueError(
                f"this pool has at most {self._max_workers} workers (max_workers), and no "
                f"endpoint where others can join; {number} will never be there"
            )
        with self._lock:
            self._check_open()
            self._equip()
        self._master.wait_for_workers(number, timeout)

    @property
    def workers(self) -> Sequence[WorkerInfo]:
        """The workers that are ready, oldest first."""
        return self._master.workers

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks, and end the workers when the pending ones are done.

        Args:
            wait: return when all is done and the workers have ended; otherwise at
                once, and they end in the background.
            cancel_futures: cancel the tasks that have not been sent to a worker, and
                try none again that fails or has failed.
        """
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = True
            self._master.close(cancel=cancel_futures)
        if wait:
            self._master.join()

    def terminate_workers(self) -> None:
        """Shut down now: cancel what is queued, and end the workers by SIGTERM.

        Returns at once. Tasks that were running fail with BrokenPoolError. Workers
        that do not heed SIGTERM within seconds are killed.
        """
        self._abort(BrokenPoolError("terminate_workers() ended the worker of this task"))

    def kill_workers(self) -> None:
        """Shut down now: cancel what is queued, and end the workers by SIGKILL.

        Returns at once. Tasks that were running fail with BrokenPoolError.
        """
        self._abort(BrokenPoolError("kill_workers() ended the worker of this task"), kill=True)

    def _abort(self, reason: BaseException, *, kill: bool = False) -> None:
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = True
            self._master.abort(reason, kill=kill)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        if exc_type is not None and issubclass(exc_type, KeyboardInterrupt):
            # Whoever pressed Ctrl-C does not want to wait for what was running.
            self._abort(exc or KeyboardInterrupt())
            self._master.join()
        else:
            self.shutdown(wait=True)
        return None

    def _check_open(self) -> None:
        if self._pid != os.getpid():
            raise ForkedExecutorError(
                "this executor belongs to the process that made it, not to its forked child; "
                "make a new one in the child"
            )
        if self._master.broken:
            raise BrokenPoolError(self._master.broken)
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self._master.exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")


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
        return self._executor._submit(self._options, fn, args, kwargs)

    def _submitter(self, fn: Callable[..., T], *, same: bool) -> Callable[..., Future[T]]:
        return self._executor._submitter_with(self._options, fn, same)

    def options(self, **changes: Any) -> ExecutorView:
        """Return a view that has these options (see `ZmqExecutor.options`) and its own others."""
        return self._executor.options(**{**msgspec.structs.asdict(self._options), **changes})

    def share(self, obj: T) -> SharedObject[T]:
        """As `ZmqExecutor.share`; the handle is good for the pool and all its views."""
        return self._executor.share(obj)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut down the pool that this is a view of."""
        self._executor.shutdown(wait, cancel_futures=cancel_futures)


def _clean_up(pickler: CallPickler, directory: PrivateDirectory) -> None:
    pickler.clear()
    directory.close()


def _look_after(master: weakref.ref[Master], share: Share) -> None:
    """Have the workers told when nobody needs it any more."""
    weakref.finalize(share, _forget, master, share.key).atexit = False


def _forget(master: weakref.ref[Master], key: bytes) -> None:
    if (found := master()) is not None:
        found.forget_share(key)


def _check_max_workers(max_workers: int | None, endpoint: str | None) -> int:
    if max_workers is None:
        return usable_cpus()
    if not isinstance(max_workers, int):
        raise TypeError(f"max_workers must be an integer, not {type(max_workers).__name__}")
    if max_workers == 0 and endpoint is not None:
        return 0
    if max_workers <= 0:
        raise ValueError("max_workers must be greater than 0")
    return max_workers


def _pack_initializer(
    pickler: CallPickler, initializer: Callable[..., object] | None, initargs: tuple[Any, ...]
) -> Initializer | None:
    if initializer is None:
        return None
    with inheritable():
        call = pickler.dump_call(initializer, tuple(initargs), {})
    buffers = [bytes(buffer) for buffer in call.buffers]
    shares = [(share.key, share.contents(mapped=False)) for share in call.shares]
    return Initializer(call.shared.key, call.shared.data, call.data, buffers, shares)
