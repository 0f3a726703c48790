"""What a worker has not started is taken back: no job runs twice, and none is lost."""

from __future__ import annotations

import ctypes
import os
import signal
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import cast

import hypothesis.stateful as machine
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from zmqexecutor import TaskKilledError, ZmqExecutor
from zmqexecutor.master.channels import Channels
from zmqexecutor.master.lanes import Job
from zmqexecutor.master.peers import Peer
from zmqexecutor.master.recalls import SETTLE, Recalls
from zmqexecutor.master.scheduler import STALL, Recall, Scheduler, Send
from zmqexecutor.wire.journal import _RECALLED, JournalReader, JournalWriter
from zmqexecutor.wire.protocol import Hello, Result, decode_result, encode

from .conftest import eventually

NOWHERE = cast(Channels, None)
"""Nothing is sent here."""
TINY = 1e-6
"""Seconds that a job is expected to take."""


class TinyJob(Job, eq=False, kw_only=True):
    doomed: bool = False

    def start(self) -> bool:
        return not self.doomed


class World:
    """A worker with what it was sent, and the master's side of it, around a real journal."""

    def __init__(self, directory: str) -> None:
        self.now = 0.0
        self.writer = JournalWriter(directory)
        hello = Hello(1, "w", os.getpid(), "", "", None, self.writer.path)
        self.peer = Peer(hello, b"w", NOWHERE, JournalReader(self.writer.path))
        self.scheduler: Scheduler[Job] = Scheduler()
        self.state = self.scheduler.worker_ready(b"w", 0.0)
        self.peer.state = cast("object", self.state)  # type: ignore[assignment]
        self.scheduler._durations["tiny"] = TINY
        self.recalls = Recalls(
            lambda _: self.read(),
            lambda _, seqs: self.scheduler.recalled(self.state, seqs),
            lambda: self.now,
        )
        self.watch_start()
        # The worker's own: jobs that have come, the one that it has noted, and whether
        # it knows that this one may start.
        self.queue: deque[tuple[int, Job]] = deque()
        self.noted: tuple[int, Job, bool] | None = None
        self.runs: Counter[int] = Counter()
        self.jobs: list[Job] = []
        self.done: list[Job] = []

    def submit(self, count: int) -> None:
        for _ in range(count):
            self.jobs.append(TinyJob(kind="tiny"))
            self.scheduler.submit(self.jobs[-1], self.now)
        self.decide()

    def decide(self) -> None:
        for decision in self.scheduler.decide(self.now):
            if isinstance(decision, Send):
                self.queue += decision.jobs
            elif isinstance(decision, Recall):
                self.recalls.ask(self.peer)

    def read(self) -> None:
        assert self.peer.journal is not None
        results = [decode_result(entry) for entry, _ in self.peer.journal.read()]
        done = self.scheduler.results(self.state, results, self.now)
        self.done += [job for job in done if job is not None]

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.recalls.check(self.now)
        self.decide()

    def note(self) -> None:
        """The worker's half of the race: it says what it is about to run."""
        if self.noted is None and self.queue:
            seq, job = self.queue.popleft()
            self.noted = seq, job, self.writer.start(seq, self.now)

    def watch_start(self) -> None:
        """Have `meanwhile` called just before or after the worker looks for a recall."""
        world, words = self, self.writer._words

        class Watched:
            def __getitem__(self, place: int) -> int:
                found = words[place]
                meanwhile = None
                if place == _RECALLED:
                    meanwhile, world.meanwhile = world.meanwhile, None
                if meanwhile:
                    meanwhile()
                return words[place] if world.meanwhile_before else found

            def __setitem__(self, place: int, value: int) -> None:
                words[place] = value

            def release(self) -> None:
                words.release()

        self.meanwhile: Callable[[], None] | None = None
        self.meanwhile_before = False
        self.writer._words = cast("memoryview[int]", Watched())

    def act(self) -> None:
        """The other half: it runs that, drops it, or waits."""
        if self.noted is None:
            return
        seq, job, certain = self.noted
        may = certain or self.writer.may_start(seq)
        if may is None:
            return
        self.noted = None
        if may:
            self.runs[id(job)] += 1
            assert self.writer.append(encode(Result(seq, True, b"", seconds=TINY)))

    def close(self) -> None:
        self.peer.close()
        self.writer.close()
        self.writer.unlink()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(str(tmp_path))
    yield made
    made.close()


def test_a_worker_that_does_nothing_keeps_one_job(world: World) -> None:
    world.submit(5)
    world.pass_time(STALL)
    world.recalls.check(world.now + SETTLE * 0.9)
    assert len(world.state.held) == 5
    world.pass_time(SETTLE)
    assert list(world.state.held) == [1]
    assert len(world.scheduler) == 4
    for _ in range(5):
        world.note()
        world.act()
    assert [world.runs[id(job)] for job in world.jobs] == [1, 0, 0, 0, 0]


def test_what_a_worker_has_noted_before_it_knew_of_the_recall_is_its_own(world: World) -> None:
    world.submit(5)
    world.note()
    world.pass_time(STALL)
    world.act()  # it knew already that it may
    world.note()
    world.act()
    assert world.runs.total() == 1  # it waits for the decision
    world.pass_time(SETTLE)
    assert list(world.state.held) == [2]  # and none is sent before there is a sign of life
    world.act()
    world.read()
    world.decide()
    assert list(world.state.held) == [6, 7, 8]
    for _ in range(4):
        world.note()
        world.act()
    assert [world.runs[id(job)] for job in world.jobs] == [1, 1, 1, 0, 0]  # two were dropped


def test_what_was_taken_back_is_not_run_after_another_recall(world: World) -> None:
    """The worker has not yet come to what was taken back before."""
    world.submit(5)
    world.note()
    world.pass_time(STALL)
    world.pass_time(SETTLE)
    world.act()  # the first
    world.read()
    world.decide()  # the others are sent again, and the worker goes to sleep
    assert list(world.state.held) == [6, 7, 8, 9]
    world.note()  # the old second one, after which it is stopped for a while
    world.pass_time(STALL)
    world.pass_time(SETTLE)
    assert list(world.state.held) == [6]
    for _ in range(9):
        world.act()
        world.note()
    assert [world.runs[id(job)] for job in world.jobs] == [1, 1, 0, 0, 0]


def test_a_stopped_worker_keeps_no_job_that_nobody_wants(world: World) -> None:
    world.submit(3)
    first = world.jobs[0]
    assert isinstance(first, TinyJob)
    first.doomed = True
    world.pass_time(STALL)
    world.pass_time(SETTLE)
    assert [job for job, _ in world.state.held.values()] == world.jobs[1:]  # sent again
    world.pass_time(STALL)
    world.pass_time(SETTLE)
    assert [job for job, _ in world.state.held.values()] == world.jobs[1:2]


def test_a_job_that_waits_for_the_decision_is_not_lost_with_its_worker(world: World) -> None:
    world.submit(3)
    world.note()
    world.act()
    world.pass_time(STALL)
    world.note()
    assert world.noted is not None
    assert world.writer.may_start(2) is None
    world.writer.wait_with(2)
    assert world.peer.last_run() == 0
    world.pass_time(SETTLE)
    assert world.writer.may_start(2)
    world.writer.wait_with(0)
    assert world.peer.last_run() == 2


def test_the_recall_of_a_worker_that_is_lost_is_over(world: World) -> None:
    world.submit(5)
    world.pass_time(STALL)
    assert world.recalls.next_deadline() == world.now + SETTLE
    world.recalls.forget(world.peer)
    assert world.recalls.next_deadline() is None


def test_what_comes_while_a_recall_is_under_way_does_not_overtake(world: World) -> None:
    world.submit(3)
    third = world.state.held[3][0]
    world.note()
    world.pass_time(STALL)
    world.act()
    world.read()  # progress, but it may have to give back the third
    world.submit(2)
    assert list(world.state.held) == [2, 3]
    world.pass_time(SETTLE)
    assert list(world.state.held) == [2]
    world.note()
    world.act()
    world.read()
    world.decide()
    assert list(world.state.held) == [4, 5, 6]
    assert world.state.held[4][0] is third


class Races(machine.RuleBasedStateMachine):
    """Every interleaving of what the two sides do."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.world = World(self.directory.name)

    @machine.rule(count=st.integers(1, 5))
    def submit(self, count: int) -> None:
        self.world.submit(count)

    @machine.rule()
    def note(self) -> None:
        self.world.note()

    @machine.rule(asked=st.booleans(), finished=st.booleans(), before=st.booleans())
    def note_while_the_master_acts(self, asked: bool, finished: bool, before: bool) -> None:
        """Between the worker's two halves of one: its write, and its look."""

        def act() -> None:
            if asked:
                self.recall()
            if finished:
                self.world.pass_time(SETTLE)

        self.world.meanwhile, self.world.meanwhile_before = act, before
        self.world.note()
        self.world.meanwhile = None

    @machine.rule()
    def act(self) -> None:
        self.world.act()

    @machine.rule()
    def run_one(self) -> None:
        self.world.note()
        self.world.act()

    @machine.rule()
    def read(self) -> None:
        self.world.read()
        self.world.decide()

    @machine.rule(seconds=st.sampled_from([SETTLE, STALL]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @machine.rule()
    def recall(self) -> None:
        """As `Stops` does it, at any time."""
        self.world.recalls.ask(self.world.peer)

    @machine.invariant()
    def none_runs_twice(self) -> None:
        assert max(self.world.runs.values(), default=0) <= 1

    def teardown(self) -> None:
        world = self.world
        try:
            for _ in range(3 * len(world.jobs) + 3):
                world.pass_time(SETTLE)
                for _ in range(len(world.queue) + 1):
                    self.run_one()
                self.read()
            assert [world.runs[id(job)] for job in world.jobs] == [1] * len(world.jobs)
            assert len(world.done) == len(world.jobs)
        finally:
            world.close()
            self.directory.cleanup()


TestRaces = Races.TestCase
TestRaces.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


# ---------------------------------------------------------------------- the pool


def keep_the_interpreter(seconds: int) -> int:
    """No other thread of the worker runs meanwhile."""
    return ctypes.PyDLL(None).sleep(seconds) if seconds else 0


def test_no_job_waits_behind_one_that_keeps_the_interpreter() -> None:
    with ZmqExecutor(2) as executor:
        executor.wait_for_workers(2, 60)
        list(executor.map(keep_the_interpreter, [0] * 500))
        tasks = [executor.submit(keep_the_interpreter, 4 * (i == 30)) for i in range(400)]
        long = tasks.pop(30)
        assert not wait(tasks, 60).not_done
        assert not long.done()
        assert long.result(60) == 0


def test_a_task_can_be_killed_that_a_stopped_worker_has_not_begun() -> None:
    with ZmqExecutor(1) as executor:
        executor.submit(abs, 0).result(60)
        stopped = executor.workers[0].pid
        os.kill(stopped, signal.SIGSTOP)
        try:
            task = executor.submit(abs, -1)
            assert task.kill()
            with pytest.raises(TaskKilledError):
                task.result(60)
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert executor.submit(os.getpid).result(60) == stopped


def test_a_stopped_worker_keeps_one_job() -> None:
    with ZmqExecutor(2) as executor:
        executor.wait_for_workers(2, 60)
        list(executor.map(abs, range(1000)))
        stopped = executor.workers[0].pid
        os.kill(stopped, signal.SIGSTOP)
        try:
            tasks = [executor.submit(abs, i) for i in range(1000)]
            assert eventually(lambda: sum(not task.done() for task in tasks) <= 1)
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert [task.result(60) for task in tasks] == [*range(1000)]
