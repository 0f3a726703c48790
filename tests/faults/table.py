"""The faults, the moments in which they strike, and what each may cost.

A row of the table is a fault, a column a stage (`stages.py` says how each is brought
about). A fault strikes from inside, as something that a task does, or from outside,
on processes of the pool; some can do both.

                      before the   between   running   sent    at
                      first task   tasks               ahead   shutdown
    SIGKILL               o           o        i o      i o      o
    SIGSEGV               o           o        i o      i o      o
    SIGABRT                                    i        i
    exit code 3                                i        i
    memory runs out                            i        i
    unpickling kills                           i        i
    pickling kills                             i        i
    SIGSTOP, SIGCONT      o           o        o        o        o
    all workers           o           o        o        o        o
    the supervisor        o           o        o        o        o

    i: from inside   o: from outside

What it may cost is the same everywhere: the tasks that were running in a process
that died, and no other; nothing at all if none died.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass

from ..conftest import alive, eventually
from .processes import Pool

__all__ = ["FAULTS", "Fault"]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        inside: what a task does, or None.
        outside: strikes at the pool, given the worker that a stage has chosen, and
            returns how many workers have died of it; None if it cannot.
        exitcode: how a worker ends of it, as far as anybody can tell.
        raises: what the task raises that brings it about, if its worker goes on.
        where: "task", or the part of the call that is poisoned.
    """

    inside: Callable[[], object] | None = None
    outside: Callable[[Pool, int], int] | None = None
    exitcode: int | None = None
    raises: type[BaseException] | None = None
    where: str = "task"


def kills(signum: int) -> Callable[[Pool, int], int]:
    def kill(pool: Pool, pid: int) -> int:
        os.kill(pid, signum)
        return 1

    return kill


def segfault() -> None:
    ctypes.string_at(0)


def exit_3() -> None:
    os._exit(3)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_out_of_memory() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (2**28, before[1]))
        bytearray(2**30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def stop_and_continue(pool: Pool, pid: int) -> int:
    os.kill(pid, signal.SIGSTOP)
    try:
        pool.others_go_on()
    finally:
        os.kill(pid, signal.SIGCONT)
    return 0


def kill_all(pool: Pool, pid: int) -> int:
    pids = {pid, *pool.workers()}
    for each in pids:
        os.kill(each, signal.SIGKILL)
    return len(pids)


def kill_supervisor(pool: Pool, pid: int) -> int:
    pids = {pid, *pool.workers()}
    os.kill(pool.supervisor(), signal.SIGKILL)
    # The kernel ends them when the supervisor has ended: a task submitted before that
    # may rightly be lost.
    assert eventually(lambda: not any(alive(each) for each in pids))
    return len(pids)


FAULTS = {
    "SIGKILL": Fault(die, kills(signal.SIGKILL), -signal.SIGKILL),
    "SIGSEGV": Fault(segfault, kills(signal.SIGSEGV), -signal.SIGSEGV),
    "SIGABRT": Fault(os.abort, exitcode=-signal.SIGABRT),
    "exit code 3": Fault(exit_3, exitcode=3),
    "memory runs out": Fault(run_out_of_memory, raises=MemoryError),
    "unpickling kills": Fault(die, exitcode=-signal.SIGKILL, where="argument"),
    "pickling kills": Fault(die, exitcode=-signal.SIGKILL, where="result"),
    "SIGSTOP, SIGCONT": Fault(outside=stop_and_continue),
    "all workers": Fault(outside=kill_all, exitcode=-signal.SIGKILL),
    "the supervisor": Fault(outside=kill_supervisor),
}
