"""While the master sleeps and a worker is idle, a thread that submits a task sends it itself.

    master: nothing to do, a worker is idle ──► Offer ──► poll
                                                  │
    thread: take(task), send it to the worker ◄───┘       ... the worker rings ...
    master: awake ──► withdraw ──► the task counts as sent from then on

It spares a short task the wait for the master thread to wake up. An offer is there only
while the master waits in its poll, and the first thing that it does afterwards is to
take what the offer has brought into its books. So all of its other code finds the same
as if it had sent the task.

Nothing is locked, so that no interrupt (Ctrl-C) and no finalizer that submits can leave
a lock behind. One dictionary decides who was first, the thread or the master. If the
thread was interrupted before it had sent the task, or is slow, the master sends it too:
the message has the same number, and the worker drops the second one.
"""

from __future__ import annotations

from ..wire.protocol import Job, Jobs
from .peers import Peer
from .tasks import Task

__all__ = ["Offer"]


class Offer:
    """One idle worker, for one small task."""

    __slots__ = ("_confirmed", "_number", "_seq", "_service", "_taken", "peer", "sent")

    def __init__(self, peer: Peer, service: str, seq: int) -> None:
        """Offer a worker.

        Args:
            peer: a worker that has a mailbox and holds no job.
            service: the only one that it offers.
            seq: the number that a job would have there.
        """
        self.peer = peer
        self.sent = False
        """Whether the task is on its way."""
        self._service = service
        # As they are now: when the task is sent, the master may be awake, and go on counting.
        self._seq = seq
        self._number = peer.next_number
        self._confirmed = peer.confirmed
        self._taken: dict[str, Task | None] = {}
        peer.offered = self._taken

    # ------------------------------------------------- called by other threads

    def take(self, task: Task) -> bool:
        """Have this task done by the worker, if it may be; `send` must follow."""
        if self._taken or task.service != self._service or not self._is_small(task):
            return False
        # Before the others can know of it: they must never find it unstarted.
        task.start()
        if self._taken.setdefault("task", task) is not task:
            task.unstart()
            return False
        return True

    def send(self, task: Task) -> bool:
        """Send the task; False if the master must be woken to do it."""
        key = task.shared.key if task.shared else b""
        job = Job(self._seq, task.id, task.data, task.codec, key, len(task.buffers))
        jobs = Jobs(self._confirmed, [job], number=self._number)
        self.sent = self.peer.post(jobs, task.buffers)
        return self.sent

    def _is_small(self, task: Task) -> bool:
        """Whether the worker needs only this task's data, and nobody looks at the time."""
        return (
            task.lease is None
            and not task.shares
            and task.options.timeout is None
            and (task.shared is None or self.peer.knows(task.shared))
        )

    # --------------------------------------------------- called by the master

    def withdraw(self) -> Task | None:
        """Let nobody take it any more; the task for which it was taken, if it was."""
        task = self._taken.setdefault("task", None)
        self.peer.offered = {}
        return task
