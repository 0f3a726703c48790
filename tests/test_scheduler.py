"""The scheduler by itself: examples of each behaviour, then a world of simulated workers."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from zmqexecutor.master import scheduler as scheduler_module
from zmqexecutor.master.lanes import Job, WorkerState
from zmqexecutor.master.scheduler import (
    AHEAD,
    KINDS_REMEMBERED,
    LARGEST_BATCH,
    LONGEST_AHEAD,
    PURGE,
    STALL,
    TRAVEL,
    Decision,
    Deserted,
    Expire,
    Recall,
    Retire,
    Scale,
    Scheduler,
    Send,
)
from zmqexecutor.wire.protocol import DEFAULT_SERVICE, Result


@pytest.fixture(autouse=True)
def no_leaks() -> None:
    """In the place of conftest's: nothing here opens anything, and looking takes time."""


TINY = 1e-6
"""A duration of which many fit into what is sent ahead."""


class NamedJob(Job, eq=False, kw_only=True):
    """A job that behaves as the master's: once sent, it cannot be cancelled."""

    name: int
    cancelled: bool = False
    sent: bool = False
    dropped: bool = False

    def wanted(self) -> bool:
        return not self.cancelled

    def start(self) -> bool:
        assert not self.dropped, "a cancelled job was started twice"
        if not self.sent:
            self.sent = not self.cancelled
            self.dropped = self.cancelled
        return self.sent

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}>"


Worker = WorkerState[NamedJob]


class Desk:
    """A scheduler with a clock, and short words for what the examples do with it."""

    def __init__(
        self, *, max_workers: int = 0, wanted: int = 0, patience: float | None = None
    ) -> None:
        self.scheduler: Scheduler[NamedJob] = Scheduler(
            max_workers=max_workers, wanted=wanted, patience=patience
        )
        self.now = 100.0
        self._names = 0

    def worker(
        self,
        key: str,
        *services: str,
        grouped: bool = True,
        ahead: bool = True,
        allowance: int | None = None,
    ) -> Worker:
        return self.scheduler.worker_ready(
            key.encode(),
            self.now,
            services=services or [DEFAULT_SERVICE],
            grouped=grouped,
            ahead=ahead,
            allowance=allowance,
        )

    def submit(
        self, kind: str, count: int = 1, service: str = DEFAULT_SERVICE, size: int = 0
    ) -> list[NamedJob]:
        jobs = [
            NamedJob(name=self._names + i, kind=kind, service=service, size=size)
            for i in range(count)
        ]
        self._names += count
        for job in jobs:
            self.scheduler.submit(job, self.now)
        return jobs

    def decide(self, *, after: float = 0.0) -> list[Decision[NamedJob]]:
        self.now += after
        return self.scheduler.decide(self.now)

    def answer(self, worker: Worker, seq: int | None = None, seconds: float = TINY) -> None:
        """The worker answers this job, or the first that it holds."""
        first = next(iter(worker.held)) if seq is None else seq
        assert take_result(self.scheduler, worker, first, seconds, self.now) is not None

    def answer_all(self, worker: Worker, seconds: float = TINY) -> None:
        results = [Result(seq, True, b"", seconds=seconds) for seq in worker.held]
        assert None not in self.scheduler.results(worker, results, self.now)

    def recall(self, worker: Worker) -> list[int]:
        """The worker has stalled; which jobs it has not started."""
        assert only(self.decide(after=STALL), Recall) == [Recall(worker)]
        return list(worker.held)[1:]

    def teach(self, worker: Worker, kind: str, seconds: float) -> None:
        """Have an idle worker do one job of this kind, so that its duration is known.

        It is the given one if that is the only one, or was idle last.
        """
        self.submit(kind)
        [sent] = only(self.decide(), Send)
        self.answer(sent.worker, seconds=seconds)
        assert worker.key in self.scheduler._workers


def take_result(
    scheduler: Scheduler[NamedJob], worker: Worker, seq: int, seconds: float, now: float
) -> NamedJob | None:
    (job,) = scheduler.results(worker, [Result(seq, True, b"", seconds=seconds)], now)
    return job


def only(decisions: Iterable[Decision[NamedJob]], kind: type[Any]) -> list[Any]:
    return [decision for decision in decisions if isinstance(decision, kind)]


def sent_to(decisions: Iterable[Decision[NamedJob]], worker: Worker) -> list[NamedJob]:
    return [
        job
        for decision in decisions
        if isinstance(decision, Send) and decision.worker is worker
        for _, job in decision.jobs
    ]


def available(worker: Worker) -> bool:
    return not worker.draining and not worker.leaving and worker.allowance != 0


def queued(scheduler: Scheduler[NamedJob]) -> list[NamedJob]:
    return [job for lane in scheduler.lanes() for job in lane.queue]


# --------------------------------------------------------------- sending ahead


def test_jobs_of_an_unknown_kind_are_sent_one_at_a_time() -> None:
    desk = Desk()
    worker = desk.worker("a")
    first, second, _ = desk.submit("new", 3)
    assert sent_to(desk.decide(), worker) == [first]
    assert desk.decide() == []
    desk.answer(worker, seconds=1.0)
    assert sent_to(desk.decide(), worker) == [second]


def test_a_long_kind_is_sent_one_at_a_time_although_it_is_known() -> None:
    desk = Desk()
    worker = desk.worker("a")
    desk.teach(worker, "long", 1.01 * LONGEST_AHEAD)
    jobs = desk.submit("long", 3)
    assert sent_to(desk.decide(), worker) == jobs[:1]


@pytest.mark.parametrize("seconds", [AHEAD / 100, AHEAD / 10, AHEAD / 4])
def test_a_batch_of_a_short_kind_is_as_long_as_ahead_allows(seconds: float) -> None:
    desk = Desk()
    worker = desk.worker("a")
    desk.teach(worker, "short", seconds)
    jobs = desk.submit("short", 1000)
    batch = sent_to(desk.decide(), worker)
    assert batch == jobs[: len(batch)]
    assert AHEAD / 2 <= len(batch) * seconds <= AHEAD * 1.000001
    assert worker.load == pytest.approx(len(batch) * seconds)


@pytest.mark.parametrize("size", [20_000, 60_000, 150_000])
def test_what_takes_long_to_send_is_not_sent_in_large_batches(size: int) -> None:
    desk = Desk()
    worker = desk.worker("a")
    desk.teach(worker, "tiny", TINY)
    jobs = desk.submit("tiny", 1000, size=size)
    batch = sent_to(desk.decide(), worker)
    assert batch == jobs[: len(batch)]
    assert AHEAD / 2 <= len(batch) * size * TRAVEL <= AHEAD
    desk.answer_all(worker)
    assert worker.load == 0


@pytest.mark.parametrize(("share", "ahead"), [(0.9, 1), (1.1, 0)])
def test_one_large_job_is_sent_ahead_while_there_are_plenty(share: float, ahead: int) -> None:
    desk = Desk()
    worker = desk.worker("a")
    desk.teach(worker, "tiny", TINY)
    jobs = desk.submit("tiny", 9, size=int(share * LONGEST_AHEAD / TRAVEL))
    assert sent_to(desk.decide(), worker) == jobs[: 1 + ahead]


def test_a_message_has_at_most_the_largest_batch() -> None:
    desk = Desk()
    worker = desk.worker("a")
    desk.teach(worker, "tiny", TINY)
    desk.submit("tiny", 3 * LARGEST_BATCH)
    sends = only(desk.decide(), Send)
    assert sends
    assert all(len(send.jobs) <= LARGEST_BATCH for send in sends)


def test_a_worker_that_takes_nothing_ahead_holds_one_job() -> None:
    desk = Desk()
    worker = desk.worker("a", ahead=False)
    desk.teach(worker, "tiny", TINY)
    jobs = desk.submit("tiny", 5)
    for job in jobs:
        assert sent_to(desk.decide(), worker) == [job]
        desk.answer(worker)


def test_a_long_job_is_not_sent_behind_short_ones() -> None:
    desk = Desk()
    worker = desk.worker("a")
    desk.teach(worker, "tiny", TINY)
    tiny = desk.submit("tiny", 2)
    long = desk.submit("new")
    assert sent_to(desk.decide(), worker) == tiny
    desk.answer_all(worker)
    assert sent_to(desk.decide(), worker) == long


def test_numbers_count_all_jobs_that_a_worker_was_sent() -> None:
    desk = Desk()
    worker = desk.worker("a")
    desk.teach(worker, "tiny", TINY)
    desk.submit("tiny", 3)
    (send,) = only(desk.decide(), Send)
    assert [seq for seq, _ in send.jobs] == [2, 3, 4]


def test_what_waits_is_spread_over_the_idle_workers() -> None:
    desk = Desk()
    workers = [desk.worker(name) for name in "abcd"]
    desk.teach(workers[0], "tiny", TINY)
    jobs = desk.submit("tiny", 10)
    decisions = desk.decide()
    shares = [sent_to(decisions, worker) for worker in workers]
    assert sorted(len(share) for share in shares) == [2, 2, 3, 3]
    assert sorted(job.name for share in shares for job in share) == [job.name for job in jobs]


def test_the_worker_that_was_idle_last_is_served_first() -> None:
    desk = Desk()
    first, second = desk.worker("a"), desk.worker("b")
    for worker in (second, second):
        desk.submit("tiny")
        assert sent_to(desk.decide(), worker)
        desk.answer(worker)
    desk.submit("tiny", 2)
    assert {send.worker.key for send in only(desk.decide(), Send)} == {first.key, second.key}


def test_an_idle_worker_is_served_before_one_that_has_jobs() -> None:
    desk = Desk()
    busy = desk.worker("a")
    desk.teach(busy, "tiny", TINY)
    desk.submit("tiny")
    assert sent_to(desk.decide(), busy)
    idle = desk.worker("b")
    jobs = desk.submit("tiny")
    assert sent_to(desk.decide(), idle) == jobs


def test_a_worker_with_little_left_is_given_more_before_it_runs_dry() -> None:
    desk = Desk()
    worker = desk.worker("a")
    desk.teach(worker, "short", AHEAD / 10)
    jobs = desk.submit("short", 20)
    first = sent_to(desk.decide(), worker)
    assert len(first) in (9, 10)  # a sum of rounded tenths
    for _ in range(4):
        desk.answer(worker, seconds=AHEAD / 10)
    assert desk.decide() == [], "more than half of AHEAD is left"
    for _ in range(2):
        desk.answer(worker, seconds=AHEAD / 10)
    more = sent_to(desk.decide(), worker)
    assert first + more == jobs[: len(first) + len(more)]
    assert worker.load <= AHEAD * 1.000001


def test_the_average_follows_durations_that_change() -> None:
    desk = Desk()
    worker = desk.worker("a")
    desk.teach(worker, "kind", TINY)
    for _ in range(5):
        desk.submit("kind")
        desk.decide()
        desk.answer(worker, seconds=1.0)
    desk.submit("kind", 2)
    assert len(sent_to(desk.decide(), worker)) == 1, "it has become long"
    for _ in range(60):
        desk.answer_all(worker)
        desk.submit("kind")
        desk.decide()
    desk.answer_all(worker)
    desk.submit("kind", 2)
    assert len(sent_to(desk.decide(), worker)) == 2, "it has become short again"


@pytest.mark.parametrize("nonsense", [float("nan"), float("inf"), -1.0, -1e300, 0.0])
def test_a_duration_that_makes_no_sense_does_no_lasting_harm(nonsense: float) -> None:
    desk = Desk()
    worker = desk.worker("a")
    desk.teach(worker, "kind", nonsense)
    for _ in range(60):
        desk.submit("kind")
        desk.decide()
        desk.answer_all(worker, seconds=AHEAD / 10)
    desk.submit("kind", 100)
    assert len(sent_to(desk.decide(), worker)) in (9, 10, 11)


@pytest.mark.parametrize("nonsense", [float("nan"), -1.0, 0.0])
def test_a_duration_that_makes_no_sense_does_not_put_everything_on_one_worker(
    nonsense: float,
) -> None:
    desk = Desk()
    worker = desk.worker("a")
    desk.teach(worker, "kind", nonsense)
    desk.submit("kind", 100 * LARGEST_BATCH)
    desk.decide()
    assert len(worker.held) <= 10 * LARGEST_BATCH


def test_durations_are_kept_of_the_latest_kinds_only() -> None:
    desk = Desk()
    worker = desk.worker("a")
    desk.teach(worker, "first", TINY)
    for number in range(KINDS_REMEMBERED):
        desk.teach(worker, f"other {number}", TINY)
    assert len(desk.scheduler._durations) == KINDS_REMEMBERED
    desk.submit("first", 2)
    assert len(sent_to(desk.decide(), worker)) == 1, "its duration was to be forgotten"


def test_a_second_worker_of_the_same_key_is_refused() -> None:
    desk = Desk()
    desk.worker("a")
    with pytest.raises(ValueError, match="there already"):
        desk.worker("a")


# ----------------------------------------------------------------- cancellation


def test_a_cancelled_job_is_dropped_when_its_turn_comes() -> None:
    desk = Desk()
    first, second = desk.submit("new", 2)
    first.cancelled = True
    worker = desk.worker("a")
    assert sent_to(desk.decide(), worker) == [second]
    assert first.dropped
    assert len(desk.scheduler) == 0


def test_a_worker_stays_idle_when_all_that_waited_was_cancelled() -> None:
    desk = Desk()
    for job in desk.submit("new", 3):
        job.cancelled = True
    worker = desk.worker("a")
    assert desk.decide() == []
    assert desk.scheduler.busy == 0
    (later,) = desk.submit("new")
    assert sent_to(desk.decide(), worker) == [later]


def test_cancelled_jobs_do_not_use_up_an_allowance() -> None:
    desk = Desk()
    worker = desk.worker("a", allowance=1)
    first, second = desk.submit("new", 2)
    first.cancelled = True
    assert sent_to(desk.decide(), worker) == [second]


def test_cancel_queued_returns_what_is_queued_and_leaves_what_was_sent() -> None:
    desk = Desk()
    worker = desk.worker("a")
    sent, *rest = desk.submit("new", 3)
    desk.decide()
    assert desk.scheduler.cancel_queued() == rest
    assert len(desk.scheduler) == 0
    assert [job for job, _ in worker.held.values()] == [sent]


def test_the_spare_worker_is_the_one_that_a_job_would_be_sent_to() -> None:
    desk = Desk()
    assert desk.scheduler.spare_worker() is None
    first, second = desk.worker("a"), desk.worker("b")
    assert desk.scheduler.spare_worker() is second
    assert sent_to(desk.decide(), second) == []
    desk.submit("new")
    assert desk.scheduler.spare_worker() is None, "there is a job that comes first"
    assert sent_to(desk.decide(), second)
    assert desk.scheduler.spare_worker() is first
    desk.submit("new")
    desk.decide()
    assert desk.scheduler.spare_worker() is None


@pytest.mark.parametrize("allowance", [None, 5])
@pytest.mark.parametrize("services", [[DEFAULT_SERVICE], [DEFAULT_SERVICE, "other"], ["other"]])
def test_only_a_worker_without_other_duties_is_spare(
    services: list[str], allowance: int | None
) -> None:
    desk = Desk()
    worker = desk.worker("a", *services, allowance=allowance)
    plain = services == [DEFAULT_SERVICE] and allowance is None
    assert (desk.scheduler.spare_worker() is worker) == plain


def test_a_job_that_was_sent_to_the_spare_worker_is_as_if_it_had_been_queued() -> None:
    desks = [Desk(), Desk()]
    for desk in desks:
        desk.teach(desk.worker("a"), "tiny", TINY)
        (worker,) = desk.scheduler._workers.values()
        if desk is desks[0]:
            assert sent_to((desk.submit("tiny"), desk.decide())[1], worker)
        else:
            desk.scheduler.sent(worker, NamedJob(name=1, kind="tiny"), desk.now)
            assert desk.decide() == []
        assert desk.scheduler.busy == 1
        ((job, expected),) = worker.held.values()
        assert (job.seq, job.worker, job.queued_at, expected) == (2, worker, desk.now, TINY)
        assert desk.scheduler.next_deadline() == desk.now + STALL
        assert sent_to((desk.submit("tiny"), desk.decide())[1], worker), "it is hungry"
        desk.answer_all(worker)
        assert desk.scheduler.busy == 0


# ----------------------------------------------------------------------- recall


def stalled_desk(*, held: int = 4, max_workers: int = 0) -> tuple[Desk, Worker, list[NamedJob]]:
    """One worker whose first job of a kind known to be tiny turns out to be long."""
    desk = Desk(max_workers=max_workers, wanted=min(1, max_workers))
    worker = desk.worker("a")
    desk.teach(worker, "tiny", TINY)
    jobs = desk.submit("tiny", held)
    assert sent_to(desk.decide(), worker) == jobs
    return desk, worker, jobs


@pytest.mark.parametrize("seconds", [0.6 * AHEAD, AHEAD, LONGEST_AHEAD])
def test_one_longer_job_is_sent_ahead_while_there_are_plenty(seconds: float) -> None:
    desk = Desk()
    first, second = desk.worker("a"), desk.worker("b")
    for worker in (first, second):
        desk.teach(worker, "longer", seconds)
    desk.submit("longer", 6)
    assert [len(send.jobs) for send in only(desk.decide(), Send)] == [1, 1, 1, 1]
    # Two run, two wait there, and two are left for whoever comes to them first.
    assert len(first.held) == len(second.held) == 2
    assert len(desk.scheduler) == 2
    desk.answer(first, seconds=seconds)
    assert desk.decide() == []
    desk.answer(first, seconds=seconds)
    assert len(sent_to(desk.decide(), first)) == 1


def test_what_waits_behind_a_longer_job_is_recalled_when_that_takes_twice_its_time() -> None:
    desk = Desk()
    worker = desk.worker("a")
    desk.teach(worker, "longer", LONGEST_AHEAD)
    desk.submit("longer", 4)
    desk.decide()
    assert len(worker.held) == 2
    while desk.now < 100 + 2 * LONGEST_AHEAD - STALL / 100:
        assert desk.decide() == []
        deadline = desk.scheduler.next_deadline()
        assert deadline is not None
        desk.now = deadline
    assert only(desk.decide(), Recall)


def test_behind_a_longer_job_nothing_else_is_sent() -> None:
    desk = Desk()
    worker = desk.worker("a")
    desk.teach(worker, "longer", LONGEST_AHEAD)
    desk.teach(worker, "tiny", TINY)
    (longer,) = desk.submit("longer")
    assert sent_to(desk.decide(), worker) == [longer]
    desk.submit("tiny", 5)
    assert desk.decide() == []


def test_a_cancelled_job_does_not_let_a_long_one_follow() -> None:
    desk = Desk()
    worker = desk.worker("a")
    desk.teach(worker, "tiny", TINY)
    desk.submit("tiny")
    desk.decide()
    (cancelled,) = desk.submit("tiny")
    cancelled.cancelled = True
    desk.submit("long", 5)
    assert only(desk.decide(), Send) == []
    assert len(worker.held) == 1


def test_what_was_sent_ahead_is_recalled_after_a_stall_and_not_before() -> None:
    desk, worker, _ = stalled_desk()
    assert desk.decide(after=STALL * 0.99) == []
    (recall,) = desk.decide(after=STALL * 0.01)
    assert isinstance(recall, Recall)
    assert recall.worker is worker


def test_a_result_is_progress_that_puts_off_the_recall() -> None:
    desk, worker, _ = stalled_desk()
    desk.now += STALL * 0.9
    desk.answer(worker)
    assert desk.decide(after=STALL * 0.9) == []
    assert only(desk.decide(after=STALL * 0.2), Recall)


def test_a_single_job_is_never_recalled() -> None:
    desk, _, _ = stalled_desk(held=1)
    assert desk.decide(after=100.0) == []


def test_jobs_given_back_go_to_the_front_in_their_order() -> None:
    desk, worker, jobs = stalled_desk()
    seqs = desk.recall(worker)
    later = desk.submit("tiny")
    desk.scheduler.recalled(worker, seqs)
    assert queued(desk.scheduler) == [*jobs[1:], *later]
    assert [job for job, _ in worker.held.values()] == jobs[:1]


def test_no_job_overtakes_those_that_may_be_on_their_way_back() -> None:
    desk, worker, jobs = stalled_desk()
    later = desk.submit("tiny", 3)
    seqs = desk.recall(worker)
    desk.answer(worker)  # it goes on, but does not start what is recalled
    assert desk.decide() == []
    desk.scheduler.recalled(worker, seqs[1:])
    assert desk.decide() == []  # it has the second to do
    desk.answer(worker)
    assert sent_to(desk.decide(), worker) == [*jobs[2:], *later]


def test_jobs_given_back_go_to_an_idle_worker() -> None:
    desk, worker, jobs = stalled_desk()
    idle = desk.worker("b")
    seqs = desk.recall(worker)
    desk.scheduler.recalled(worker, seqs)
    assert sent_to(desk.decide(), idle) == jobs[1:]


def test_only_what_the_worker_gives_back_is_taken_from_it() -> None:
    desk, worker, jobs = stalled_desk()
    seqs = desk.recall(worker)
    desk.scheduler.recalled(worker, seqs[1:])  # the first it has started meanwhile
    assert queued(desk.scheduler) == jobs[2:]
    assert [job for job, _ in worker.held.values()] == jobs[:2]


def test_jobs_answered_before_the_recall_is_are_not_queued_again() -> None:
    desk, worker, _ = stalled_desk()
    seqs = desk.recall(worker)
    desk.answer_all(worker)
    desk.scheduler.recalled(worker, seqs)
    assert len(desk.scheduler) == 0
    assert worker.held == {}


def test_a_worker_that_was_recalled_and_answered_all_takes_jobs_again() -> None:
    desk, worker, _ = stalled_desk()
    seqs = desk.recall(worker)
    desk.scheduler.recalled(worker, seqs)
    desk.scheduler.cancel_queued()
    desk.answer(worker)
    jobs = desk.submit("tiny")
    assert sent_to(desk.decide(), worker) == jobs


def test_a_stalled_worker_is_not_sent_again_what_it_has_given_back() -> None:
    desk, worker, _ = stalled_desk(held=2)
    seqs = desk.recall(worker)
    desk.scheduler.recalled(worker, seqs)
    # Sending it once more, only to recall it at once, would go on without end.
    assert desk.decide() == []
    assert desk.decide(after=STALL) == []


def test_results_that_are_seen_with_the_recall_do_not_get_it_more_to_hold_up() -> None:
    desk, worker, jobs = stalled_desk(held=5)
    seqs = desk.recall(worker)
    desk.answer(worker)  # told late; it is in the second one
    desk.decide()
    desk.scheduler.recalled(worker, seqs[1:])
    assert desk.decide() == []
    assert queued(desk.scheduler) == jobs[2:]
    desk.answer(worker)
    assert sent_to(desk.decide(), worker)


def test_a_stalled_worker_is_asked_once_and_not_again_and_again() -> None:
    desk, worker, _ = stalled_desk(held=2)
    assert only(desk.decide(after=STALL), Recall)
    desk.scheduler.recalled(worker, [])  # it had started all, and the results are on their way
    assert desk.decide() == []


def test_a_worker_that_has_gone_on_meanwhile_is_asked_again_after_a_while() -> None:
    # What it has finished may be in its journal only, which is read when it is asked.
    desk, worker, _ = stalled_desk(held=2)
    assert only(desk.decide(after=STALL), Recall)
    desk.scheduler.recalled(worker, [])
    assert only(desk.decide(after=STALL), Recall)


def test_a_worker_long_in_a_job_is_sent_nothing_to_wait_behind_it() -> None:
    desk, _, _ = stalled_desk(held=1)
    desk.submit("tiny")
    assert only(desk.decide(after=2 * STALL), Send) == []


def test_jobs_that_wait_for_each_other_get_a_second_worker() -> None:
    desk, worker, _ = stalled_desk(held=2, max_workers=2)
    seqs = desk.recall(worker)
    desk.scheduler.recalled(worker, seqs)
    assert desk.decide() == [Scale(2)]


def test_a_worker_is_recalled_in_time_whoever_made_progress_later() -> None:
    desk = Desk()
    early = desk.worker("a")
    desk.teach(early, "tiny", TINY)
    desk.submit("tiny")
    assert sent_to(desk.decide(), early)
    started = desk.now
    late = desk.worker("b")
    desk.submit("tiny", 4)
    decisions = desk.decide(after=STALL / 2)
    assert len(sent_to(decisions, early)) == len(sent_to(decisions, late)) == 2
    assert desk.scheduler.next_deadline() == pytest.approx(started + STALL)
    recalls = only(desk.decide(after=STALL / 2 + 1e-9), Recall)
    assert [recall.worker for recall in recalls] == [early]


# ------------------------------------------------------------------ lost workers


def test_a_lost_worker_loses_exactly_the_job_that_it_was_running() -> None:
    desk, worker, jobs = stalled_desk()
    later = desk.submit("tiny")
    running = next(iter(worker.held))
    assert desk.scheduler.worker_lost(worker, running, desk.now) is jobs[0]
    assert queued(desk.scheduler) == [*jobs[1:], *later]
    assert desk.scheduler.busy == 0


def test_without_knowledge_the_first_job_of_a_lost_worker_counts_as_running() -> None:
    desk, worker, jobs = stalled_desk()
    assert desk.scheduler.worker_lost(worker, None, desk.now) is jobs[0]
    assert queued(desk.scheduler) == jobs[1:]


def test_a_lost_worker_that_ran_nothing_loses_nothing() -> None:
    desk, worker, jobs = stalled_desk()
    assert desk.scheduler.worker_lost(worker, 0, desk.now) is None
    assert queued(desk.scheduler) == jobs


def test_a_lost_worker_whose_last_job_is_answered_loses_nothing() -> None:
    desk, worker, jobs = stalled_desk()
    running = next(iter(worker.held))
    desk.answer(worker)
    assert desk.scheduler.worker_lost(worker, running, desk.now) is None
    assert queued(desk.scheduler) == jobs[1:]


def test_an_idle_worker_can_be_lost() -> None:
    desk = Desk()
    worker = desk.worker("a")
    assert desk.scheduler.worker_lost(worker, None, desk.now) is None
    desk.submit("new")
    assert desk.decide() == []


def test_a_lost_workers_key_can_come_back_and_counts_from_one() -> None:
    desk, worker, jobs = stalled_desk()
    desk.scheduler.worker_lost(worker, None, desk.now)
    again = desk.worker("a")
    (send,) = only(desk.decide(), Send)
    assert send.worker is again
    assert [seq for seq, _ in send.jobs] == [1, 2, 3]
    assert [job for _, job in send.jobs] == jobs[1:]


def test_late_messages_of_a_lost_worker_change_nothing() -> None:
    desk, worker, jobs = stalled_desk()
    seqs = list(worker.held)
    desk.scheduler.worker_lost(worker, None, desk.now)
    assert take_result(desk.scheduler, worker, seqs[1], TINY, desk.now) is None
    desk.scheduler.recalled(worker, seqs)
    assert queued(desk.scheduler) == jobs[1:]
    assert desk.decide() == []


# --------------------------------------------------------- drain, allowance, scale


def test_a_draining_worker_finishes_what_it_has_and_gets_nothing_more() -> None:
    desk, worker, _ = stalled_desk(held=2)
    desk.scheduler.drain(worker)
    desk.submit("tiny", 3)
    assert desk.decide() == []
    desk.answer_all(worker)
    assert desk.decide() == []
    assert len(desk.scheduler) == 3


def test_what_a_draining_worker_holds_ahead_is_recalled_too() -> None:
    desk, worker, _ = stalled_desk()
    desk.scheduler.drain(worker)
    assert only(desk.decide(after=STALL), Recall)


def test_a_worker_retires_after_its_allowance_and_only_then() -> None:
    desk = Desk()
    worker = desk.worker("a", allowance=3)
    desk.teach(worker, "tiny", TINY)
    jobs = desk.submit("tiny", 5)
    assert sent_to(desk.decide(), worker) == jobs[:2]
    desk.answer(worker)
    assert desk.decide() == [], "it has one job to do"
    desk.answer(worker)
    assert desk.decide() == [Retire(worker)]
    assert desk.decide() == []
    assert queued(desk.scheduler) == jobs[2:]


def test_jobs_given_back_do_not_count_against_the_allowance() -> None:
    desk = Desk()
    worker = desk.worker("a", allowance=3)
    desk.teach(worker, "tiny", TINY)
    jobs = desk.submit("tiny", 2)
    desk.decide()
    seqs = desk.recall(worker)
    desk.scheduler.recalled(worker, seqs)
    desk.answer(worker)
    decisions = desk.decide()
    assert sent_to(decisions, worker) == jobs[1:]
    assert only(decisions, Retire) == []
    desk.answer(worker)
    assert desk.decide() == [Retire(worker)]


def test_a_worker_lost_before_it_was_asked_to_leave_is_not_asked() -> None:
    desk = Desk()
    worker = desk.worker("a", allowance=1)
    desk.submit("new")
    desk.decide()
    desk.answer(worker)
    desk.scheduler.worker_lost(worker, 0, desk.now)
    assert desk.decide() == []


def test_workers_are_asked_for_as_work_finds_none_up_to_the_maximum() -> None:
    desk = Desk(max_workers=3, wanted=1)
    desk.submit("new")
    assert desk.decide() == [], "one is on its way"
    desk.submit("new")
    assert desk.decide() == [Scale(2)]
    assert desk.scheduler.wanted == 2
    desk.submit("new", 10)
    assert desk.decide() == [Scale(3)]
    desk.submit("new", 10)
    assert desk.decide() == []


def test_busy_workers_count_when_more_are_asked_for() -> None:
    desk = Desk(max_workers=3, wanted=1)
    worker = desk.worker("a")
    desk.submit("new")
    assert only(desk.decide(), Scale) == []
    desk.submit("new")
    assert desk.decide() == [Scale(2)]
    desk.answer(worker)
    assert only(desk.decide(), Scale) == []


def test_one_short_job_after_the_other_needs_one_worker() -> None:
    desk = Desk(max_workers=64, wanted=1)
    worker = desk.worker("a")
    for _ in range(10):
        desk.submit("tiny")
        decisions = desk.decide()
        assert len(decisions) == 1
        assert sent_to(decisions, worker)
        desk.answer(worker)
    assert desk.scheduler.wanted == 1


def test_without_a_group_no_workers_are_asked_for() -> None:
    desk = Desk()
    desk.submit("new", 5)
    assert desk.decide() == []


# -------------------------------------------------------------------- expiry


def test_jobs_expire_after_patience_when_there_is_no_worker() -> None:
    desk = Desk(patience=5.0)
    first = desk.submit("new")
    assert desk.decide(after=2.0) == []
    second = desk.submit("new")
    assert desk.decide(after=2.5) == []
    assert desk.decide(after=0.5) == [Expire(first)]
    assert desk.decide(after=2.0) == [Expire(second)]
    assert len(desk.scheduler) == 0


def test_jobs_do_not_expire_while_a_worker_is_there_however_busy() -> None:
    desk = Desk(patience=5.0)
    desk.worker("a")
    desk.submit("new", 2)
    desk.decide()
    assert desk.decide(after=1000.0) == []
    assert desk.scheduler.next_deadline() is None


def test_patience_begins_when_the_last_worker_leaves() -> None:
    desk = Desk(patience=5.0)
    worker = desk.worker("a")
    _, waiting = desk.submit("new", 2)
    desk.decide()
    desk.now += 1000.0
    desk.scheduler.worker_lost(worker, None, desk.now)
    assert desk.decide(after=4.9) == []
    assert desk.decide(after=0.1 + 1e-6) == [Expire([waiting])]


def test_without_patience_jobs_wait_for_ever() -> None:
    desk = Desk()
    jobs = desk.submit("new")
    assert desk.decide(after=1e9) == []
    assert desk.decide(after=1e9) == []
    assert queued(desk.scheduler) == jobs


# ------------------------------------------------------------------- deadlines


def test_there_is_no_deadline_while_nothing_waits() -> None:
    desk = Desk(patience=5.0)
    assert desk.scheduler.next_deadline() is None
    desk.worker("a")
    assert desk.scheduler.next_deadline() is None


def test_the_deadline_of_a_stall_is_when_the_recall_is_decided() -> None:
    desk, _, _ = stalled_desk()
    deadline = desk.scheduler.next_deadline()
    assert deadline == pytest.approx(desk.now + STALL)
    assert deadline is not None
    assert only(desk.scheduler.decide(deadline), Recall)
    assert desk.scheduler.next_deadline() is None


def test_the_deadline_of_patience_is_when_jobs_expire() -> None:
    desk = Desk(patience=5.0)
    jobs = desk.submit("new")
    deadline = desk.scheduler.next_deadline()
    assert deadline == pytest.approx(desk.now + 5.0)
    assert deadline is not None
    assert desk.scheduler.decide(deadline) == [Expire(jobs)]


# ----------------------------------------------------------------- constant cost


def lines_run(action: Callable[[], object]) -> int:
    """How many lines of the scheduler's file are executed."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != scheduler_module.__file__:
            return None
        count += event == "line"
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(previous)
    return count


def cost_of_a_step(waiting: int, workers: int) -> dict[str, int]:
    """Lines executed by each event among so many busy workers and waiting jobs."""
    desk = Desk(max_workers=workers, wanted=workers, patience=5.0)
    staff = [desk.worker(str(number)) for number in range(workers)]
    desk.submit("new", workers)
    desk.decide()
    desk.submit("new", waiting)
    desk.decide()
    assert len(desk.scheduler) == waiting
    scheduler, worker, now = desk.scheduler, staff[-1], desk.now
    (job,) = [NamedJob(name=0, kind="new")]

    costs = {
        "submit": lines_run(lambda: scheduler.submit(job, now)),
        "decide nothing": lines_run(lambda: scheduler.decide(now)),
        "deadline": lines_run(scheduler.next_deadline),
        "result": lines_run(lambda: desk.answer(worker, seconds=1.0)),
        "decide to send": lines_run(lambda: scheduler.decide(now)),
        "lost": lines_run(lambda: scheduler.worker_lost(staff[0], None, now)),
        "decide after a loss": lines_run(lambda: scheduler.decide(now)),
        "ready": lines_run(lambda: scheduler.worker_ready(b"new", now)),
        "decide to send to a new one": lines_run(lambda: scheduler.decide(now)),
        "drain": lines_run(lambda: scheduler.drain(worker)),
    }
    assert all(costs.values())
    return costs


@pytest.mark.parametrize(("waiting", "workers"), [(100_000, 2), (10, 2000)])
def test_a_step_costs_the_same_however_many_jobs_and_workers(waiting: int, workers: int) -> None:
    assert cost_of_a_step(waiting, workers) == cost_of_a_step(10, 2)


def test_a_step_costs_the_same_however_many_services() -> None:
    def cost(services: int) -> dict[str, int]:
        desk = Desk(patience=5.0)
        worker = desk.worker("w")
        for number in range(services):
            desk.worker(f"busy {number}", f"busy {number}")
            desk.submit("long", 3, f"busy {number}")
            desk.submit("long", 3, f"deserted {number}")
        desk.submit("long", 2)
        desk.decide()
        scheduler, now = desk.scheduler, desk.now
        return {
            "submit": lines_run(lambda: desk.submit("long")),
            "decide nothing": lines_run(lambda: scheduler.decide(now)),
            "deadline": lines_run(scheduler.next_deadline),
            "result": lines_run(lambda: desk.answer(worker, seconds=1.0)),
            "decide to send": lines_run(lambda: scheduler.decide(now)),
        }

    assert cost(500) == cost(1)


def test_a_recall_costs_the_same_however_many_workers() -> None:
    def cost(workers: int) -> int:
        desk = Desk()
        staff = [desk.worker(str(number)) for number in range(workers)]
        desk.teach(staff[0], "tiny", TINY)
        desk.submit("tiny", 3 * workers)
        desk.decide()
        desk.now += STALL / 2
        stalled = next(worker for worker in staff if len(worker.held) > 1)
        for worker in staff:
            if worker is not stalled:
                desk.answer(worker)
        desk.now += STALL / 2
        decisions: list[Decision[NamedJob]] = []
        lines = lines_run(lambda: decisions.extend(desk.decide(after=1e-9)))
        assert [recall.worker for recall in only(decisions, Recall)] == [stalled]
        return lines

    assert cost(2000) == cost(3)


# ------------------------------------------------------------- a simulated world

Work = tuple[int, NamedJob]


class SimulatedWorker:
    """A worker process, and the two channels between it and the master.

    Each channel keeps the order of its messages; between the channels there is none.
    """

    def __init__(self, state: Worker, on_run: Callable[[NamedJob], None]) -> None:
        self.state = state
        self.on_run = on_run
        self.alive = True
        # On the way to the worker, and what it has received:
        self.to_work: deque[list[Work]] = deque()
        self.to_control: deque[list[int] | Literal["drain"]] = deque()
        self.queue: deque[Work] = deque()
        self.draining = False
        # As `Claims`: the number started last, and the numbers given back.
        self.started = 0
        self.given_back: set[int] = set()
        self.running: Work | None = None
        self.runs = 0
        # Finished jobs, as in the journal, and those that no message has yet:
        self.journal: list[tuple[int, float]] = []
        self.unsent: list[tuple[int, float]] = []
        # On the way to the master:
        self.from_work: deque[list[tuple[int, float]] | Literal["goodbye"]] = deque()
        self.from_control: deque[list[int]] = deque()

    def receive_jobs(self) -> None:
        if self.alive and self.to_work:
            self.queue.extend(self.to_work.popleft())

    def obey(self) -> None:
        """Handle one message of the control channel, even while a job runs."""
        if not self.alive or not self.to_control:
            return
        message = self.to_control.popleft()
        if message == "drain":
            self.draining = True
        else:
            won = [seq for seq in message if seq > self.started and seq not in self.given_back]
            self.given_back.update(won)
            self.from_control.append(won)

    def begin(self) -> None:
        """Start the next job that was not given back."""
        while self.alive and self.running is None and self.queue:
            seq, job = self.queue.popleft()
            if seq not in self.given_back:
                assert seq > self.started, "jobs came out of order"
                self.started = seq
                self.running = (seq, job)
                self.runs += 1
                self.on_run(job)

    def finish(self, seconds: float) -> None:
        if self.alive and self.running is not None:
            self.journal.append((self.running[0], seconds))
            self.unsent.append(self.journal[-1])
            self.running = None

    def flush(self) -> None:
        if self.alive and self.unsent:
            self.from_work.append(self.unsent)
            self.unsent = []

    def work(self) -> None:
        """Run all that has come, and tell."""
        while self.alive and self.to_work:
            self.receive_jobs()
        self.begin()
        while self.running is not None:
            self.finish(TINY)
            self.begin()
        self.flush()

    def leave(self) -> None:
        """Say goodbye; what has no result was not started here."""
        if self.alive and self.running is None:
            self.flush()
            self.from_work.append("goodbye")
            self.alive = False


often = st.sampled_from([True, True, True, False])


class World(RuleBasedStateMachine):
    """Any order of what users, workers, wires and clocks can do to a scheduler."""

    @initialize(
        max_workers=st.integers(0, 4),
        patience=st.sampled_from([None, 0.5]),
        lenient=st.booleans(),
        short=st.sets(st.sampled_from(["x", "y"])),
    )
    def begin(
        self, max_workers: int, patience: float | None, lenient: bool, short: set[str]
    ) -> None:
        self.max_workers = max_workers
        self.lenient = lenient
        self.patience = patience
        wanted = min(1, max_workers)
        self.scheduler: Scheduler[NamedJob] = Scheduler(
            max_workers=max_workers,
            wanted=wanted,
            patience=patience,
            lenient=lenient,
            service="a",
        )
        self.kept = wanted
        self.now = 100.0
        self.jobs: list[NamedJob] = []
        self.ends: dict[NamedJob, str] = {}
        self.ran: set[NamedJob] = set()
        self.workers: list[SimulatedWorker] = []
        self.allowances: dict[SimulatedWorker, int | None] = {}
        self.names = 0
        self.retired: list[Worker] = []
        for kind in sorted(short):  # known from work that was done before
            self.scheduler._durations[kind] = TINY

    # ------------------------------------------------------------ the users

    @rule(
        kind=st.sampled_from(["x", "x", "y", "z"]),
        count=st.integers(1, 12),
        priority=st.sampled_from([0, 0, 0, 1, -5]),
        service=st.sampled_from(["a", "a", "a", "b", "c"]),
        decide=often,
    )
    def submit(self, kind: str, count: int, priority: int, service: str, decide: bool) -> None:
        for _ in range(count):
            job = NamedJob(name=len(self.jobs), kind=kind, priority=priority, service=service)
            self.jobs.append(job)
            self.scheduler.submit(job, self.now)
        self.step(decide)

    @precondition(lambda self: self.jobs)
    @rule(index=st.integers(0))
    def cancel(self, index: int) -> None:
        """As `Future.cancel`: it works until the job is sent."""
        job = self.jobs[-1 - index % len(self.jobs)]
        job.cancelled = not job.sent

    @rule()
    def cancel_queued(self) -> None:
        expected = queued(self.scheduler)
        assert self.scheduler.cancel_queued() == expected
        for job in expected:
            self.end(job, "cancelled")

    # ---------------------------------------------------------- the workers

    @precondition(lambda self: len(self.workers) < 5)
    @rule(
        ahead=often,
        allowance=st.sampled_from([None, None, 1, 5]),
        services=st.sampled_from([None, None, ["a"], ["b"], ["b", "a"], ["a", "b", "c"]]),
        decide=often,
    )
    def worker_joins(
        self, ahead: bool, allowance: int | None, services: list[str] | None, decide: bool
    ) -> None:
        """One of the group, or another that offers these services."""
        self.names += 1
        state = self.scheduler.worker_ready(
            str(self.names).encode(),
            self.now,
            services=services or ["a"],
            grouped=services is None,
            ahead=ahead,
            allowance=allowance,
        )
        worker = SimulatedWorker(state, self.job_runs)
        self.workers.append(worker)
        self.allowances[worker] = allowance
        self.step(decide)

    @precondition(lambda self: self.workers)
    @rule(
        index=st.integers(0),
        steps=st.lists(
            st.sampled_from(["receive", "obey", "begin", "finish", "flush"]),
            min_size=1,
            max_size=16,
        ),
        seconds=st.sampled_from([TINY, 1e-4, 4e-4, 0.1]),
    )
    def worker_acts(self, index: int, steps: list[str], seconds: float) -> None:
        worker = self.pick(index)
        for step in steps:
            if step == "receive":
                worker.receive_jobs()
            elif step == "obey":
                worker.obey()
            elif step == "begin":
                worker.begin()
            elif step == "finish":
                worker.finish(seconds)
            else:
                worker.flush()
        if worker.draining and not worker.queue and not worker.to_work:
            worker.leave()

    @precondition(lambda self: any(len(worker.state.held) > 1 for worker in self.workers))
    @rule(index=st.integers(0), done=st.integers(0, 2), late=st.booleans())
    def worker_stalls(self, index: int, done: int, late: bool) -> None:
        """It is long in a job, and asked for those behind it; or it has just gone on."""
        worker = self.pick(index, [w for w in self.workers if len(w.state.held) > 1])
        while worker.alive and worker.to_work:
            worker.receive_jobs()
        for _ in range(done):
            worker.begin()
            worker.finish(TINY)
        worker.begin()
        self.now += STALL
        self.master_decides()
        if late:
            worker.finish(STALL)
            worker.begin()
        worker.obey()

    @precondition(lambda self: self.workers)
    @rule(index=st.integers(0))
    def worker_leaves(self, index: int) -> None:
        self.pick(index).leave()

    @precondition(lambda self: self.workers)
    @rule(index=st.integers(0), knowledge=st.sampled_from(["journal", "nothing"]))
    def worker_crashes(self, index: int, knowledge: str) -> None:
        worker = self.pick(index)
        state = worker.state
        if state.ahead and (knowledge == "journal" or worker.journal):
            self.read_journal(worker)
            running: int | None = worker.started
            expected = worker.running[1] if worker.running else None
        else:
            running = None
            expected = next((job for job, _ in state.held.values()), None)
        self.lose(worker, running, expected)

    def lose(self, worker: SimulatedWorker, running: int | None, expected: NamedJob | None) -> None:
        requeued = [job for job, _ in worker.state.held.values() if job is not expected]
        waiting = queued(self.scheduler)
        assert self.scheduler.worker_lost(worker.state, running, self.now) is expected
        in_order = sorted([*requeued, *waiting], key=lambda job: -job.priority)
        for service in "abc":
            theirs = [job for job in in_order if job.service == service]
            assert [job for job in queued(self.scheduler) if job.service == service] == theirs
        if expected is not None:
            self.end(expected, "lost")
        self.workers.remove(worker)

    # ------------------------------------------------------------ the wires

    @precondition(lambda self: any(worker.from_work for worker in self.workers))
    @rule(index=st.integers(0), decide=often)
    def work_message_arrives(self, index: int, decide: bool) -> None:
        worker = self.pick(index, [worker for worker in self.workers if worker.from_work])
        message = worker.from_work.popleft()
        if message == "goodbye":
            self.lose(worker, 0, None)
            return
        for seq, seconds in message:
            self.receive_result(worker, seq, seconds)
        self.step(decide)

    @precondition(lambda self: any(worker.from_control for worker in self.workers))
    @rule(index=st.integers(0), decide=often)
    def control_message_arrives(self, index: int, decide: bool) -> None:
        worker = self.pick(index, [worker for worker in self.workers if worker.from_control])
        self.scheduler.recalled(worker.state, worker.from_control.popleft())
        self.step(decide)

    @precondition(lambda self: self.workers)
    @rule(index=st.integers(0), offset=st.integers(-3, 3))
    def nonsense_arrives(self, index: int, offset: int) -> None:
        """Results and recalls of jobs that the worker has not, or has no more."""
        worker = self.pick(index)
        state = worker.state
        seqs = [0, -1, state.next_seq + 3 + offset, 2**63, *(seq for seq, _ in worker.journal)]
        seqs = [seq for seq in seqs if seq not in state.held]
        before = queued(self.scheduler), dict(state.held)
        for seq in seqs:
            assert take_result(self.scheduler, state, seq, 1.0, self.now) is None
        self.scheduler.recalled(state, seqs)
        assert (queued(self.scheduler), state.held) == before

    @precondition(lambda self: self.workers)
    @rule(index=st.integers(0))
    def drain(self, index: int) -> None:
        worker = self.pick(index)
        self.scheduler.drain(worker.state)
        worker.to_control.append("drain")

    @precondition(lambda self: self.workers)
    @rule(index=st.integers(0), decide=often)
    def worker_wears_out(self, index: int, decide: bool) -> None:
        self.scheduler.wear_out(self.pick(index).state)
        self.step(decide)

    # ----------------------------------------------------------- the master

    @rule(seconds=st.sampled_from([0.0, 1e-5, 5e-4, STALL, 0.1, 100.0]), decide=often)
    def time_passes(self, seconds: float, decide: bool) -> None:
        self.now += seconds
        self.step(decide)

    @rule()
    def master_decides(self) -> None:
        decisions = self.scheduler.decide(self.now)
        assert self.scheduler.decide(self.now) == [], "not all was decided at once"
        deadline = self.scheduler.next_deadline()
        assert deadline is None or deadline > self.now, "the loop would spin"
        states = [worker.state for worker in self.workers]
        for lane in self.scheduler.lanes():
            if not lane.queue:
                continue
            free = [w for w in states if w.active and not w.held and available(w)]
            assert not any(lane in w.lanes for w in free), "jobs wait although a worker is idle"
            if lane.service == "a":
                group_busy = sum(1 for state in states if state.grouped and state.held)
                needed = min(self.max_workers, group_busy + len(lane.queue))
                assert self.scheduler.wanted >= needed, "jobs wait although workers could start"
            if not lane.workers and self.patience is not None and not self.lenient:
                assert deadline is not None, "nobody will tell that there is no worker"
        for decision in decisions:
            self.carry_out(decision)

    def carry_out(self, decision: Decision[NamedJob]) -> None:
        if isinstance(decision, Expire):
            assert self.patience is not None
            assert not self.lenient
            for job in decision.jobs:
                offered = [lane.service for w in self.workers for lane in w.state.lanes]
                assert job.service not in offered
                assert self.now - job.queued_at >= self.patience
                self.end(job, "expired")
        elif isinstance(decision, Deserted):
            assert self.lenient
            assert decision.service != "a" or not self.max_workers
            waiting = [j for j in queued(self.scheduler) if j.service == decision.service]
            assert decision.jobs == len(waiting)
            offered = [lane.service for w in self.workers for lane in w.state.lanes]
            assert decision.service not in offered
        elif isinstance(decision, Scale):
            aging = sum(worker.state.aging for worker in self.workers)
            assert decision.workers == self.scheduler.wanted + aging
            self.kept = decision.workers
        elif isinstance(decision, Retire):
            assert not decision.worker.held
            assert decision.worker.allowance == 0 or decision.worker.leaving
            assert decision.worker not in self.retired
            self.retired.append(decision.worker)
            if (leaver := self.find(decision.worker)) is not None:
                leaver.to_control.append("drain")
        else:
            worker = self.find(decision.worker)
            assert worker is not None, "a decision about a worker that is lost"
            if isinstance(decision, Send):
                self.check_send(worker, decision)
                services = {lane.service for lane in worker.state.lanes}
                assert {job.service for _, job in decision.jobs} <= services
                worker.to_work.append(decision.jobs)
            else:
                seqs = list(worker.state.held)[1:]
                assert seqs
                worker.to_control.append(seqs)
                if worker.state.ahead:
                    self.read_journal(worker)

    def check_send(self, worker: SimulatedWorker, send: Send[NamedJob]) -> None:
        state = worker.state
        assert state.active
        assert not state.draining
        assert not state.stalled, "it would wait behind a long job"
        assert 1 <= len(send.jobs) <= LARGEST_BATCH
        assert state.ahead or len(state.held) == 1
        assert all(job.sent for _, job in send.jobs)

    # -------------------------------------------------------------- helpers

    def pick(self, index: int, among: Sequence[SimulatedWorker] | None = None) -> SimulatedWorker:
        among = self.workers if among is None else among
        return among[index % len(among)]

    def step(self, decide: bool) -> None:
        """The master decides after each step; several events may be in one."""
        if decide:
            self.master_decides()

    def find(self, state: Worker) -> SimulatedWorker | None:
        return next((worker for worker in self.workers if worker.state is state), None)

    def receive_result(self, worker: SimulatedWorker, seq: int, seconds: float) -> None:
        entry = worker.state.held.get(seq)
        job = take_result(self.scheduler, worker.state, seq, seconds, self.now)
        assert job is (entry[0] if entry else None)
        if job is not None:
            assert job in self.ran
            self.end(job, "done")

    def read_journal(self, worker: SimulatedWorker) -> None:
        """Take all results, although most are known."""
        for seq, seconds in worker.journal:
            self.receive_result(worker, seq, seconds)

    def job_runs(self, job: NamedJob) -> None:
        assert job not in self.ran, f"{job} runs twice"
        assert job not in self.ends, f"{job} runs although it is {self.ends[job]}"
        self.ran.add(job)

    def end(self, job: NamedJob, how: str) -> None:
        assert job not in self.ends, f"{job} was {self.ends[job]} and is now {how}"
        self.ends[job] = how

    # ----------------------------------------------------------- invariants

    @invariant()
    def no_job_is_lost_or_in_two_places(self) -> None:
        places = queued(self.scheduler)
        for worker in self.workers:
            places += [job for job, _ in worker.state.held.values()]
        assert len(places) == len(set(places))
        ended = {job for job in self.jobs if job in self.ends or job.dropped}
        assert set(places) == set(self.jobs) - ended

    @invariant()
    def held_jobs_are_in_the_order_sent(self) -> None:
        for worker in self.workers:
            seqs = list(worker.state.held)
            assert seqs == sorted(seqs)
            assert all(0 < seq < worker.state.next_seq for seq in seqs)

    @invariant()
    def busy_is_the_number_of_workers_with_jobs(self) -> None:
        assert self.scheduler.busy == sum(1 for worker in self.workers if worker.state.held)

    @invariant()
    def groups_agree_with_the_states_of_their_workers(self) -> None:
        scheduler = self.scheduler
        states = {worker.state.key: worker.state for worker in self.workers}
        assert scheduler._workers == states
        assert len(scheduler) == len(queued(scheduler))
        for lane in scheduler.lanes():
            offering = [state for state in states.values() if lane in state.lanes]
            assert lane.workers == len(offering)
            assert offering or lane.queue, "a lane that nobody needs"
            for group in (lane.idle, lane.hungry):
                assert all(states[key] is state for key, state in group.items())
                assert all(lane in state.lanes for state in group.values())
        assert all(states[key] is state for key, state in scheduler._moving.items())
        for key, state in states.items():
            may_take = state.active and available(state)
            for lane in state.lanes:
                assert (key in lane.idle) == (may_take and not state.held)
                if key in lane.hungry:
                    assert may_take
                    assert state.held
                    assert state.ahead
                    one = len(state.held) == 1 and state.load <= LONGEST_AHEAD
                    assert one or state.load < AHEAD / 2
                    assert not state.stalled
            assert (key in scheduler._moving) == (len(state.held) > 0 and not state.stalled)
            assert len(state.held) <= 1 or state.ahead

    @invariant()
    def no_more_workers_are_wanted_than_allowed(self) -> None:
        assert self.scheduler.wanted <= self.max_workers
        group = [worker.state for worker in self.workers if worker.state.grouped]
        assert sum(state.active for state in group) <= self.scheduler.wanted

    @invariant()
    def nobody_stands_by_while_a_place_is_free(self) -> None:
        states = [worker.state for worker in self.workers if worker.state.grouped]
        waiting = [state for state in states if not state.active and available(state)]
        active = sum(state.active for state in states)
        assert not waiting or (self.max_workers and active == self.scheduler.wanted)

    @invariant()
    def no_worker_runs_more_jobs_than_it_is_allowed(self) -> None:
        for worker in self.workers:
            allowance = self.allowances[worker]
            assert allowance is None or worker.runs <= allowance

    @invariant()
    def no_worker_holds_less_than_no_work(self) -> None:
        for worker in self.workers:
            assert worker.state.load > -1e-9
            assert worker.state.held or worker.state.load == 0.0

    # -------------------------------------------------------------- the end

    def teardown(self) -> None:
        """With enough healthy workers and time, all jobs end but those that run on."""
        if not hasattr(self, "scheduler"):
            return
        stuck = [worker for worker in self.workers if worker.running is not None]
        for _ in range(2):
            self.worker_joins(ahead=True, allowance=None, services=["a", "b", "c"], decide=False)
        self.work_until_quiet(except_for=stuck)
        left = [job for job in self.jobs if job not in self.ends and not job.dropped]
        running = [worker.running[1] for worker in stuck if worker.running]
        assert sorted(job.name for job in left) == sorted(job.name for job in running), (
            "jobs are stuck although workers are idle"
        )
        self.work_until_quiet(except_for=[])
        assert all(job in self.ends or job.dropped for job in self.jobs)
        assert self.scheduler.busy == 0
        assert self.scheduler.next_deadline() is None

    def work_until_quiet(self, except_for: Sequence[SimulatedWorker]) -> None:
        """Time goes on, all messages arrive, all workers but these run their jobs."""
        quiet = 0
        for _ in range(20 + 10 * len(self.jobs)):
            before = len(self.ends)
            self.master_decides()
            for worker in list(self.workers):
                while worker.alive and worker.to_control:
                    worker.obey()
                if worker not in except_for:
                    worker.work()
                    if worker.draining:
                        worker.leave()
            while any(worker.from_control for worker in self.workers):
                self.control_message_arrives(0, decide=False)
            while any(worker.from_work for worker in self.workers):
                self.work_message_arrives(0, decide=False)
            deadline = self.scheduler.next_deadline()
            self.now = self.now + TINY if deadline is None else max(self.now, deadline)
            quiet = quiet + 1 if len(self.ends) == before else 0
            if quiet > 10:
                return
        raise AssertionError("the scheduler does not come to rest")


World.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    report_multiple_bugs=False,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestWorld = World.TestCase


# ------------------------------------------------------------------ services


def test_a_job_goes_to_a_worker_that_offers_its_service() -> None:
    desk = Desk()
    plain, square = desk.worker("plain"), desk.worker("square", "square")
    wanted = desk.submit("x", service="square")
    others = desk.submit("x", 2)
    decisions = desk.decide()
    assert sent_to(decisions, square) == wanted
    assert sent_to(decisions, plain) == others[:1]
    desk.answer(square)
    assert only(desk.decide(), Send) == [], "the idle one cannot do what waits"


def test_a_worker_of_several_services_does_them_in_turn() -> None:
    desk = Desk()
    worker = desk.worker("w", "a", "b", "c", ahead=False)
    desk.submit("x", 20, "a")
    desk.submit("x", 2, "b")
    desk.submit("x", 4, "c")
    served = []
    for _ in range(9):
        desk.submit("x", 1, "a")  # what is asked for all the time does not push others aside
        (job,) = sent_to(desk.decide(), worker)
        served.append(job.service)
        desk.answer(worker)
    assert sorted(served[:3]) == sorted(served[3:6]) == ["a", "b", "c"]
    assert sorted(served[6:]) == ["a", "a", "c"]


def test_only_the_jobs_of_a_service_without_workers_expire() -> None:
    desk = Desk(patience=5.0)
    worker = desk.worker("w", "a")
    served = desk.submit("x", 2, "a")
    lonely = desk.submit("x", 2, "b")
    assert sent_to(desk.decide(), worker) == served[:1]
    later = desk.decide(after=4.0) + desk.decide(after=2.0)
    (expired,) = only(later, Expire)
    assert expired.jobs == lonely
    assert queued(desk.scheduler) == served[1:]
    assert only(desk.decide(after=PURGE), Expire) == []
    assert desk.scheduler.next_deadline() is None  # nothing is left to look after


def test_jobs_wait_for_a_service_whose_last_worker_has_left_as_long_as_for_a_new_one() -> None:
    desk = Desk(patience=5.0)
    worker = desk.worker("w", "a", "b")
    desk.submit("x", 1, "a")
    desk.decide()
    (job,) = desk.submit("x", 1, "b")
    desk.now += 100
    desk.scheduler.worker_lost(worker, 0, desk.now)
    assert only(desk.decide(after=4.0), Expire) == []
    (expired,) = only(desk.decide(after=1.5), Expire)
    assert job in expired.jobs


def test_workers_from_elsewhere_come_beside_the_group() -> None:
    desk = Desk(max_workers=2, wanted=1)
    first, second = desk.worker("g1"), desk.worker("g2")
    remote = [desk.worker(f"r{number}", grouped=False) for number in range(3)]
    jobs = desk.submit("x", 6)
    decisions = desk.decide()
    assert all(len(sent_to(decisions, worker)) == 1 for worker in (first, second, *remote))
    assert queued(desk.scheduler) == jobs[5:]
    assert desk.scheduler.wanted == 2
    assert only(desk.decide(), Scale) == []


def test_a_worker_from_elsewhere_has_no_successor() -> None:
    desk = Desk(max_workers=1, wanted=1)
    worker = desk.worker("r", grouped=False, allowance=1)
    desk.submit("x")
    assert only(desk.decide(), Scale) == []
    desk.answer(worker)
    (retire,) = only(desk.decide(), Retire)
    assert retire.worker is worker


def test_a_lenient_scheduler_says_that_nobody_offers_a_service() -> None:
    scheduler: Scheduler[NamedJob] = Scheduler(patience=5.0, lenient=True)
    (job, other) = (NamedJob(name=number, kind="x", service="gpu") for number in range(2))
    scheduler.submit(job, 100.0)
    assert scheduler.decide(104.0) == []
    assert scheduler.decide(105.0) == [Deserted("gpu", 1)]
    assert scheduler.decide(190.0) == []
    scheduler.submit(other, 200.0)
    assert scheduler.decide(204.0) == []
    assert scheduler.decide(205.0) == [Deserted("gpu", 2)]
    worker = scheduler.worker_ready(b"w", 300.0, services=["gpu"])
    (send,) = scheduler.decide(300.0)
    assert isinstance(send, Send)
    assert send.worker is worker
    assert [job for _, job in send.jobs] == [job]


def test_unwanted_jobs_do_not_stay_where_no_worker_comes() -> None:
    desk = Desk(max_workers=1, wanted=1)
    kept, unwanted = desk.submit("x", 2, service="gpu")
    (started,) = desk.submit("x")
    unwanted.cancelled = started.cancelled = True
    deadline = desk.scheduler.next_deadline()
    assert deadline is not None
    desk.scheduler.decide(deadline)
    assert queued(desk.scheduler) == [kept]
    kept.cancelled = True
    desk.scheduler.drop_unwanted(deadline)
    assert len(desk.scheduler) == 0
    assert desk.scheduler.next_deadline() is None


def test_what_is_kept_at_a_shutdown_is_the_groups() -> None:
    desk = Desk(max_workers=2, wanted=1)
    special = desk.submit("x", 2, service="gpu")
    first, second = desk.submit("x", 2)
    assert desk.scheduler.cancel_queued(keep=1) == [*special, second]
    assert queued(desk.scheduler) == [first]


def test_a_worn_worker_from_elsewhere_leaves_at_once() -> None:
    desk = Desk(max_workers=1, wanted=1)
    own, other = desk.worker("own"), desk.worker("other", grouped=False)
    desk.scheduler.wear_out(other)
    (retire,) = only(desk.decide(), Retire)
    assert retire.worker is other
    desk.scheduler.wear_out(own)
    (scale,) = only(desk.decide(), Scale)
    assert scale.workers == 2
    desk.worker("successor")
    (retire,) = only(desk.decide(), Retire)
    assert retire.worker is own
