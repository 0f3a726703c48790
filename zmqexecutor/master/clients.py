"""Clients of a master: programs that ask what is going on, or have jobs done.

They speak on the control socket of an entrance as workers do, but never register.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Final

import msgspec

from ..wire import protocol
from ..wire.protocol import Frame, Result
from .channels import Channels
from .lanes import Lane
from .lean import LeanFuture
from .peers import Peer
from .tasks import Task

__all__ = ["Clients", "Counts", "report"]


MOST_CALLS: Final = 10_000
"""Calls of clients that wait or run at a time: who has gone away does not say so."""


class Counts:
    """What has become of the jobs of a master so far."""

    __slots__ = ("done", "failed", "lost", "started")

    def __init__(self) -> None:
        self.started: Final = time.monotonic()
        self.done = 0
        """Answered by a worker,"""
        self.failed = 0
        """and of those: how many had raised."""
        self.lost = 0
        """How many a worker died in."""


def report(
    counts: Counts,
    lanes: Iterable[Lane[Task]],
    peers: Iterable[Peer],
    channels: Iterable[Channels],
) -> protocol.Report:
    """The state of a master, for whoever asks. Called by its thread."""
    services = [
        protocol.ServiceReport(lane.service, lane.workers, len(lane.queue)) for lane in lanes
    ]
    ready = [peer for peer in peers if peer.state]
    return protocol.Report(
        version=protocol.VERSION,
        host=socket.gethostname(),
        pid=os.getpid(),
        uptime=time.monotonic() - counts.started,
        jobs={
            "queued": sum(service.queued for service in services),
            "running": sum(len(peer.state.held) for peer in ready if peer.state),
            "done": counts.done,
            "failed": counts.failed,
            "lost": counts.lost,
        },
        services=sorted(services, key=lambda service: service.name),
        workers=[_worker(peer) for peer in ready],
        dropped=sum(entrance.dropped for entrance in channels),
        refused=sum(sum(entrance.refused.values()) for entrance in channels),
    )


def _worker(peer: Peer) -> protocol.WorkerReport:
    info = peer.info()
    return protocol.WorkerReport(
        info.id,
        info.host,
        info.pid,
        list(info.services),
        info.state,
        info.jobs_done,
        info.age,
    )


class Clients:
    """Used by the master thread only."""

    def __init__(
        self, submit: Callable[[Task], None], tell_state: Callable[[], protocol.Report]
    ) -> None:
        self._submit = submit
        self._tell_state = tell_state
        self._outstanding = 0

    def on_message(self, channels: Channels, identity: bytes, message: protocol.FromClient) -> None:
        """A client has asked for something."""
        if isinstance(message, protocol.Ask):
            channels.tell(identity, self._tell_state())
        elif not channels.entrance.calls:
            refusal = b"this master takes no jobs from clients"
            channels.tell(
                identity, protocol.Answer(message.number, False, refusal, "text", "ProtocolError")
            )
        elif self._outstanding >= MOST_CALLS:
            refusal = f"{MOST_CALLS} calls of clients are waiting already".encode()
            channels.tell(
                identity, protocol.Answer(message.number, False, refusal, "text", "RuntimeError")
            )
        else:
            self._call(channels, identity, message)

    def _call(self, channels: Channels, identity: bytes, call: protocol.Call) -> None:
        future: LeanFuture[Result] = LeanFuture()
        task = Task(
            kind=call.service,
            size=len(call.data),
            future=future,
            data=call.data,
            decode=_as_it_came,
            name=f"job {call.id!r}",
            id=call.id,
            codec=call.codec,
            service=call.service,
        )

        def answer(done: Future[Result]) -> None:
            self._outstanding -= 1
            channels.tell(identity, _answer(call.number, done))  # if it is still there

        future.add_done_callback(answer)  # called by the master thread, as all completions
        self._outstanding += 1
        self._submit(task)


def _as_it_came(result: Result, buffers: Iterable[Frame]) -> Result:
    """The result as the client will decode it."""
    frames = list(buffers)
    return msgspec.structs.replace(result, data=bytes(frames[0])) if frames else result


def _answer(number: int, done: Future[Result]) -> protocol.Answer:
    if done.cancelled():
        return protocol.Answer(number, False, b"the master was stopped", "text", "CancelledError")
    if (error := done.exception()) is not None:
        text = str(error).encode(errors="replace")
        return protocol.Answer(number, False, text, "text", type(error).__name__)
    result = done.result()
    error_name = "" if result.ok else "JobFailedError"
    return protocol.Answer(number, result.ok, result.data, result.codec, error_name)
