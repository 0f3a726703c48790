"""A kill may hit one task only: the races that `Stops` decides, one interleaving at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from zmqexecutor.master.channels import Channels
from zmqexecutor.master.lean import LeanFuture
from zmqexecutor.master.peers import Peer
from zmqexecutor.master.recalls import SETTLE
from zmqexecutor.master.scheduler import Scheduler, Send
from zmqexecutor.master.stops import SILENT, STACK_WAIT, Stops
from zmqexecutor.master.tasks import Task, TaskOptions
from zmqexecutor.wire.journal import JournalReader, JournalWriter
from zmqexecutor.wire.protocol import Hello, Result

NOWHERE = cast(Channels, None)
"""Nothing is sent here."""


class World:
    """A worker that is sent tasks, and what is done to it; its journal is a real one."""

    def __init__(self, directory: Path) -> None:
        self.writer = JournalWriter(str(directory))
        hello = Hello(1, "w", os.getpid(), "", "", None, self.writer.path)
        self.peer = Peer(hello, b"w", NOWHERE, JournalReader(self.writer.path))
        self.scheduler: Scheduler[Task] = Scheduler()
        self.peer.state = self.scheduler.worker_ready(b"w", 0.0)
        self.killed: list[Peer] = []
        self.asked: list[Peer] = []
        self.stops = Stops(
            read_journal=lambda _: None,
            ask_stack=self.asked.append,
            recall=lambda _: None,
            kill=self.killed.append,
            give_up=lambda _: None,
        )

    def send(self, *tasks: Task) -> None:
        for task in tasks:
            self.scheduler._durations[task.kind] = 1e-6  # short enough to be sent ahead
            self.scheduler.submit(task, 0.0)
        (decision,) = self.scheduler.decide(0.0)
        assert isinstance(decision, Send)
        self.stops.sent(self.peer, tasks, 0.0)

    def finish(self, task: Task, now: float = 0.0) -> None:
        assert self.peer.state is not None
        self.peer.finished = task.seq
        result = Result(task.seq, True, b"", seconds=0.1)
        self.scheduler.results(self.peer.state, [result], now)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.peer.close()
    made.writer.close()
    made.writer.unlink()


def make_task(timeout: float | None = None) -> Task:
    return Task(
        kind="f",
        future=LeanFuture(),
        data=b"",
        decode=lambda _, __: None,
        name="f",
        options=TaskOptions(timeout),
    )


def test_a_task_over_its_time_is_killed_and_what_waits_behind_it_is_not_lost(
    world: World,
) -> None:
    slow, next_one = make_task(1.0), make_task()
    world.send(slow, next_one)
    assert world.writer.start(slow.seq, 0.0)
    world.stops.check(1.0)
    assert world.killed == []
    world.stops.check(1.0 + STACK_WAIT)
    assert world.killed == [world.peer]
    assert world.peer.last_run() == slow.seq
    # It ends at this very moment; the next one is noted, and not begun.
    assert not world.writer.start(next_one.seq, 1.2)
    assert world.peer.last_run() == 0


def test_a_task_that_began_before_the_other_was_condemned_and_crashed_does_not_run_again(
    world: World,
) -> None:
    slow, crashing = make_task(1.0), make_task()
    world.send(slow, crashing)
    assert world.writer.start(slow.seq, 0.0)
    running = world.peer.running()
    # The master has seen that the first one runs; now it ends, and the next one begins.
    assert world.writer.start(crashing.seq, 1.0)
    world.peer.running = lambda: running  # type: ignore[method-assign]
    world.stops.check(1.0)
    assert world.writer.may_start(crashing.seq) is None
    assert world.peer.last_run() == crashing.seq


def test_the_number_that_a_task_gets_for_its_next_try_means_nothing_here(world: World) -> None:
    slow, innocent = make_task(1.0), make_task()
    world.send(slow, innocent)
    assert world.writer.start(slow.seq, 0.0)
    world.stops.check(1.0)
    world.finish(slow)  # with an exception, to be tried again elsewhere
    world.writer.start(innocent.seq, 1.0)
    slow.seq = innocent.seq
    world.stops.check(1.0 + STACK_WAIT)
    assert world.killed == []
    assert world.writer.may_start(innocent.seq)


def test_the_time_that_a_worker_stood_still_before_a_task_does_not_count(world: World) -> None:
    first, second = make_task(1.0), make_task(0.15)
    world.send(first, second)
    assert world.writer.start(first.seq, 0.0)
    world.stops.check(1.0)
    world.finish(first)
    assert not world.writer.start(second.seq, 1.0)  # it has to wait
    now = 1.0 + STACK_WAIT
    world.stops.check(now)  # it is let go on, and condemned at once: so far it has not begun
    world.writer.start(second.seq, now)
    world.stops.on_stack(world.peer, "here", now)
    world.stops.check(now + 0.01)
    assert world.killed == []
    world.stops.check(now + 0.2)
    world.stops.check(now + 0.2 + STACK_WAIT)
    assert world.killed == [world.peer]


def test_a_worker_that_begins_nothing_and_does_not_answer_is_killed_and_nothing_is_lost(
    world: World,
) -> None:
    task = make_task(1.5)
    world.send(task)
    world.stops.check(1.5)
    assert world.asked == [world.peer]
    world.stops.check(1.5 + SILENT)
    assert world.killed == []
    world.stops.check(1.5 + SILENT + SETTLE)
    assert world.killed == [world.peer]
    # It comes to the task at this very moment: it has to wait, also between the two words.
    assert not world.writer.start(task.seq, 12.0)
    assert world.peer.last_run() == 0
    world.writer.wait_with(task.seq)
    assert world.peer.last_run() == 0


def test_a_worker_that_comes_to_its_task_when_it_is_about_to_be_killed_for_its_silence(
    world: World,
) -> None:
    task = make_task(1.5)
    world.send(task)
    world.stops.check(1.5)
    now = 1.5 + SILENT
    world.stops.check(now)
    assert not world.writer.start(task.seq, now)
    world.writer.wait_with(task.seq)
    world.stops.check(now + SETTLE)
    assert world.killed == []
    assert world.writer.may_start(task.seq)
    world.writer.wait_with(0)
    world.stops.check(now + 1.5)
    world.stops.check(now + 1.5 + STACK_WAIT)
    assert world.killed == [world.peer]
    assert world.peer.last_run() == task.seq


def test_a_worker_that_takes_long_to_begin_and_answers_is_not_killed(world: World) -> None:
    task = make_task(0.01)
    world.send(task)
    now = 0.0
    while now < 10 * SILENT:
        asked = len(world.asked)
        now = world.stops.next_deadline() or 0.0
        world.stops.check(now)
        if len(world.asked) > asked:
            world.stops.on_stack(world.peer, "in an import", now + 0.5)
    assert 0 < len(world.asked) <= 10 * SILENT / STACK_WAIT
    assert world.killed == []


def test_a_worker_whose_task_waits_behind_a_long_one_is_not_asked(world: World) -> None:
    long, behind = make_task(), make_task(0.5)
    world.send(long, behind)
    assert world.writer.start(long.seq, 0.0)
    for tenths in range(1000):
        world.stops.check(tenths / 10)
    assert world.asked == []
    world.finish(long, 100.0)
    world.stops.check(100.1)
    assert world.asked == []


def test_looks_at_workers_that_are_gone_do_not_pile_up(world: World) -> None:
    stops = world.stops
    hello = Hello(1, "w", os.getpid(), "", "", None, None)
    here = [Peer(hello, b"w", NOWHERE) for _ in range(100)]
    for number, peer in enumerate(here):
        stops.sent(peer, [make_task(1e6 + number)], 0.0)
    for number in range(5000):
        gone = Peer(hello, b"w", NOWHERE)
        stops.sent(gone, [make_task(1e5)], 0.0)
        stops.sent(gone, [make_task(1e4 + number)], 0.0)  # an earlier look
        stops.forget(gone)
    assert len(stops._looks) < 400
    assert {entry[2] for entry in stops._looks} >= set(here)
    stops.check(2e5)
    assert sorted(entry[0] for entry in stops._looks) == [1e6 + number for number in range(100)]
