"""What is sent to workers: the scheduler's decisions, confirmations, what to forget."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ..errors import NoWorkerError
from ..wire import protocol
from ..wire.protocol import DEFAULT_SERVICE, Frame, shown
from .fleet import Fleet
from .offers import Offer
from .peers import Peer
from .recalls import Recalls
from .roster import Roster
from .scheduler import Decision, Deserted, Expire, Recall, Retire, Scale, Send
from .stops import Stops
from .tasks import Task

__all__ = ["Dispatcher"]

logger = logging.getLogger(__name__)


class Dispatcher:
    """Used by the master thread only."""

    def __init__(
        self,
        roster: Roster,
        fleet: Fleet,
        stops: Stops,
        recalls: Recalls,
        *,
        lose: Callable[[Peer, int | None], None],
        read_journal: Callable[[Peer], None],
        endpoint: str,
        patience: float | None,
    ) -> None:
        """Begin with nothing to be told.

        Args:
            roster: the workers there are.
            fleet: the group, which is scaled.
            stops: is told which tasks with a time limit were sent.
            recalls: takes jobs back.
            lose: called with a worker that cannot be sent anything, and 0 if it is known
                that it was running nothing.
            read_journal: takes a worker's results that have not come as messages.
            endpoint: where more workers could register, for messages to people.
            patience: seconds that jobs wait without a worker, for the same.
        """
        self._roster = roster
        self._fleet = fleet
        self._stops = stops
        self._recalls = recalls
        self._lose = lose
        self._read_journal = read_journal
        self._endpoint = endpoint
        self._patience = patience
        self._unconfirmed: set[Peer] = set()  # workers that wait for a confirmation
        self._forgetful: set[Peer] = set()  # busy ones that have shares nobody needs

    # ---------------------------------------------------------------- decisions

    def carry_out(self, decision: Decision[Task]) -> None:
        """Do what the scheduler has decided."""
        if isinstance(decision, Send):
            self._send_jobs(decision)
        elif isinstance(decision, Recall):
            if (peer := self._roster.get(decision.worker.key)) is not None:
                self._recalls.ask(peer)
                # What it finished before must not wait for a job that turned out to be long.
                self._read_journal(peer)
        elif isinstance(decision, Retire):
            if (peer := self._roster.get(decision.worker.key)) is not None:
                peer.tell(protocol.Drain())
                self._roster.should_end(peer)
        elif isinstance(decision, Scale):
            self._fleet.scale(decision.workers)
        elif isinstance(decision, Expire):
            for task in decision.jobs:
                task.fail(NoWorkerError(self._nobody_for(task.service)))
        elif isinstance(decision, Deserted):
            logger.warning(
                "%d tasks wait for service %r, which no worker at %s offers; start one there",
                decision.jobs,
                shown(decision.service),
                self._endpoint,
            )

    def _nobody_for(self, service: str) -> str:
        """Why jobs that ask for this service cannot be done."""
        offered = sorted({name for peer in self._roster for name in peer.hello.services})
        who = "no worker" if service == DEFAULT_SERVICE else f"no worker for service {service!r}"
        return (
            f"{who} registered at {self._endpoint} within "
            f"{self._patience:g} s; start workers there, or allow more time"
            + (f". Those that are there offer {', '.join(offered)}" if offered else "")
        )

    def _send_jobs(self, decision: Send[Task]) -> None:
        peer = self._roster.get(decision.worker.key)
        if peer is None:
            return  # lost while earlier decisions were carried out: its jobs are queued again
        jobs: list[protocol.Job] = []
        shared: list[protocol.Shared] = []
        forget = peer.take_forgotten()
        frames: list[Frame] = []
        limited = False
        for seq, task in decision.jobs:
            limited |= task.options.timeout is not None
            key = b""
            if task.shared is not None:
                key = task.shared.key
                peer.introduce(task.shared, shared, forget)
            for share in task.shares:
                peer.introduce_share(share, shared)
            segment, buffers = task.ship(mapped=peer.maps_segments)
            service = task.service if len(peer.hello.services) > 1 else ""
            jobs.append(
                protocol.Job(
                    seq, task.id, task.data, task.codec, key, len(buffers), segment, service
                )
            )
            frames += buffers
        if not peer.send_jobs(jobs, shared, forget, frames):
            # Without a journal it held nothing but this, which has not left.
            self._lose(peer, None if peer.journal else 0)
        else:
            peer.sent_at = time.monotonic()
            if limited:
                self._stops.sent(peer, [task for _, task in decision.jobs], peer.sent_at)
        self.nothing_to_tell(peer)

    def take_up(self, offer: Offer, task: Task) -> None:
        """A thread has taken an offer for this task; the scheduler knows that it is sent."""
        peer = offer.peer
        assert peer.journal
        assert peer.state
        if task.shared is not None:
            peer.introduce(task.shared, [], [])
        if offer.sent or peer.journal.running >= task.seq:  # the thread may not know it yet
            peer.posted()
        else:
            self._send_jobs(Send(peer.state, [(task.seq, task)]))

    # ------------------------------------------------- confirmations, forgetting

    def waits(self, peer: Peer) -> None:
        """A worker waits until it is told that its results have come."""
        self._unconfirmed.add(peer)

    def forget_share(self, key: bytes) -> None:
        """Nobody has this shared object any more."""
        for peer in self._roster:
            if peer.forget_share(key):
                self._forgetful.add(peer)
                self.settle(peer)

    def settle(self, peer: Peer) -> None:
        """A worker may have nothing to do now, and time to forget.

        A busy one could not heed it yet; it is told with its next jobs, or when it is idle.
        """
        if peer in self._forgetful and peer.state and not peer.state.held:
            self._unconfirmed.add(peer)

    def confirm(self) -> None:
        """Tell workers how far their results have come, and the idle ones what to forget."""
        while self._unconfirmed:
            peer = self._unconfirmed.pop()
            self._forgetful.discard(peer)
            if not peer.send_jobs([], [], peer.take_forgotten()):
                self._lose(peer, None)

    def nothing_to_tell(self, peer: Peer) -> None:
        """It has just been told everything, or is lost."""
        self._unconfirmed.discard(peer)
        self._forgetful.discard(peer)
