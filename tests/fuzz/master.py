"""A master without threads and sockets, to be fed with anything that can arrive."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, cast

from zmqexecutor.errors import ProtocolError
from zmqexecutor.master.channels import Channels, Entrance
from zmqexecutor.master.coordinator import PINGED_AFTER, Coordinator, MasterOptions
from zmqexecutor.master.lean import LeanFuture
from zmqexecutor.master.tasks import Task
from zmqexecutor.wire.protocol import Frame, Jobs, decode_jobs

__all__ = ["PING_INTERVAL", "BareMaster"]

PING_INTERVAL = 5.0
"""Seconds in which each worker is pinged once."""


class FakeChannels:
    """Takes what the master sends. Workers in `gone` cannot be reached."""

    work_address = "ipc:///nowhere"
    entrance = Entrance(
        "ipc:///nowhere", "ipc:///nowhere", calls=False, lost_after=PING_INTERVAL / PINGED_AFTER
    )
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
        self.coordinator = Coordinator(MasterOptions([self.channels.entrance]))
        self.coordinator.channels.append(cast(Channels, self.channels))
        self.futures: list[Future[Any]] = []
        self.unread: list[Task] = []

    def submit(self) -> None:
        future: LeanFuture[Any] = LeanFuture()
        self.futures.append(future)
        self.unread.append(
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
        coordinator = self.coordinator
        handle = coordinator.on_control if channel == "control" else coordinator.on_work
        try:
            handle(coordinator.channels[0], identity, frame, buffers)
        except ProtocolError:
            pass

    def step(self, now: float) -> None:
        while self.unread:
            self.coordinator.submit(self.unread.pop(0), now)
        self.coordinator.decide(now)
        self.coordinator.confirm()
        self.coordinator.finish()

    def check(self) -> None:
        """Each task is done, or has one place: the queue, a worker, or the answered ones."""
        scheduler = self.coordinator._scheduler
        held = [
            job
            for peer in self.coordinator.roster
            if peer.state
            for job, *_ in peer.state.held.values()
        ]
        assert len({id(job) for job in held}) == len(held), "a task is with two workers"
        done = sum(future.done() for future in self.futures)
        waiting = len(scheduler) + len(self.unread) + len(self.coordinator._answered)
        assert done + waiting + len(held) == len(self.futures), "a task is nowhere, or twice"

    def close(self) -> None:
        self.coordinator.roster.close()
