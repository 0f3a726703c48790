"""multiprocessing's queues, locks and shared values among an initializer's arguments.

They let themselves be pickled only while a process is being spawned, since a child
inherits what they are made of. Our workers are nobody's children, but they find it:

    made of                   travels as                      in the worker
    semaphore (spawn)         its name                        opened by name
    pipe, unlinked file       pid, descriptor, how it is      /proc/<pid>/fd/<descriptor>
                              open, device and inode          is opened again
    resource tracker          the same, of its pipe           takes the place of its own

The process that made the executor has to keep the objects: workers that start later
look for them, too. A socket cannot be opened again (a `Pipe()` that goes both ways is
made of two), and a semaphore of the fork context has no name: these are refused.

A worker shares the parent's resource tracker, as children do. A tracker of its own
would remove, when the worker ends, each shared memory that a task had attached to.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from .reducers import REDUCERS

__all__ = ["Descriptor", "inheritable", "share_tracker", "tracker"]

_KINDS = (stat.S_ISFIFO, stat.S_ISREG, stat.S_ISCHR, stat.S_ISBLK, stat.S_ISDIR)
"""What can be opened again by way of /proc."""


class Descriptor(NamedTuple):
    """An open file of a process, for another one on this machine."""

    pid: int
    fd: int
    flags: int
    device: int
    inode: int

    @classmethod
    def of(cls, fd: int) -> Descriptor:
        """Describe an open file of this process.

        Raises:
            TypeError: it is of a kind that cannot be opened again.
        """
        import fcntl

        found = os.fstat(fd)
        if not any(is_kind(found.st_mode) for is_kind in _KINDS):
            raise TypeError(
                "it uses a socket, or something else that a worker cannot open again; "
                "use a queue, or one `Pipe(duplex=False)` for each direction"
            )
        if not os.path.exists(f"/proc/{os.getpid()}/fd/{fd}"):
            raise TypeError("it uses a pipe or a file, and workers find these only in /proc")
        flags = fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK)
        return cls(os.getpid(), fd, flags, found.st_dev, found.st_ino)

    def detach(self) -> int:
        """Open the file here, and return the new descriptor.

        The name is that of the method which multiprocessing calls.

        Raises:
            OSError: the process, or its file, is gone.
        """
        # A pipe whose other end is closed would block us, so the flag comes afterwards.
        fd = os.open(f"/proc/{self.pid}/fd/{self.fd}", self.flags | os.O_NONBLOCK)
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) != (self.device, self.inode):
            os.close(fd)
            raise FileNotFoundError(
                "an argument of the initializer was closed in the process that made the executor"
            )
        os.set_blocking(fd, not self.flags & os.O_NONBLOCK)
        return fd


# ------------------------------------------------------------------- the parent


class _Spawning:
    """Stands for the `Popen` that multiprocessing asks how descriptors travel."""

    DupFd = staticmethod(Descriptor.of)

    def duplicate_for_child(self, fd: int) -> int:
        return fd


@contextlib.contextmanager
def inheritable() -> Iterator[None]:
    """Let what multiprocessing's children inherit be pickled here, in this thread."""
    from multiprocessing import context

    synchronize: Any = sys.modules.get("multiprocessing.synchronize")
    if synchronize is not None:
        for name in ("Lock", "RLock", "Semaphore", "BoundedSemaphore"):
            REDUCERS[getattr(synchronize, name)] = _reduce_semaphore
    outer = context.get_spawning_popen()
    context.set_spawning_popen(_Spawning())  # type: ignore[arg-type]  # what is asked of it
    try:
        yield
    finally:
        context.set_spawning_popen(outer)


def _reduce_semaphore(semaphore: Any) -> Any:
    # Python 3.10 would pickle an address, and the worker would crash.
    from multiprocessing import context

    context.assert_spawning(semaphore)
    if semaphore._semlock.name is None:
        raise TypeError(
            "it was made for forked processes, and workers are not forked; make it with "
            '`multiprocessing.get_context("spawn")`, or use a Manager'
        )
    return semaphore.__reduce_ex__(5)


def tracker() -> Descriptor | None:
    """Return the pipe to this process's resource tracker, for `share_tracker`.

    A tracker is a process, and is started only for a program that may need it: one
    that has loaded `multiprocessing.shared_memory` before it makes the executor.
    In others, memory that a task attaches to goes when the worker ends.
    """
    module: Any = sys.modules.get("multiprocessing.resource_tracker")
    if "multiprocessing.shared_memory" in sys.modules:
        from multiprocessing import resource_tracker as module
    elif module is None or module._resource_tracker._fd is None:
        return None
    try:
        return Descriptor.of(module.getfd())
    except (OSError, TypeError):
        return None  # a worker then has its own


# ------------------------------------------------------------------- the worker


def share_tracker(parents: Descriptor) -> None:
    """Use the parent's resource tracker, as a child of multiprocessing does."""
    from multiprocessing import resource_tracker

    ours: Any = resource_tracker._resource_tracker
    try:
        ours._fd = parents.detach()
    except OSError:
        pass  # it has ended; ours will start when it is needed
