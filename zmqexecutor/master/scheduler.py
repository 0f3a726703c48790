"""Which worker runs which job: pure state, no sockets, no threads, no clock.

Events go in through methods, with the time as an argument; decisions come out of
`decide`, for the master to carry out:

    submit, sent, worker_ready, results, recalled, worker_lost ──► decide(now) ──► Send
                                                                                   Recall
                                                                                   Scale
                                                                                   Expire
The life of a job:

    queued ──► held by a worker ──► done
      ▲               │
      └── recalled ───┘   or its worker died before it was started

A worker holds the job that it runs and, behind it, jobs sent ahead so that it
never waits for the master between two short ones. It is given about a
millisecond's worth (`AHEAD`), judged by how long jobs of the same kind took
lately, and how much there is to send. While there are plenty it is also given one job
of up to `LONGEST_AHEAD`; those of an unknown kind, or longer ones, are sent one at a
time. When a worker with jobs ahead shows no progress for `STALL` seconds, or twice the
time that it was expected to need, they are recalled: one of them would otherwise wait
behind a job that turned out to be long.

No more than `wanted` workers are active, that is, sent jobs. A worker near the end
of its life (its allowance of jobs, or worn out) gets a successor that is started
while it still works, stands by when it is ready, and takes over when it retires:

    standing by ──► active ──► aging ──► retired

That is so for the master's own group; workers that come from elsewhere are active at
once, as many as there are.

Each job asks for a service, and each worker offers some. What waits for a service, and
who could take it, is a `Lane` of its own, so that no service waits for another's workers.
Workers that offer several serve their lanes in turn.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Final, Generic, TypeAlias, TypeVar

import msgspec

from ..wire.protocol import DEFAULT_SERVICE, Result
from .lanes import Job, Lane, WorkerState

__all__ = [
    "Decision",
    "Deserted",
    "Expire",
    "Recall",
    "Retire",
    "Scale",
    "Scheduler",
    "Send",
]

AHEAD: Final = 0.001
"""Seconds of expected work that a worker may hold."""
LONGEST_AHEAD: Final = 0.005
"""Seconds that a single job may be expected to take which is sent ahead."""
STALL: Final = 0.002
"""Seconds without progress after which what was sent ahead is recalled."""
LARGEST_BATCH: Final = 256
"""Jobs in one message, however short they are."""
KINDS_REMEMBERED: Final = 4096
"""Kinds of job whose usual duration is kept, the latest that were new."""
LEAD: Final = 1.0
"""Seconds that a successor may need to get ready."""
PURGE: Final = 6.0
"""Seconds after which unwanted jobs are looked for that wait without any worker."""
WEIGHT_OF_LATEST: Final = 0.3
"""Weight of the latest duration in the moving average of its kind."""
TRAVEL: Final = 2.5e-9
"""Seconds that a byte of a job is expected to take on its way, which count as work."""


J = TypeVar("J", bound=Job)


class Send(msgspec.Struct, Generic[J]):
    """Send these jobs, numbered as given, to this worker."""

    worker: WorkerState[J]
    jobs: list[tuple[int, J]]


class Recall(msgspec.Struct, Generic[J]):
    """Take back what this worker has not started."""

    worker: WorkerState[J]


class Retire(msgspec.Struct, Generic[J]):
    """This worker has done all the jobs it was allowed, or is worn out; let it leave."""

    worker: WorkerState[J]


class Scale(msgspec.Struct):
    """Keep this many workers from now on, successors included."""

    workers: int


class Expire(msgspec.Struct, Generic[J]):
    """These jobs waited too long without any worker."""

    jobs: list[J]


class Deserted(msgspec.Struct, frozen=True):
    """So many jobs wait on for a service that no worker offers."""

    service: str
    jobs: int


_SHORTEST: Final = AHEAD / 1000
_UNKNOWN: Final = 1.0  # seconds; longer than any job that is sent ahead

Decision: TypeAlias = Send[J] | Recall[J] | Retire[J] | Scale | Expire[J] | Deserted


class Scheduler(Generic[J]):
    """Jobs and workers, and what to do next.

    Every step costs the same however many jobs wait and workers there are.
    """

    def __init__(
        self,
        *,
        max_workers: int = 0,
        wanted: int = 0,
        patience: float | None = None,
        lenient: bool = False,
        service: str = DEFAULT_SERVICE,
    ) -> None:
        """Start empty.

        Args:
            wanted: how many workers of the group are being started already.
            max_workers: how many workers of the group may be active; 0 without a group.
            patience: seconds that a job waits while no worker at all offers its
                service, or None to wait without a limit.
            lenient: whether it waits on after that, and `Deserted` tells; not for the
                group's service, whose workers are being started.
            service: what the group's workers offer.
        """
        self._max_workers = max_workers
        self._patience = patience
        self._lenient = lenient
        self.wanted = wanted
        self._lanes: dict[str, Lane[J]] = {}
        self._service = service
        # Lanes with jobs for which a worker may be found:
        self._servable: dict[Lane[J], None] = {}
        # Lanes with jobs, and without any worker:
        self._deserted: dict[Lane[J], None] = {}
        self._expiry: float | None = None  # no job of theirs expires before that
        self._purge_at: float | None = None  # when to look for unwanted jobs of those
        self._length = 0  # jobs in all lanes
        self._workers: dict[bytes, WorkerState[J]] = {}
        # Busy workers that have not stalled, longest without progress first:
        self._moving: OrderedDict[bytes, WorkerState[J]] = OrderedDict()
        self._busy = 0  # workers that hold a job
        # Of the group:
        self._group_busy = 0
        self._active = 0  # workers that may be sent jobs
        self._standing_by: OrderedDict[bytes, WorkerState[J]] = OrderedDict()
        self._worn: OrderedDict[bytes, WorkerState[J]] = OrderedDict()
        self._successors = 0  # how many workers are aging
        self._kept = wanted  # how many the last `Scale` asked for
        self._retiring: list[WorkerState[J]] = []
        self._durations: OrderedDict[Hashable, float] = OrderedDict()

    def __len__(self) -> int:
        """How many jobs are queued."""
        return self._length

    @property
    def busy(self) -> int:
        """How many workers hold a job."""
        return self._busy

    def lanes(self) -> Iterable[Lane[J]]:
        """One for each service that is offered or asked for."""
        return self._lanes.values()

    # ------------------------------------------------------------------ events

    def submit(self, job: J, now: float) -> None:
        """A job arrives."""
        job.queued_at = now
        lane = self._lanes.get(job.service) or self._new_lane(job.service, now)
        lane.queue.append(job)
        self._length += 1
        if lane.workers:
            self._servable[lane] = None
        else:
            self._desert(lane, now)

    @property
    def starting(self) -> int:
        """How many of the wanted workers are not there yet."""
        return max(0, self.wanted - self._active)

    def cancel_queued(self, keep: int = 0) -> list[J]:
        """Take all queued jobs away, but the first `keep` for the group; return them."""
        jobs: list[J] = []
        for lane in list(self._lanes.values()):
            kept = min(keep, len(lane.queue)) if lane.service == self._service else 0
            taken = [lane.queue.take_last() for _ in range(len(lane.queue) - kept)]
            jobs += reversed(taken)
            self._shrunk(lane, len(taken))
        return jobs

    def spare_worker(self) -> WorkerState[J] | None:
        """The worker that a job for the group would be sent to if it came now.

        None if the group must know of each job when it is sent, to have a successor started.
        """
        lane = self._lanes.get(self._service)
        if lane is None or self._length or not lane.idle:
            return None
        worker = next(reversed(lane.idle.values()))
        return worker if len(worker.lanes) == 1 and worker.allowance is None else None

    def sent(self, worker: WorkerState[J], job: J, now: float) -> None:
        """A job has been sent to the spare worker without having been queued."""
        job.queued_at = now
        self._progress(worker, now)
        job.worker, job.seq, expected = worker, worker.next_seq, self._expected(job)
        worker.held[job.seq] = (job, expected)
        worker.load += expected
        worker.next_seq += 1
        self.settle(worker)

    def worker_ready(
        self,
        key: bytes,
        now: float,
        *,
        services: Iterable[str] = (DEFAULT_SERVICE,),
        grouped: bool = True,
        ahead: bool = True,
        allowance: int | None = None,
    ) -> WorkerState[J]:
        """A worker may be sent jobs.

        Args:
            key: names the worker.
            now: the time.
            services: what it offers.
            grouped: whether it is one of the master's own group, if there is one.
            ahead: whether it may be sent jobs ahead of the one it runs.
            allowance: how many jobs it may be sent in its life, or None.

        Raises:
            ValueError: a worker of this key is there already.
        """
        if key in self._workers:
            raise ValueError(f"worker {key!r} is there already")
        worker: WorkerState[J] = WorkerState(
            key,
            [
                self._lanes.get(name) or self._new_lane(name, now)
                for name in dict.fromkeys(services)
            ],
            grouped=grouped and self._max_workers > 0,
            ahead=ahead,
            allowance=allowance,
        )
        worker.progress = now
        self._workers[key] = worker
        for lane in worker.lanes:
            lane.workers += 1
            self._deserted.pop(lane, None)
        if worker.grouped:
            self._standing_by[key] = worker
            self._fill_up()
            self._relieve()
        else:
            worker.active = True
            self.settle(worker)
        return worker

    def results(
        self, worker: WorkerState[J], results: Iterable[Result], now: float
    ) -> list[J | None]:
        """A worker has answered jobs. Return each of them; None for one that it did not hold."""
        jobs: list[J | None] = []
        held, durations, load, progress = worker.held, self._durations, worker.load, False
        for result in results:
            entry = held.pop(result.seq, None)
            if entry is None:
                jobs.append(None)
                continue
            job, expected = entry
            job.worker = None
            jobs.append(job)
            load -= expected
            progress = True
            # Whatever a worker claims, NaN too: what counts lies between these two.
            seconds = result.seconds if result.seconds > _SHORTEST else _SHORTEST
            if seconds > _UNKNOWN:
                seconds = _UNKNOWN
            usual = durations.get(job.kind, seconds)
            durations[job.kind] = usual + WEIGHT_OF_LATEST * (seconds - usual)
        worker.load = load if held else 0.0
        while len(durations) > KINDS_REMEMBERED:
            durations.popitem(last=False)
        if progress:
            self._progress(worker, now)
        self.settle(worker)
        return jobs

    def recalled(self, worker: WorkerState[J], seqs: Iterable[int]) -> None:
        """A worker will not run these jobs; they go to the front."""
        worker.recalling = False
        self._requeue(worker, [seq for seq in seqs if seq in worker.held])
        if len(worker.held) > 1:
            # It has gone on meanwhile; ask again if the results do not come.
            self._progress(worker, worker.progress)
        else:
            # Results that were seen only now are no sign that it goes on.
            worker.stalled = bool(worker.held)
        self.settle(worker)

    def drain(self, worker: WorkerState[J]) -> None:
        """Send this worker no more jobs."""
        worker.draining = True
        self.settle(worker)
        self._retire(worker)

    def wear_out(self, worker: WorkerState[J]) -> None:
        """Replace this worker as soon as a successor is ready; it goes on until then."""
        if worker.draining or worker.key in self._worn:
            return
        if not worker.grouped:
            worker.leaving = True  # whoever has started it may start another
            self.settle(worker)
        else:
            self._worn[worker.key] = worker
            self._age(worker)
            self._relieve()

    def worker_lost(self, worker: WorkerState[J], running: int | None, now: float) -> J | None:
        """A worker is gone. What it had not started goes back to the front.

        Args:
            worker: the worker.
            running: the sequence number of the job that it was running, 0 if none,
                or None if nobody knows: then the first one that it held counts.
            now: the time.

        Returns:
            The job that it was running and that must not run again, if any.
        """
        if running is None:
            running = next(iter(worker.held), 0)
        lost = worker.release(running)
        self._requeue(worker, list(worker.held))
        worker.draining = True  # so that it goes into no group again
        self.settle(worker)
        del self._workers[worker.key]
        self._retire(worker)
        for lane in worker.lanes:
            lane.workers -= 1
            if not lane.workers:
                lane.alone_since = now
                self._shrunk(lane, 0)
                if lane.queue:
                    self._servable.pop(lane, None)
                    self._desert(lane, now)
        return lost

    def drop_unwanted(self, now: float) -> None:
        """Drop jobs that nobody wants any more, where no worker comes to find that out."""
        self._purge_at = None
        for lane in list(self._lanes.values()):
            if lane.workers:
                continue
            waiting = [lane.queue.take_first() for _ in range(len(lane.queue))]
            wanted = [job for job in waiting if job.wanted() or job.start()]
            lane.queue.put_back(wanted)
            self._shrunk(lane, len(waiting) - len(wanted))
            if lane.queue:
                self._purge_at = now + PURGE

    def want(self, workers: int) -> None:
        """Have at least so many workers of the group, as far as there may be."""
        self.wanted = max(self.wanted, min(workers, self._max_workers))
        self._fill_up()

    # --------------------------------------------------------------- decisions

    def decide(self, now: float) -> list[Decision[J]]:
        """What to do next. Decisions count as carried out."""
        decisions: list[Decision[J]] = []
        if self._moving:
            self._recall_stalled(now, decisions)
        if self._servable:
            self._assign(now, decisions)
        if self._retiring:
            decisions += [
                Retire(worker) for worker in self._retiring if worker.key in self._workers
            ]
            self._retiring.clear()
        if self._length and self._want_workers():
            self._assign(now, decisions)
        if self._purge_at is not None and self._purge_at <= now:
            self.drop_unwanted(now)
        if self._expiry is not None and self._expiry <= now:
            self._expire(now, decisions)
        if self._kept != self.wanted + self._successors:
            self._kept = self.wanted + self._successors
            decisions.append(Scale(self._kept))
        return decisions

    def next_deadline(self) -> float | None:
        """When `decide` must be called again, even if nothing happens."""
        deadline = None
        if self._moving:
            deadline = next(iter(self._moving.values())).progress + STALL
        for other in (self._expiry, self._purge_at):
            if other is not None:
                deadline = other if deadline is None else min(deadline, other)
        return deadline

    def _assign(self, now: float, decisions: list[Decision[J]]) -> None:
        while self._servable:
            self._assign_from(next(iter(self._servable)), now, decisions)

    def _assign_from(self, lane: Lane[J], now: float, decisions: list[Decision[J]]) -> None:
        queue, idle, hungry = lane.queue, lane.idle, lane.hungry
        takers = len(idle) + len(hungry)
        while queue:
            source = lane
            if idle:
                worker = next(reversed(idle.values()))  # its caches are the warmest
                if len(worker.lanes) > 1:
                    source = self._turn(worker)
            elif hungry and self._fits(next(iter(hungry.values())), lane):
                worker = next(iter(hungry.values()))
                hungry.move_to_end(worker.key)
            else:
                break
            # Spread what waits evenly over those that could take some of it.
            share = -(-len(queue) // max(1, takers))
            takers -= 1
            if not worker.held:
                self._progress(worker, now)
            if batch := self._take_batch(worker, source, min(share, LARGEST_BATCH)):
                decisions.append(Send(worker, batch))
            self.settle(worker)
        self._servable.pop(lane, None)  # nobody can take any more of it for now

    def _fits(self, worker: WorkerState[J], lane: Lane[J]) -> bool:
        """Whether the lane's first job can be sent to a worker that holds others."""
        expected = self._expected(lane.queue.front[0])
        if expected <= AHEAD / 2:
            return worker.load < AHEAD / 2
        # Not the last ones: they could wait there while another worker is idle.
        plenty = len(lane.queue) > lane.workers
        return plenty and expected <= LONGEST_AHEAD and len(worker.held) == 1

    def _turn(self, worker: WorkerState[J]) -> Lane[J]:
        """The lane that an idle worker serves next, of several: what it serves goes last."""
        lane = next(lane for lane in worker.lanes if lane.queue)
        worker.lanes.remove(lane)
        worker.lanes.append(lane)
        return lane

    def _take_batch(self, worker: WorkerState[J], lane: Lane[J], limit: int) -> list[tuple[int, J]]:
        batch: list[tuple[int, J]] = []
        queue, held, before = lane.queue, worker.held, len(lane.queue)
        durations, load, seq, expected = self._durations, worker.load, worker.next_seq, 0.0
        if worker.allowance is not None:
            limit = min(limit, worker.allowance)
        while (front := queue.front) and len(batch) < limit:
            job = front[0]
            expected = durations.get(job.kind, _UNKNOWN) + job.size * TRAVEL
            if batch:
                if expected > AHEAD / 2 or load + expected > AHEAD:
                    break
            elif held and not self._fits(worker, lane):
                break
            queue.take_first()
            if not job.start():
                continue
            job.worker, job.seq = worker, seq
            held[seq] = (job, expected)
            batch.append((seq, job))
            seq += 1
            load += expected
            if expected > AHEAD / 2 or not worker.ahead:
                break
        worker.load, worker.next_seq = load, seq
        self._shrunk(lane, before - len(queue))
        if worker.allowance is not None:
            worker.allowance -= len(batch)
            if batch and not worker.aging and worker.allowance * expected < LEAD:
                self._age(worker)
        return batch

    def _recall_stalled(self, now: float, decisions: list[Decision[J]]) -> None:
        while self._moving:
            worker = next(iter(self._moving.values()))
            if worker.progress + STALL > now:
                return
            held = worker.held
            if len(held) > 1 and worker.waited + STALL < 2 * next(iter(held.values()))[1]:
                worker.waited += STALL
                worker.progress = now
                self._moving.move_to_end(worker.key)
                continue
            worker.stalled = True
            worker.progress = now
            if len(held) > 1:
                worker.recalling = True
                decisions.append(Recall(worker))
            self.settle(worker)

    def _want_workers(self) -> bool:
        """Want as many as there is work for, and say if some stood by."""
        if self.wanted >= self._max_workers or (lane := self._lanes.get(self._service)) is None:
            return False
        wanted = min(self._max_workers, self._group_busy + len(lane.queue))
        if wanted <= self.wanted:
            return False
        self.wanted = wanted
        active = self._active
        self._fill_up()
        return self._active > active

    def _expire(self, now: float, decisions: list[Decision[J]]) -> None:
        assert self._patience is not None
        self._expiry = None
        expired: list[J] = []
        for lane in list(self._deserted):
            over = lane.alone_since + self._patience <= now
            if over and self._lenient:
                del self._deserted[lane]  # until the next job comes
                decisions.append(Deserted(lane.service, len(lane.queue)))
                continue
            if over:
                before = len(lane.queue)
                waiting = [lane.queue.take_first() for _ in range(before)]
                expired += [job for job in waiting if job.queued_at + self._patience <= now]
                lane.queue.put_back([j for j in waiting if j.queued_at + self._patience > now])
                self._shrunk(lane, before - len(lane.queue))
            if lane.queue:
                oldest = min(job.queued_at for job in lane.queue.oldest())
                expiry = max(oldest, lane.alone_since) + self._patience
                self._expiry = expiry if self._expiry is None else min(self._expiry, expiry)
        if expired:
            decisions.append(Expire(expired))

    # ---------------------------------------------------------------- internal

    def settle(self, worker: WorkerState[J]) -> None:
        """Put a worker into the groups where it belongs after a change."""
        key, held = worker.key, len(worker.held)
        if worker.busy != (held > 0):
            worker.busy = held > 0
            self._busy += 1 if held else -1
            self._group_busy += worker.grouped * (1 if held else -1)
        spent = worker.leaving or worker.allowance == 0
        may_take = worker.active and not worker.draining and not spent
        idle = may_take and not held
        hungry = (
            may_take
            and held
            and worker.ahead
            and not worker.stalled
            and not worker.recalling
            and (worker.load < AHEAD / 2 or (held == 1 and worker.load <= LONGEST_AHEAD))
        )
        for lane in worker.lanes:
            if idle:
                lane.idle[key] = worker
            else:
                lane.idle.pop(key, None)
            if hungry:
                lane.hungry[key] = worker
            else:
                lane.hungry.pop(key, None)
            if (idle or hungry) and lane.queue:
                self._servable[lane] = None
        if held == 0 or worker.stalled:
            self._moving.pop(key, None)
        if spent and not held and not worker.draining:
            worker.draining = True
            self._retiring.append(worker)
            self._retire(worker)

    def _age(self, worker: WorkerState[J]) -> None:
        """Have a successor started."""
        if worker.grouped and not worker.aging:
            worker.aging = True
            self._successors += 1

    def _retire(self, worker: WorkerState[J]) -> None:
        """It will not be sent jobs any more; another takes its place, if one stands by."""
        self._standing_by.pop(worker.key, None)
        self._worn.pop(worker.key, None)
        self._successors -= worker.aging
        self._active -= worker.active and worker.grouped
        worker.aging = worker.active = False
        self._fill_up()

    def _relieve(self) -> None:
        """Let a worker that is worn out go, if another stands by."""
        if self._worn and self._standing_by:
            worker = self._worn.popitem(last=False)[1]
            worker.leaving = True
            self.settle(worker)

    def _fill_up(self) -> None:
        """Make as many workers active as are wanted."""
        while self._standing_by and self._active < self.wanted:
            worker = self._standing_by.popitem(last=False)[1]
            worker.active = True
            self._active += 1
            self.settle(worker)

    def _progress(self, worker: WorkerState[J], now: float) -> None:
        worker.progress = now
        worker.stalled = False
        worker.waited = 0.0
        self._moving[worker.key] = worker
        self._moving.move_to_end(worker.key)

    def _requeue(self, worker: WorkerState[J], seqs: list[int]) -> None:
        jobs = [job for seq in seqs if (job := worker.release(seq)) is not None]
        if worker.allowance is not None:
            worker.allowance += len(jobs)
        for lane in worker.lanes:
            if back := [job for job in jobs if job.service == lane.service]:
                lane.queue.put_back(back)
                self._length += len(back)
                self._servable[lane] = None

    def _new_lane(self, service: str, now: float) -> Lane[J]:
        lane = self._lanes[service] = Lane(service, now)
        return lane

    def _desert(self, lane: Lane[J], now: float) -> None:
        """It has jobs, and no worker from now on, or for this new job."""
        if self._purge_at is None:
            self._purge_at = now + PURGE
        if self._lenient and self._max_workers and lane.service == self._service:
            return
        self._deserted[lane] = None
        if self._expiry is None and self._patience is not None:
            self._expiry = now + self._patience  # whatever came before is in it already

    def _shrunk(self, lane: Lane[J], taken: int) -> None:
        """Jobs have left the queue of a lane, or its last worker the lane."""
        self._length -= taken
        if not lane.queue:
            self._deserted.pop(lane, None)
            self._servable.pop(lane, None)
            if not lane.workers:
                del self._lanes[lane.service]

    def _expected(self, job: J) -> float:
        return self._durations.get(job.kind, _UNKNOWN) + job.size * TRAVEL
