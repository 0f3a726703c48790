"""Steps of a master that has no thread, where it matters what comes first."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import cast

import pytest

from tests.fuzz.master import BareMaster
from zmqexecutor import BrokenPoolError, WorkerLostError
from zmqexecutor.master.fleet import Fleet, Group
from zmqexecutor.master.lean import LeanFuture
from zmqexecutor.master.tasks import Task
from zmqexecutor.wire.protocol import Reaped, Spawned


@pytest.fixture
def bare() -> Iterator[BareMaster]:
    master = BareMaster()
    yield master
    master.close()


def test_a_task_that_crosses_with_the_end_fails(bare: BareMaster) -> None:
    bare.submit()
    bare.step(1.0)
    bare.coordinator.end(RuntimeError("for this test"), kill=False)
    bare.submit()
    bare.step(2.0)
    assert bare.coordinator.done()
    assert bare.futures[0].cancelled()
    with pytest.raises(CancelledError):
        bare.futures[1].result(0)


def test_a_task_that_crosses_with_a_break_fails(bare: BareMaster) -> None:
    bare.coordinator.break_off("for this test")
    bare.submit()
    bare.step(1.0)
    with pytest.raises(BrokenPoolError, match="for this test"):
        bare.futures[0].result(0)
    assert not bare.coordinator.done()  # who made it has to shut it down
    bare.coordinator.close_when_done(cancel=False)
    assert bare.coordinator.done()


class FakeGroup:
    """A group with one process, as the supervisor tells of it."""

    supervisor_pid = 1
    closed = hung_up = False
    pids = frozenset((7,))

    def receive(self) -> list[Spawned]:
        return [Spawned(7)]

    def scale(self, numprocesses: int, *, spare: bool = False) -> None:
        pass


def test_a_process_that_is_lost_twice_before_it_is_reaped() -> None:
    """It lost its connection in one task, registered again, and died in the next."""
    fleet = Fleet(cast(Group, FakeGroup()))
    fleet.receive()
    tasks = [
        Task(kind="", future=LeanFuture(), data=b"", decode=lambda *_: None, name=str(number))
        for number in range(2)
    ]
    for task in tasks:
        fleet.bury(task, 7, 0.1)
    fleet.reaped(Reaped(7, -9, ""))
    errors = [task.future.exception(0) for task in tasks]
    assert all(isinstance(error, WorkerLostError) for error in errors)
    assert [getattr(error, "signal", None) for error in errors] == [None, "SIGKILL"]
    assert not fleet.waiting
