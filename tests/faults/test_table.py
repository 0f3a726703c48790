"""Every fault in every stage: see `table` for both, and for what it may cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zmqexecutor import WorkerLostError, ZmqExecutor

from ..conftest import eventually
from .processes import PATIENCE, Poison, Pool
from .table import FAULTS, Fault

FROM_INSIDE = [name for name, fault in FAULTS.items() if fault.inside]
FROM_OUTSIDE = [name for name, fault in FAULTS.items() if fault.outside]


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    executor = ZmqExecutor(2)
    try:
        yield Pool(executor, tmp_path)
    except BaseException:
        executor.kill_workers()
        raise
    finally:
        executor.shutdown()


def strike(pool: Pool, fault: Fault, pid: int) -> int:
    assert fault.outside is not None
    return fault.outside(pool, pid)


def commit(pool: Pool, fault: Fault) -> int:
    """Submit a task that brings the fault about; its number."""
    if fault.where == "argument":
        (number,) = pool.tiny(1, poison=Poison(_the(fault), "unpickled"))
    elif fault.where == "result":
        (number,) = pool.tiny(1, poison=Poison(_the(fault), "pickled"))
    else:
        (number,) = pool.tiny(1, _the(fault))
    return number


def _the(fault: Fault) -> Callable[[], object]:
    assert fault.inside is not None
    return fault.inside


def check(pool: Pool, fault: Fault, numbers: list[int]) -> None:
    """These tasks, and no others, pay for the fault."""
    failed = pool.settle()
    if fault.raises is not None:
        assert sorted(failed) == numbers
        assert all(isinstance(error, fault.raises) for error in failed.values())
    else:
        pool.check_lost(failed, numbers, fault.exitcode)
    pool.check_it_goes_on()


@pytest.mark.parametrize("name", FROM_OUTSIDE)
def test_before_the_first_task(pool: Pool, name: str) -> None:
    strike(pool, FAULTS[name], pool.a_worker())
    pool.tiny(20)
    check(pool, FAULTS[name], [])


@pytest.mark.parametrize("name", FROM_OUTSIDE)
def test_between_tasks(pool: Pool, name: str) -> None:
    pool.tiny(20)
    pool.settle()
    strike(pool, FAULTS[name], pool.a_worker())
    pool.tiny(20)
    check(pool, FAULTS[name], [])


@pytest.mark.parametrize("name", FROM_INSIDE)
def test_running_from_inside(pool: Pool, name: str) -> None:
    other = pool.sleep()
    victim = commit(pool, FAULTS[name])
    with pytest.raises(FAULTS[name].raises or WorkerLostError):
        pool.tasks[victim].result(PATIENCE)
    assert not pool.tasks[other].done()
    pool.open_gate()
    check(pool, FAULTS[name], [victim])


@pytest.mark.parametrize("name", FROM_OUTSIDE)
def test_running_from_outside(pool: Pool, name: str) -> None:
    fault = FAULTS[name]
    # Beside a stopped worker another one goes on.
    running = [pool.sleep() for _ in range(1 if name == "SIGSTOP, SIGCONT" else 2)]
    queued = pool.tiny(20)
    pid = pool.diary.pid_of(running[0])
    assert pid is not None
    died = strike(pool, fault, pid)
    lost = running[:died]
    assert eventually(lambda: all(pool.tasks[number].done() for number in lost), PATIENCE)
    pool.open_gate()
    check(pool, fault, lost)
    assert all(pool.diary.runs()[number] == 1 for number in queued)


@pytest.mark.parametrize("name", FROM_INSIDE)
def test_sent_ahead_from_inside(pool: Pool, name: str) -> None:
    pool.tiny(400)
    pool.settle()  # they are known to be tiny now
    victims = []
    for _ in range(2):
        pool.tiny(60)
        victims.append(commit(pool, FAULTS[name]))
        pool.tiny(60)
    check(pool, FAULTS[name], victims)


@pytest.mark.parametrize("name", FROM_OUTSIDE)
def test_sent_ahead_from_outside(pool: Pool, name: str) -> None:
    """Who was running at that moment cannot be known beforehand; one for each death may be."""
    fault = FAULTS[name]
    pool.tiny(400)
    pool.settle()
    died = 0
    for _ in range(1 if name == "the supervisor" else 2):
        numbers = pool.tiny(2000)
        middle = numbers[200]
        assert eventually(lambda: pool.tasks[middle].done(), PATIENCE)  # noqa: B023
        died += strike(pool, fault, pool.a_worker())
    failed = pool.settle()
    assert len(failed) <= died
    pool.check_lost(failed, sorted(failed), fault.exitcode)
    pool.check_it_goes_on()


@pytest.mark.parametrize("name", FROM_OUTSIDE)
def test_at_shutdown(pool: Pool, name: str) -> None:
    fault = FAULTS[name]
    running = pool.sleep()
    queued = pool.tiny(20)
    pool.executor.shutdown(wait=False)
    pool.closed = True
    pid = pool.diary.pid_of(running)
    assert pid is not None
    died = strike(pool, fault, pid)
    assert not died or eventually(pool.tasks[running].done, PATIENCE)
    pool.open_gate()
    failed = pool.settle()
    assert set(failed) <= {running, *queued}
    assert len(failed) <= died
    assert died == 0 or running in failed
    pool.check_lost(failed, sorted(failed), fault.exitcode)
