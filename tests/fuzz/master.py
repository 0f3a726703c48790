"""A master without threads and sockets, to be fed with anything that can arrive."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, cast

from zmqexecutor.channels import Channels, Entrance
from zmqexecutor.errors import ProtocolError
from zmqexecutor.lean import LeanFuture
from zmqexecutor.master import Master, MasterOptions
from zmqexecutor.protocol import Frame, Jobs, decode_jobs
from zmqexecutor.roster import Roster
from zmqexecutor.tasks import Task

__all__ = ["PING_INTERVAL", "BareMaster"]


PING_INTERVAL = 5.0


class FakeChannels:
    """Takes what the master sends. Workers in `gone` cannot be reached."""

    work_address = "ipc:///nowhere"
    entrance = Entrance("ipc:///nowhere", "ipc:///nowhere", calls=False)
    setup = b""
    dropped = 0

    def __init__(self) -> None:
        self.gone: set[bytes] = set()
        self.sent: list[tuple[bytes, Jobs]] = []

    def connect(self, workpoint: str) -> None:
        pass

    def disconnect(self, workpoint: str) -> None:
        pass

    def tell(self, identity: bytes, message: object) -> bool:
        return identity not in self.gone

    def send_work(self, identity: bytes, frame: bytes, buffers: Sequence[Frame] = ()) -> bool:
        self.sent.append((identity, decode_jobs(frame)))
        return identity not in self.gone

    def is_read(self) -> bool:
        return True


class BareMaster:
    """Its steps are taken by the test."""

    def __init__(self) -> None:
        self.channels = FakeChannels()
        self.master = Master(MasterOptions([self.channels.entrance]))
        self.master._channels = [cast(Channels, self.channels)]
        self.master._roster = Roster(PING_INTERVAL, self.master._fleet, self.master._lose)
        self.master._dispatcher = self.master._make_dispatcher()
        self.futures: list[Future[Any]] = []

    def submit(self) -> None:
        future: LeanFuture[Any] = LeanFuture()
        self.futures.append(future)
        self.master._inbox.append(
            Task(
                kind="",
                future=future,
                data=b"",
                decode=lambda result, _: result.data,
                name="task",
            )
        )

    def receive(self, channel: str, identity: bytes, frame: bytes, buffers: list[Frame]) -> None:
        """A message comes. What is raised is a defect."""
        handle = self.master._on_control if channel == "control" else self.master._on_work
        try:
            handle(self.master._channels[0], identity, frame, buffers)
        except ProtocolError:
            pass

    def step(self, now: float) -> None:
        self.master._read_inbox()
        self.master._decide(now)
        self.master._dispatcher.confirm()
        self.master._finish_answered()

    def check(self) -> None:
        """Each task is done, or has one place: the queue, a worker, or the answered ones."""
        scheduler = self.master._scheduler
        held = [
            job
            for peer in self.master._roster
            if peer.state
            for job, *_ in peer.state.held.values()
        ]
        assert len({id(job) for job in held}) == len(held), "a task is with two workers"
        done = sum(future.done() for future in self.futures)
        waiting = len(scheduler) + len(self.master._inbox) + len(self.master._answered)
        assert done + waiting + len(held) == len(self.futures), "a task is nowhere, or twice"

    def close(self) -> None:
        self.master._roster.close()
