"""The engine of a `ZmqExecutor`: it makes tasks of calls, for a master of its own.

    call ─► pickler ─► Task ─► Master ─► workers
            segments           Workers, in a private directory

When an executor gets one is told in `opening`.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import msgspec

from .errors import (
    AFTER_EXIT,
    AFTER_SHUTDOWN,
    FORKED,
    BrokenPoolError,
    ForkedExecutorError,
    SerializationError,
)
from .futures import TaskFuture
from .master.attendance import check_wait
from .master.channels import Entrance, joining_entrance
from .master.coordinator import MasterOptions
from .master.master import Master
from .master.peers import WorkerInfo
from .master.tasks import PLAIN, Task, TaskOptions
from .payload.inheritance import inheritable
from .payload.namespaces import name_of
from .payload.serialization import CallPickler, Made
from .payload.setups import Initializer, Setup, boot_code, call_service, main_of_workers
from .payload.shares import Share, SharedObject
from .settings import PoolSettings
from .supervision.supervisor_process import SupervisorProcess
from .supervision.workers import Workers
from .system.directories import PrivateDirectory
from .system.interpreter import python_command, start_path
from .wire import security
from .wire.buffers import Segments
from .wire.protocol import CALLS

__all__ = ["Pool"]

PATIENCE: Final = 10.0
"""Seconds after which it is said that tasks wait for workers that nobody has started."""

T = TypeVar("T")


class Pool:
    """For any thread of the process that made it. What is not told here `ZmqExecutor` tells.

    When it is dropped, its workers finish what is pending, and go away.

    Attributes:
        master: the one of its own.
    """

    def __init__(self, settings: PoolSettings, supervisor: SupervisorProcess | None = None) -> None:
        """Open it.

        Args:
            settings: what is wanted.
            supervisor: one that has been started ahead.

        Raises:
            SerializationError: the initializer or its arguments cannot be pickled.
            TypeError, ValueError: an address, or what belongs to it, cannot be used.
            OSError: there is no place for the private directory, or an address is taken.
        """
        self._settings = settings
        self._pickler = CallPickler()
        self._pickler.packer.elsewhere = settings.joinable
        self._lock = threading.RLock()  # a finalizer or a signal handler may submit, too
        self._closed = False
        self._pid = os.getpid()
        self._equipped = False
        self._initializer = _pack_initializer(self._pickler, settings)
        self._pickler.clear()  # from now on there may be segments
        joining = None if settings.endpoint is None else self._joining(settings.endpoint)
        options = MasterOptions(
            [joining] if joining else [],
            max_workers=settings.max_workers,
            service=CALLS,
            allowance=settings.max_tasks_per_child,
            patience=PATIENCE if joining else None,
            lenient=True,
            finish_at_exit=True,
        )
        if settings.max_workers:
            self.master = self._with_group(options, supervisor)
        else:
            self._decode = CallPickler().load
            self.master = Master(options, cleanup=self._pickler.clear)
        self._master_reference = weakref.ref(self.master)
        self._pickler.packer.on_share = partial(_look_after, self._master_reference)
        weakref.finalize(self, self.master.close).atexit = False
        self.master.start()

    def _joining(self, endpoint: str) -> Entrance:
        """Where workers can join that something else has started."""
        settings = self._settings
        access = security.Access.decide(
            endpoint,
            "master",
            settings.keys,
            allow_plaintext_tcp_from_anyone=settings.allow_plaintext_tcp_from_anyone,
            allow_plaintext_loopback=False,
        )
        setup = Setup.for_others(self._initializer, max_memory=settings.max_worker_memory or 0)
        return msgspec.structs.replace(
            joining_entrance(endpoint, settings.work_address, settings.lost_after, access),
            setup=msgspec.msgpack.encode(setup),
            python=".".join(map(str, sys.version_info[:2])),
        )

    def _with_group(self, options: MasterOptions, supervisor: SupervisorProcess | None) -> Master:
        """The master of a pool that has workers of its own, in a private directory."""
        directory = PrivateDirectory()
        segments = self._pickler.packer.segments = Segments.create(directory.path)
        self._decode = CallPickler(segments).load
        endpoint = f"ipc://{directory.path}/control"
        work = f"ipc://{directory.path}/work"
        bell = f"{directory.path}/bell"
        own = Entrance(endpoint, work, setup=None, group_only=True, bell=bell)
        rlimits = dict(self._settings.worker_rlimits or {})
        main = main_of_workers(endpoint, directory.path, rlimits)
        group = Workers(
            python_command("-c", boot_code(start_path(), main)),
            1,
            directory=directory.path,
            remove_directory=True,
            rlimits=rlimits,
        )
        group.supervisor = supervisor
        if not rlimits:  # some of them count from a program's start
            group.preloaded = main
        return Master(
            msgspec.structs.replace(
                options, entrances=[own, *options.entrances], segments=segments
            ),
            group,
            cleanup=partial(_clean_up, self._pickler, directory),
        )

    def submit(
        self,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: TaskOptions = PLAIN,
        made: Made | None = None,
    ) -> TaskFuture[T]:
        """Schedule a call.

        Args:
            fn: the function.
            args: its arguments.
            kwargs: those that have names.
            options: of the task.
            made: see `CallPickler.dump_call`.

        Raises:
            RuntimeError, BrokenPoolError, ForkedExecutorError: see `ZmqExecutor.submit`.
        """
        self._check_open()
        future: TaskFuture[T] = TaskFuture()
        try:
            call = self._pickler.dump_call(fn, args, kwargs, made)
        except SerializationError as error:
            future.set_exception(error)
            return future
        if call.proxies:
            held = list(call.proxies)
            future.add_done_callback(lambda _: held.clear())
        task = Task(
            kind=call.shared.key,
            size=len(call.data) if not call.buffers else call.nbytes,
            priority=options.priority,
            service=call_service(options.service) if options.service else CALLS,
            future=future,
            data=call.data,
            decode=self._decode,
            name=options.name or name_of(fn),
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
            self.master.submit(task)
        return future

    def share(self, obj: T) -> SharedObject[T]:
        """Make an object known that many tasks use."""
        self._check_open()
        share = self._pickler.dump_share(obj)
        _look_after(self._master_reference, share)
        return SharedObject(share, obj)

    def _equip(self) -> None:
        """Have workers prepare for the first task.

        Not before: as with the standard library, what the program changes up to its first
        task (sys.path, directory, environment) is seen there.
        """
        if self._equipped:
            return
        segments = self._pickler.packer.segments
        setup = Setup.of_this_process(
            self._initializer,
            segments=segments is not None,
            kept_mappings=segments.share_of_mappings(self._settings.max_workers) if segments else 0,
            max_memory=self._settings.max_worker_memory or 0,
        )
        self.master.equip(msgspec.msgpack.encode(setup))
        self._equipped = True

    def wait_for_workers(self, number: int, timeout: float | None) -> None:
        """Return when so many workers are ready."""
        timeout = check_wait(number, timeout)
        if number > self._settings.max_workers and not self._settings.joinable:
            raise ValueError(
                f"this pool has at most {self._settings.max_workers} workers (max_workers), and no "
                f"endpoint where others can join; {number} will never be there"
            )
        self._check_open()  # before the lock, which a forked child may have inherited locked
        with self._lock:
            self._check_open()
            self._equip()
        self.master.wait_for_workers(number, timeout)

    @property
    def workers(self) -> Sequence[WorkerInfo]:
        """The workers that are ready, oldest first."""
        return self.master.workers

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        """End when the pending tasks are done."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = True
            self.master.close(cancel=cancel_futures)
        if wait:
            self.master.join()

    def abort(self, reason: BaseException, *, wait: bool = False, kill: bool = False) -> None:
        """End now; what was running fails for this reason.

        Args:
            reason: what these futures raise.
            wait: whether to return when all has ended.
            kill: whether to end workers by SIGKILL, not by SIGTERM.
        """
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = True
            self.master.abort(reason, kill=kill)
        if wait:
            self.master.join()

    def _check_open(self) -> None:
        if self._pid != os.getpid():
            raise ForkedExecutorError(FORKED)
        if self.master.broken:
            raise BrokenPoolError(self.master.broken)
        if self._closed:
            raise RuntimeError(AFTER_SHUTDOWN)
        if self.master.exiting:
            raise RuntimeError(AFTER_EXIT)


def _clean_up(pickler: CallPickler, directory: PrivateDirectory) -> None:
    pickler.clear()
    directory.close()


def _look_after(master: weakref.ref[Master], share: Share) -> None:
    """Have the workers told when nobody needs it any more."""
    weakref.finalize(share, _forget, master, share.key).atexit = False


def _forget(master: weakref.ref[Master], key: bytes) -> None:
    if (found := master()) is not None:
        found.forget_share(key)


def _pack_initializer(pickler: CallPickler, settings: PoolSettings) -> Initializer | None:
    if settings.initializer is None:
        return None
    with inheritable():
        call = pickler.dump_call(settings.initializer, tuple(settings.initargs), {})
    buffers = [bytes(buffer) for buffer in call.buffers]
    shares = [(share.key, share.contents(mapped=False)) for share in call.shares]
    return Initializer(call.shared.key, call.shared.data, call.data, buffers, shares)
