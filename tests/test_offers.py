"""A thread that submits sends a task itself while the master sleeps: once, and not lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from zmqexecutor import BrokenPoolError, TaskKilledError, WorkerLostError, ZmqExecutor
from zmqexecutor.master.inbox import Inbox
from zmqexecutor.master.lean import LeanFuture
from zmqexecutor.master.offers import Offer
from zmqexecutor.master.tasks import Task
from zmqexecutor.wire.protocol import CALLS
from zmqexecutor.wire.shortcuts import Post

from .conftest import eventually


class Watched:
    """An executor with one worker, and what was sent by offers."""

    def __init__(self, executor: ZmqExecutor, sent: list[Task]) -> None:
        self.executor = executor
        self.sent = sent

    def offer(self) -> Offer:
        """The offer that the master makes when it goes to sleep."""
        found: list[Offer] = []

        def look() -> bool:
            offer = self.executor._engine.master._inbox.offer
            found[:] = [offer] if offer else []
            return bool(found)

        assert eventually(look)
        return found[0]

    def wait_and_submit(self, fn: object, *args: object, **options: object) -> Future[object]:
        self.offer()
        view = self.executor.options(**options)  # type: ignore[arg-type]
        return view.submit(fn, *args)  # type: ignore[arg-type]


def note(path: str, gate: str | None = None) -> int:
    """Leave a mark for each run, and wait for the gate, if there is one."""
    with open(path, "a") as file:
        file.write("x")
    if gate is not None and not eventually(lambda: os.path.exists(gate), 60):
        raise TimeoutError(gate)
    return os.getpid()


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Watched]:
    sent: list[Task] = []
    send = Offer.send

    def watched(offer: Offer, task: Task) -> bool:
        sent.append(task)
        return send(offer, task)

    with ZmqExecutor(1) as executor:
        executor.submit(abs, 0).result(60)
        executor.submit(time.sleep, 0).result(60)
        executor.submit(note, str(tmp_path / "other")).result(60)  # the worker knows all three
        monkeypatch.setattr(Offer, "send", watched)
        yield Watched(executor, sent)


def test_a_small_task_is_sent_by_the_thread_that_submits_it(pool: Watched) -> None:
    for number in range(50):
        assert pool.wait_and_submit(abs, -number).result(60) == number
    assert len(pool.sent) == 50


def test_what_is_not_small_is_left_to_the_master(pool: Watched) -> None:
    large = pool.wait_and_submit(abs, -1, timeout=60)
    assert large.result(60) == 1
    assert pool.wait_and_submit(len, bytes(1_000_000)).result(60) == 1_000_000
    share = pool.executor.share([1, 2, 3])
    assert pool.wait_and_submit(len, share).result(60) == 3
    assert pool.wait_and_submit(divmod, 7, 2).result(60) == (3, 1)  # unknown to the worker
    assert pool.sent == []
    assert pool.wait_and_submit(divmod, 7, 2).result(60) == (3, 1)
    assert len(pool.sent) == 1


def test_tasks_of_a_thread_start_in_the_order_of_their_submission(
    pool: Watched, tmp_path: Path
) -> None:
    pool.executor.submit(order, 0, b"").result(60)  # the worker knows it now
    for size in (1, 1_000_000):
        starts: list[tuple[float, int]] = []
        pool.offer()
        futures = [pool.executor.submit(order, number, bytes(size)) for number in range(20)]
        starts += [future.result(60) for future in futures]
        pool.offer()
        # The master has been woken for the first, and is not awake yet.
        futures = [pool.executor.submit(order, 0, bytes(1_000_000))]
        futures += [pool.executor.submit(order, number, b"") for number in range(1, 20)]
        assert [number for _, number in sorted(starts)] == [*range(20)]
        assert [n for _, n in sorted(future.result(60) for future in futures)] == [*range(20)]
    assert pool.sent


def order(number: int, _: bytes) -> tuple[float, int]:
    return time.monotonic(), number


def test_it_is_running_for_all_to_see(pool: Watched, tmp_path: Path) -> None:
    path, gate = str(tmp_path / "runs"), tmp_path / "gate"
    future = pool.wait_and_submit(note, path, str(gate))
    assert pool.sent
    assert future.running()
    assert not future.cancel()
    assert [worker.state for worker in pool.executor.workers] == ["busy"]
    gate.touch()
    future.result(60)
    pool.offer()
    assert [worker.state for worker in pool.executor.workers] == ["idle"]


def test_the_death_of_its_worker(pool: Watched, tmp_path: Path) -> None:
    path = str(tmp_path / "runs")
    future = pool.wait_and_submit(note, path, "never")
    assert pool.sent
    assert eventually(lambda: os.path.exists(path))
    os.kill(pool.executor.workers[0].pid, signal.SIGKILL)
    with pytest.raises(WorkerLostError):
        future.result(60)
    assert pool.wait_and_submit(abs, -1).result(60) == 1


def test_a_worker_that_is_dead_already_costs_nothing(pool: Watched, tmp_path: Path) -> None:
    pool.offer()
    pool.executor._engine.master._loop._poller = Deaf(pool.executor)  # type: ignore[assignment]
    pool.executor.submit(abs, 1).result(60)
    pool.offer()
    pid = pool.executor.workers[0].pid
    os.kill(pid, signal.SIGKILL)
    future = pool.wait_and_submit(note, str(tmp_path / "runs"))
    assert len(pool.sent) == 2
    assert future.result(60) != pid
    assert (tmp_path / "runs").read_text() == "x"


class Deaf:
    """Hears of deaths only after a while."""

    def __init__(self, executor: ZmqExecutor) -> None:
        self.master = executor._engine.master
        self.poller = self.master._loop._poller
        self.deaths = self.master._coordinator.roster.fileno()

    def poll(self, timeout: int | None) -> list[tuple[int, int]]:
        self.poller.unregister(self.deaths)
        try:
            return self.poller.poll(timeout)
        finally:
            self.poller.register(self.deaths, 1)

    def register(self, *args: int) -> None:
        self.poller.register(*args)

    def unregister(self, descriptor: int) -> None:
        self.poller.unregister(descriptor)


def test_it_can_be_killed(pool: Watched, tmp_path: Path) -> None:
    path = str(tmp_path / "runs")
    future = pool.wait_and_submit(note, path, "never")
    assert pool.sent
    assert eventually(lambda: os.path.exists(path))
    assert future.kill()  # type: ignore[attr-defined]
    with pytest.raises(TaskKilledError):
        future.result(60)


def test_shutdown_waits_for_it(pool: Watched, tmp_path: Path) -> None:
    path, gate = str(tmp_path / "runs"), tmp_path / "gate"
    future = pool.wait_and_submit(note, path, str(gate))
    assert pool.sent
    pool.executor.shutdown(wait=False)
    assert not future.done()
    gate.touch()
    pool.executor.shutdown()
    assert future.done()
    assert future.exception() is None


def test_an_interrupt_before_it_is_sent_loses_no_worker(
    pool: Watched, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(offer: Offer, task: Task) -> bool:
        raise KeyboardInterrupt

    path = str(tmp_path / "runs")
    pool.offer()
    with monkeypatch.context() as patch:
        patch.setattr(Offer, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.executor.submit(note, path)
    assert pool.executor.submit(abs, -1).result(60) == 1
    assert Path(path).read_text() == "x"  # it was in the pool's hands


def test_what_a_slow_thread_sends_after_the_master_has_is_dropped(
    pool: Watched, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    send, held, go_on = Offer.send, threading.Event(), threading.Event()
    answers: list[bool] = []

    def slow(offer: Offer, task: Task) -> bool:
        held.set()
        assert go_on.wait(60)
        answers.append(send(offer, task))
        return answers[-1]

    path = str(tmp_path / "runs")
    pool.offer()
    with monkeypatch.context() as patch:
        patch.setattr(Offer, "send", slow)
        thread = threading.Thread(target=pool.executor.submit, args=(note, path))
        thread.start()
        assert held.wait(60)
    pool.executor._engine.master._inbox.wake()
    assert eventually(lambda: os.path.exists(path))
    go_on.set()
    thread.join(60)
    assert answers == [True]
    assert [pool.wait_and_submit(abs, -n).result(60) for n in range(5)] == [*range(5)]
    assert Path(path).read_text() == "x"


def test_a_mailbox_that_takes_no_more(pool: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.offer()
    woken = []
    wake = Inbox.wake

    def watched(inbox: Inbox) -> None:
        woken.append(inbox)
        wake(inbox)

    with monkeypatch.context() as patch:
        patch.setattr(Post, "send", lambda *_: False)
        patch.setattr(Inbox, "wake", watched)
        assert pool.executor.submit(abs, -3).result(60) == 3
    assert len(pool.sent) == len(woken) == 1


def test_two_that_want_it_at_once(pool: Watched, tmp_path: Path) -> None:
    """One of them gets it; the other's task goes the usual way, and can still be cancelled."""
    pool.executor.submit(note, os.devnull).result(60)  # the worker has the function
    offer = pool.offer()
    pool.executor._engine.master._inbox._nap.clear()  # nobody wakes the master meanwhile
    pool.sent.clear()
    first = pool.executor.submit(note, os.devnull, str(tmp_path / "go"))
    try:
        (task,) = pool.sent
        assert first.running()
        assert not offer.take(task)
        second: Future[object] = pool.executor.submit(abs, -5)
        assert not second.running()
        pool.executor._engine.master._inbox.wake()
    finally:
        (tmp_path / "go").touch()
    assert second.result(60) == 5
    first.result(60)


def test_a_thread_that_comes_second_leaves_the_future_as_it_was(
    pool: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = Offer(pool.offer().peer, CALLS, 1)
    task, start = make_task(), Task.start

    def slow(task: Task) -> bool:
        """Between its look at the offer and the claim the master withdraws it."""
        assert offer.withdraw() is None
        return start(task)

    monkeypatch.setattr(Task, "start", slow)
    assert not offer.take(task)
    assert not task.sent
    assert not task.future.running()
    assert task.future.cancel()


def test_an_interrupt_in_the_middle_of_waking_the_master(
    pool: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes next wakes it, although the inbox is not empty."""
    inbox = pool.executor._engine.master._inbox
    wake = inbox.wake

    def interrupted() -> None:
        wake()
        raise KeyboardInterrupt

    later = pool.executor.options(timeout=60)  # takes no offer
    for _ in range(20):
        pool.offer()
        with monkeypatch.context() as patch:
            patch.setattr(inbox, "wake", interrupted)
            with pytest.raises(KeyboardInterrupt):
                later.submit(abs, -1)
        assert eventually(lambda: inbox._nap)
        assert later.submit(abs, -2).result(60) == 2

    def never() -> None:
        raise KeyboardInterrupt

    pool.offer()
    with monkeypatch.context() as patch:
        patch.setattr(inbox, "wake", never)
        with pytest.raises(KeyboardInterrupt):
            later.submit(abs, -1)
    assert later.submit(abs, -3).result(60) == 3


def make_task() -> Task:
    return Task(
        kind="late",
        service=CALLS,
        future=LeanFuture(),
        data=b"",
        decode=lambda *_: None,
        name="late",
    )


def test_there_is_none_when_the_pool_is_broken(pool: Watched) -> None:
    """Its caller has looked before, and comes to the offer only then."""
    pool.offer()
    master = pool.executor._engine.master
    master._call(lambda: master._coordinator.break_off("for this test"))
    assert eventually(lambda: master.broken)
    assert eventually(lambda: master._inbox._nap)
    assert master._inbox.offer is None
    task = make_task()
    master.submit(task)
    with pytest.raises(BrokenPoolError):
        task.future.result(60)


def test_there_is_none_for_workers_that_do_so_many_tasks() -> None:
    """Their successors must be under way while they do their last one."""
    with ZmqExecutor(1, max_tasks_per_child=2) as executor:
        assert executor.submit(abs, -1).result(60) == 1
        master = executor._engine.master
        assert eventually(lambda: master._inbox._nap)
        assert master._inbox.offer is None


def test_a_signal_handler_or_finalizer_that_submits_in_the_middle_of_it(pool: Watched) -> None:
    executor = pool.executor
    results: list[Future[int]] = []
    submit, numbers = executor._engine.master.submit, iter(range(5))

    def interrupted(task: Task) -> None:
        if (number := next(numbers, None)) is not None:
            results.append(executor.submit(abs, -number))
        submit(task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor._engine.master, "submit", interrupted)
        results.append(executor.submit(abs, -7))
    assert sorted(future.result(60) for future in results) == [0, 1, 2, 3, 4, 7]


def test_many_threads(pool: Watched) -> None:
    results: list[int] = []

    def submit(base: int) -> None:
        for number in range(base, base + 300):
            result = pool.executor.submit(abs, -number).result(60)
            results.append(result)

    threads = [threading.Thread(target=submit, args=(1000 * n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert pool.sent
    assert sorted(results) == [1000 * n + number for n in range(6) for number in range(300)]
