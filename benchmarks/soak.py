"""A pool under every fault at once, for as long as you like; no promise may be broken.

    python -m benchmarks.soak MINUTES [--seed N]
    python -m benchmarks.soak --memory TASKS

Tasks of every kind run in a pool while faults strike it: tasks kill their own workers,
run too long, raise, are cancelled and killed; a second thread kills workers and
supervisors and stops processes for a while. After some time the pool is shut down, what
it leaves behind is looked for, and another one, of another size, takes its place. All
choices come from one seeded generator.

Each task appends a line to a file when it starts. So it is known of every task
whether it ran, how often, and in which process, and checked that

- it has the right result, or the error that was due;
- it ran at most once, or once more for each retry that it was allowed;
- it was lost only if it ran in a worker that was killed, one task for each such worker.

`--memory` runs small tasks only, and compares the memory of the parent and of the
workers after the first 10 000 with that after all of them.

The exit code is 1 if anything was not as promised.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import psutil

from zmqexecutor import TaskKilledError, TaskTimeoutError, WorkerLostError, ZmqExecutor
from zmqexecutor.system import directories

MIB = 2**20
OUTSTANDING = 48
"""Tasks that are submitted and not done, at most."""
HANG = 90.0
"""Seconds without any result after which the pool counts as hung."""
GROWTH = 20 * MIB
"""Bytes by which a process may grow between the beginning and the end."""
SUPERVISOR_EVERY = 25.0
"""Seconds between two supervisors' deaths: more than three in a minute break a pool."""

# ---------------------------------------------------------------- what tasks do


def note(diary: str, number: int) -> int:
    """Append that the task has started; how often it has, this time included."""
    descriptor = os.open(diary, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, b"%d %d\n" % (number, os.getpid()))
    os.close(descriptor)
    return number


def square(diary: str, number: int) -> int:
    return note(diary, number) ** 2


def sleep(diary: str, number: int, seconds: float) -> int:
    note(diary, number)
    time.sleep(seconds)
    return number**2


def fail(diary: str, number: int) -> None:
    raise ValueError(note(diary, number))


def echo(diary: str, number: int, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    note(diary, number)
    return array + 1


def die(diary: str, number: int, how: str) -> None:
    note(diary, number)
    if how == "exit":
        os._exit(3)
    if how == "SEGV":
        ctypes.string_at(0)
    os.kill(os.getpid(), signal.SIGKILL)


def fail_at_first(diary: str, number: int, flags: str, how: str) -> int:
    """Fail in the first try, of those that it is allowed."""
    note(diary, number)
    try:
        os.close(os.open(f"{flags}/{number}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return number**2
    if how == "raise":
        raise ValueError(number)
    os._exit(4)


# ---------------------------------------------------------------- what is due of them


@dataclass
class Spec:
    """A submitted task and what may become of it."""

    number: int
    kind: str
    expected: object = None
    error: type[BaseException] | None = None
    """What it must raise, if it must."""
    tries: int = 1
    cancelled: bool = False
    """Whether somebody has asked for its end."""


@dataclass
class Account:
    """What has happened in all pools so far."""

    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    leaks: Counter[str] = field(default_factory=Counter)
    pools: int = 0
    tasks: int = 0

    def violation(self, text: str) -> None:
        self.violations.append(text)
        print("VIOLATION:", text, flush=True)


SUPERVISOR = "zmqexecutor supervisor|supervisor_boot"


def children() -> list[psutil.Process]:
    # Its title is "zmqexecutor supervisor" where Circus finds setproctitle.
    return [p for p in psutil.Process().children() if re.search(SUPERVISOR, _command(p))]


def workers() -> list[psutil.Process]:
    """All processes that supervisors of ours have started and that live."""
    found = []
    for supervisor in children():
        try:
            found += [p for p in supervisor.children() if p.status() != psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            pass
    return found


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


class Chaos(threading.Thread):
    """Strikes at the processes of one pool until told to stop."""

    def __init__(self, executor: ZmqExecutor, account: Account, seed: int) -> None:
        super().__init__(name="chaos", daemon=True)
        self._executor = executor
        self._account = account
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._next_supervisor = time.monotonic() + self._random.uniform(3, SUPERVISOR_EVERY)
        self.killed: set[int] = set()
        """Workers that were killed from outside."""

    def stop(self) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(self._random.uniform(0.05, 1.0)):
            try:
                self._strike()
            except psutil.NoSuchProcess:
                pass  # it was faster

    def _strike(self) -> None:
        ready = {info.pid for info in self._executor._master.workers}
        if not ready:
            return
        if time.monotonic() >= self._next_supervisor:
            self._next_supervisor = time.monotonic() + SUPERVISOR_EVERY
            self._kill_supervisor(ready)
        elif self._random.random() < 0.5:
            self._kill_worker(ready)
        else:
            self._stop_worker(ready)

    def _kill_worker(self, ready: set[int]) -> None:
        pid = self._random.choice(sorted(ready))
        self.killed.add(pid)
        began = time.monotonic()
        try:
            os.kill(pid, self._random.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM]))
        except ProcessLookupError:
            return
        self._account.faults["worker killed from outside"] += 1
        self._time_recovery({pid}, len(ready), began)

    def _kill_supervisor(self, ready: set[int]) -> None:
        for supervisor in children():
            supervisor.suspend()  # so that it starts nothing that is not in the list
            self.killed |= {process.pid for process in supervisor.children()}
            began = time.monotonic()
            supervisor.kill()
            self._account.faults["supervisor killed"] += 1
            self._time_recovery(ready, len(ready), began)

    def _stop_worker(self, ready: set[int]) -> None:
        process = psutil.Process(self._random.choice(sorted(ready)))
        process.suspend()
        self._account.faults["worker stopped and continued"] += 1
        self._over.wait(self._random.uniform(0.01, 0.7))
        process.resume()

    def _time_recovery(self, gone: set[int], number: int, began: float) -> None:
        """Until as many others are ready. One that tasks have killed meanwhile counts too."""
        while not self._over.wait(0.002):
            now = {info.pid for info in self._executor._master.workers}
            if not now & gone and len(now) >= number:
                self._account.recoveries.append(time.monotonic() - began)
                return
            if time.monotonic() - began > HANG:
                self._account.violation(f"no new worker within {HANG:g} s")
                return


class Round:
    """One pool, from its start until nothing of it is left."""

    def __init__(self, rng: random.Random, account: Account, directory: str) -> None:
        self._random = rng
        self._account = account
        self._directory = directory
        self._diary = os.path.join(directory, "diary")
        # All that is kept of a task that is done, so that the books are not what grows:
        self._kinds = bytearray()  # numbers of its kind in KINDS
        self._tries = bytearray()
        self._done: SimpleQueue[tuple[Spec, Future[Any]]] = SimpleQueue()
        self._open = 0
        self._lost_in = Counter[int]()
        self._wanted: list[tuple[float, Future[Any], Spec]] = []  # to be killed or cancelled
        size, allowance = rng.randint(1, 4), rng.choice([None, None, 1000, 50, 5])
        self.name = f"{size} workers, max_tasks_per_child={allowance}"
        # Workers die by the dozen here: no stack of each on the terminal.
        self._executor = ZmqExecutor(
            size, initializer=faulthandler.disable, max_tasks_per_child=allowance
        )
        self._chaos = Chaos(self._executor, account, rng.getrandbits(32))

    def run(self, seconds: float) -> None:
        self._account.pools += 1
        first = len(self._account.violations)
        self._chaos.start()
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end and len(self._account.violations) == first:
                while self._open < OUTSTANDING:
                    self._submit_one()
                self._end_some()
                self._take_one()
            while self._open and len(self._account.violations) == first:
                self._end_some()
                self._take_one()
        finally:
            self._chaos.stop()
            if len(self._account.violations) != first:
                self._executor.kill_workers()
            self._executor.shutdown()
        self._count_runs()

    # ------------------------------------------------------------- submitting

    def _submit_one(self) -> None:
        weights = [weight for weight, _ in KINDS.values()]
        (kind,) = self._random.choices(list(KINDS), weights)
        KINDS[kind][1](self, kind)

    def _submit(self, pool: Any, spec: Spec, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        self._kinds.append(list(KINDS).index(spec.kind))
        self._tries.append(spec.tries)
        future: Future[Any] = pool.submit(fn, self._diary, spec.number, *args)
        self._open += 1
        self._account.tasks += 1
        future.add_done_callback(lambda done: self._done.put((spec, done)))
        return future

    def _spec(self, kind: str, **fields: Any) -> Spec:
        return Spec(len(self._tries), kind, **fields)

    def squares(self, kind: str) -> None:
        for _ in range(self._random.choice([1, 5, 40])):
            spec = self._spec(kind)
            spec.expected = spec.number**2
            self._submit(self._executor, spec, square)

    def sleeps(self, kind: str) -> None:
        spec = self._spec(kind)
        spec.expected = spec.number**2
        pool = self._executor.options(priority=self._random.randint(-1, 1), name=kind)
        self._submit(pool, spec, sleep, self._random.uniform(0, 0.05))

    def arrays(self, kind: str) -> None:
        size, value = self._random.choice([10, 10_000, 400_000, 2_000_000]), self._random.random()
        spec = self._spec(kind, expected=(size, value + 1))
        self._submit(self._executor, spec, echo, np.full(size, value))

    def failures(self, kind: str) -> None:
        self._submit(self._executor, self._spec(kind, error=ValueError), fail)

    def deaths(self, kind: str) -> None:
        how = self._random.choice(["KILL", "SEGV", "exit"])
        self._account.faults[f"task ends its worker ({how})"] += 1
        self._submit(self._executor, self._spec(kind, error=WorkerLostError), die, how)

    def retries(self, kind: str) -> None:
        how = self._random.choice(["raise", "exit"])
        self._account.faults[f"first try fails ({how})"] += 1
        tries = self._random.randint(1, 4)
        pool = self._executor.options(retries=tries, retry_delay=0.01)
        spec = self._spec(kind, tries=1 + tries)
        spec.expected = spec.number**2
        self._submit(pool, spec, fail_at_first, self._directory, how)

    def timeouts(self, kind: str) -> None:
        self._account.faults["task over its time"] += 1
        pool = self._executor.options(timeout=self._random.uniform(0.02, 0.3))
        self._submit(pool, self._spec(kind, error=TaskTimeoutError), sleep, 1000)

    def kills(self, kind: str) -> None:
        self._account.faults["kill() of a task"] += 1
        spec = self._spec(kind, error=TaskKilledError, cancelled=True)
        future = self._submit(self._executor, spec, sleep, 1000)
        self._wanted.append((time.monotonic() + self._random.uniform(0, 0.3), future, spec))

    def cancels(self, kind: str) -> None:
        self._account.faults["cancel() of a task"] += 1
        spec = self._spec(kind, cancelled=True)
        spec.expected = spec.number**2
        future = self._submit(self._executor, spec, sleep, 0.02)
        self._wanted.append((time.monotonic() + self._random.uniform(0, 0.05), future, spec))

    def _end_some(self) -> None:
        now = time.monotonic()
        due, self._wanted = (
            [wanted for wanted in self._wanted if wanted[0] <= now],
            [wanted for wanted in self._wanted if wanted[0] > now],
        )
        for _, future, spec in due:
            if spec.kind == "killed":
                future.kill()  # type: ignore[attr-defined]
            else:
                future.cancel()

    # ------------------------------------------------------------- judging

    def _take_one(self) -> None:
        deadline = time.monotonic() + HANG
        while True:
            soonest = min((due for due, _, _ in self._wanted), default=deadline)
            try:
                spec, future = self._done.get(
                    timeout=max(0.001, min(soonest, deadline) - time.monotonic())
                )
                break
            except Empty:
                if self._wanted and soonest <= time.monotonic():
                    return
                if time.monotonic() >= deadline:
                    self._account.violation(f"no result for {HANG:g} s: {self._open} tasks hang")
                    return
        self._open -= 1
        outcome = self._judge(spec, future)
        self._account.outcomes[outcome] += 1

    def _judge(self, spec: Spec, future: Future[Any]) -> str:
        try:
            result = future.result(0)
        except CancelledError as error:
            if spec.cancelled:
                return "killed" if isinstance(error, TaskKilledError) else "cancelled"
            return self._wrong(spec, error)
        except WorkerLostError as error:
            if spec.error is WorkerLostError and error.pid not in self._chaos.killed:
                return "lost by its own doing"
            if error.pid not in self._chaos.killed:
                return self._wrong(spec, error)
            self._lost_in[error.pid or 0] += 1
            if self._lost_in[error.pid or 0] > 1:
                return self._wrong(spec, error)
            return "lost by promise"
        except BaseException as error:
            if type(error) is spec.error or (
                spec.kind == "retried" and isinstance(error, ValueError)
            ):
                return "raised as due"
            return self._wrong(spec, error)
        if isinstance(result, np.ndarray):  # kept as size and value, for it may be large
            result = (result.size, result[0] if (result == result[0]).all() else result)
        if spec.error is not None or result != spec.expected:
            return self._wrong(spec, result)
        return "result"

    def _wrong(self, spec: Spec, what: object) -> str:
        self._account.violation(f"task {spec.number} ({spec.kind}) ended with {what!r}"[:2000])
        return "wrong"

    def _count_runs(self) -> None:
        left = bytearray(self._tries)
        too_often = set()
        for number, _ in self._runs():
            if left[number]:
                left[number] -= 1
            else:
                too_often.add(number)
        for number in too_often:
            pids = [pid for ran, pid in self._runs() if ran == number]
            self._account.violation(
                f"task {number} ({list(KINDS)[self._kinds[number]]}) ran {len(pids)} times, "
                f"in {pids}, of {self._tries[number]} that it may"
            )
        for path in Path(self._directory).iterdir():
            path.unlink()

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Each start of a task: its number, and the process."""
        if os.path.exists(self._diary):
            with open(self._diary) as file:
                for line in file:
                    number, pid = line.split()
                    yield int(number), int(pid)


KINDS: dict[str, tuple[int, Callable[[Round, str], None]]] = {
    "square": (40, Round.squares),
    "sleep": (25, Round.sleeps),
    "array": (8, Round.arrays),
    "failure": (6, Round.failures),
    "death": (2, Round.deaths),
    "retried": (3, Round.retries),
    "over time": (1, Round.timeouts),
    "killed": (1, Round.kills),
    "cancelled": (5, Round.cancels),
}
"""How often each kind of task is chosen, and how it is submitted."""


# ---------------------------------------------------------------- what is left behind


def left_behind() -> dict[str, set[str]]:
    gc.collect()
    roots = [Path(base, f"zmqexecutor-{os.geteuid()}") for base in directories._bases()]
    return {
        "processes": {f"{p.pid} {_command(p)}" for p in psutil.Process().children(recursive=True)},
        "directories": {str(path) for root in roots for path in root.glob(f"{os.getpid()}-*")},
        "threads": {thread.name for thread in threading.enumerate()},
        "descriptors": {
            f"{entry} {_link(entry)}" for entry in os.listdir("/proc/self/fd") if _link(entry)
        },
    }


def _link(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def check_leaks(before: dict[str, set[str]], account: Account) -> None:
    deadline = time.monotonic() + 10
    while True:
        leaked = {what: found - before[what] for what, found in left_behind().items()}
        leaked = {what: found for what, found in leaked.items() if found}
        if not leaked:
            return
        if time.monotonic() > deadline:
            for what, found in leaked.items():
                account.leaks[what] += len(found)
                account.violation(f"{what} left behind: {sorted(found)}")
            return
        time.sleep(0.05)


def resident() -> int:
    """Bytes of memory in use, without what the allocator keeps of what was freed."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


# ---------------------------------------------------------------- the two programs


def rounds(minutes: float) -> Iterator[float]:
    """The seconds of each round: about a minute, but three rounds at least."""
    seconds = minutes * 60
    number = max(3, round(minutes))
    for _ in range(number):
        yield seconds / number


def soak(minutes: float, seed: int) -> int:
    rng = random.Random(seed)
    account = Account()
    print(f"seed {seed}, {minutes:g} minutes, Python {sys.version.split()[0]}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        with ZmqExecutor(1) as executor:  # what is imported and kept once is no leak
            executor.submit(square, os.path.join(directory, "warm"), 1).result()
        os.unlink(os.path.join(directory, "warm"))
        before = left_behind()
        sizes = []
        for seconds in rounds(minutes):
            this = Round(rng, account, directory)
            print(f"round {account.pools + 1}: {this.name}, {seconds:.0f} s", flush=True)
            this.run(seconds)
            del this
            check_leaks(before, account)
            sizes.append(resident())
            print(
                f"  {account.tasks} tasks so far; the parent has {sizes[-1] / MIB:.1f} MiB, "
                f"{sys.getallocatedblocks()} objects",
                flush=True,
            )
    # The allocator keeps what the busiest round needed; the first rounds show how much.
    growth = sizes[-1] - max(sizes[: max(1, len(sizes) // 2)])
    if growth > GROWTH:
        account.leaks["memory, MiB"] = growth // MIB
        account.violation(f"the parent grew by {growth / MIB:.1f} MiB")
    report(account, growth)
    return 1 if account.violations else 0


def report(account: Account, growth: int) -> None:
    rows: list[tuple[str, object]] = [("pools", account.pools), ("tasks", account.tasks)]
    rows += [(f"  {name}", number) for name, number in sorted(account.outcomes.items())]
    rows += [("faults", sum(account.faults.values()))]
    rows += [(f"  {name}", number) for name, number in sorted(account.faults.items())]
    rows += [("lost otherwise, or wrong", len(account.violations))]
    rows += [("leaks", sum(account.leaks.values()))]
    rows += [(f"  {what}", number) for what, number in sorted(account.leaks.items())]
    rows += [("memory of the parent, first half to end", f"{growth / MIB:+.1f} MiB")]
    if len(account.recoveries) > 1:
        cuts = statistics.quantiles(account.recoveries, n=100, method="inclusive")
        rows += [
            ("recovery of the number of workers, p50", f"{cuts[49] * 1000:.0f} ms"),
            ("recovery of the number of workers, p99", f"{cuts[98] * 1000:.0f} ms"),
        ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value:>10}")


def memory(tasks: int) -> int:
    """Growth of parent and workers from the first 10 000 tasks to the last."""
    first, step = 10_000, 10_000
    with ZmqExecutor(2) as executor:

        def run(number: int) -> None:
            for _ in range(0, number, step):
                for future in [executor.submit(abs, -i) for i in range(step)]:
                    future.result()

        def sizes() -> dict[str, int]:
            found = {f"worker {p.pid}": int(p.memory_info().rss) for p in workers()}
            return {"parent": resident(), **found}

        run(first)
        before = sizes()
        run(tasks - first)
        after = sizes()
    worst = 0
    for name, size in after.items():
        growth = size - before.get(name, size)
        worst = max(worst, growth)
        print(f"{name:<16} {size / MIB:7.1f} MiB  {growth / MIB:+6.1f} MiB")
    if worst > GROWTH:
        print(f"more than {GROWTH / MIB:g} MiB of growth over {tasks} tasks")
    return 1 if worst > GROWTH else 0


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("minutes", nargs="?", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--memory", type=int, metavar="TASKS")
    arguments = parser.parse_args()
    if arguments.memory:
        return memory(arguments.memory)
    return soak(arguments.minutes, arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
