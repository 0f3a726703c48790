"""A pool under test: its processes, its tasks, and the record of what really ran."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import psutil

from zmqexecutor import WorkerLostError, ZmqExecutor
from zmqexecutor.supervision import template

from ..conftest import eventually

__all__ = ["Diary", "Poison", "Pool", "sleeper", "tiny"]

PATIENCE = 60.0
"""Seconds for what takes a fraction of one, on a machine that is busy."""


class Diary:
    """A file to which every task appends its number when it starts, in one write."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def note(self, number: int) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, b"%d %d\n" % (number, os.getpid()))
        os.close(descriptor)

    def lines(self) -> list[list[int]]:
        try:
            text = Path(self.path).read_text()
        except FileNotFoundError:
            return []
        return [[*map(int, line.split())] for line in text.splitlines()]

    def runs(self) -> Counter[int]:
        """How often each task was started."""
        return Counter(number for number, _ in self.lines())

    def pid_of(self, number: int) -> int | None:
        """The process in which a task runs or ran."""
        return next((pid for each, pid in self.lines() if each == number), None)


class Poison:
    """Does something when it is pickled in a worker, or unpickled there."""

    def __init__(self, deed: Callable[[], object], when: str) -> None:
        self.deed = deed
        self.when = when
        self.made_in = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.when == "pickled" and os.getpid() != self.made_in:
            self.deed()
        return _unpickle, (self.deed, self.when, self.made_in)


def _unpickle(deed: Callable[[], object], when: str, made_in: int) -> Poison:
    if when == "unpickled" and os.getpid() != made_in:
        deed()
    poison = Poison(deed, when)
    poison.made_in = made_in
    return poison


def sleeper(diary: Diary, number: int, gate: str) -> int:
    """Runs until the gate is there."""
    diary.note(number)
    if not eventually(lambda: os.path.exists(gate), PATIENCE):
        raise TimeoutError(gate)
    return number * number


def tiny(
    diary: Diary, number: int, deed: Callable[[], object] | None, poison: object = None
) -> Any:
    """Takes microseconds, so that many are sent ahead."""
    diary.note(number)
    if deed is not None:
        deed()
    return poison if isinstance(poison, Poison) else number * number


class Pool:
    """An executor, and what a test must know of it. Tasks are known by their numbers."""

    def __init__(self, executor: ZmqExecutor, directory: Path) -> None:
        self.executor = executor
        self.diary = Diary(directory / "diary")
        self.gate = directory / "gate"
        self.tasks: dict[int, Future[Any]] = {}
        self.others: list[Future[int]] = []
        self.closed = False

    # ------------------------------------------------------------- processes

    def supervisor(self) -> int:
        found: list[int] = []

        def look() -> bool:
            found[:] = [
                process.pid
                for process in psutil.Process().children()
                # Its title is "zmqexecutor supervisor" where Circus finds setproctitle.
                if any(
                    re.search("zmqexecutor supervisor|supervisor_boot", part)
                    for part in _cmdline(process)
                )
            ]
            return len(found) == 1

        assert eventually(look, PATIENCE), found
        return found[0]

    def workers(self) -> list[int]:
        """Those that live now."""
        try:
            children = psutil.Process(self.supervisor()).children()
        except psutil.NoSuchProcess:
            return []
        return [
            process.pid
            for process in children
            if any("zmqexecutor" in part for part in _cmdline(process))
            and not _is_template(process)
        ]

    def a_worker(self) -> int:
        assert eventually(self.workers, PATIENCE)
        return self.workers()[0]

    # ------------------------------------------------------------- tasks

    def sleep(self) -> int:
        """Start a task that runs until the gate opens; its number, when it runs."""
        number = len(self.tasks)
        self.tasks[number] = self.executor.submit(sleeper, self.diary, number, str(self.gate))
        assert eventually(lambda: self.diary.pid_of(number), PATIENCE), "it does not start"
        return number

    def open_gate(self) -> None:
        self.gate.touch()

    def tiny(
        self, count: int, deed: Callable[[], object] | None = None, poison: Poison | None = None
    ) -> list[int]:
        """Submit tiny tasks; their numbers."""
        numbers = range(len(self.tasks), len(self.tasks) + count)
        for number in numbers:
            self.tasks[number] = self.executor.submit(tiny, self.diary, number, deed, poison)
        return [*numbers]

    def others_go_on(self) -> None:
        """One worker does nothing; of some tasks, it can hold up only what it was sent."""
        if not self.closed:
            some = [self.executor.submit(pow, 2, 2) for _ in range(3)]
            self.others += some
            assert wait(some, PATIENCE, FIRST_COMPLETED).done

    # ------------------------------------------------------------- the account

    def settle(self) -> dict[int, BaseException]:
        """Wait for all tasks; what those raised that failed.

        Every task that has a result ran once, and none ran twice.
        """
        failed = {}
        for number, future in self.tasks.items():
            error = future.exception(PATIENCE)
            if error is not None:
                failed[number] = error
            else:
                assert future.result() == number * number
        assert all(future.result(PATIENCE) == 4 for future in self.others)
        runs = self.diary.runs()
        assert {number: runs[number] for number in self.tasks if number not in failed} == {
            number: 1 for number in self.tasks if number not in failed
        }
        assert set(runs.values()) <= {1}, "a task ran twice"
        return failed

    def check_lost(
        self, failed: dict[int, BaseException], numbers: list[int], exitcode: int | None
    ) -> None:
        """Exactly these tasks are lost, and they were running."""
        assert sorted(failed) == numbers
        for number in numbers:
            error = failed[number]
            assert isinstance(error, WorkerLostError), error
            assert error.job in ("tiny", "sleeper")
            assert error.exitcode == exitcode
            assert error.pid in (None, self.diary.pid_of(number)) or not self.diary.pid_of(number)

    def check_it_goes_on(self) -> None:
        if not self.closed:
            first = self.executor.submit(pow, 3, 2)
            assert list(self.executor.map(abs, range(-50, 0))) == list(range(50, 0, -1))
            assert first.result(PATIENCE) == 9


def _is_template(process: psutil.Process) -> bool:
    try:
        return bool(process.name() == template.NAME.decode())
    except psutil.NoSuchProcess:
        return False


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        cmdline: list[str] = process.cmdline()
    except psutil.NoSuchProcess:
        return []
    return cmdline
