"""The master's thread: it waits for whatever comes next, and has the coordinator see to it.

                      ┌─────────── wait: poll, or until the next deadline ◄──────────────┐
                      ▼                                                                  │
    sockets, bell, group, deaths: handlers ─► inbox ─► deadlines ─► decide ─► confirm ─► finish

It opens the sockets of all entrances, reads them, and closes them. Everything that happens is
told to the coordinator, one thing after the other.
"""

from __future__ import annotations

import contextlib
import logging
import math
import select
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Final

from ..wire.shortcuts import Bell
from .channels import Channels
from .coordinator import Coordinator, MasterOptions
from .fleet import Group
from .inbox import Inbox
from .tasks import Task

__all__ = ["Loop"]

logger = logging.getLogger(__name__)

LONGEST_WAIT: Final = 3600.0
"""Seconds after which the loop looks again at a deadline that is still further away."""


class Loop:
    """Used by the master thread only, but for what is said to be for any thread."""

    def __init__(
        self, options: MasterOptions, group: Group | None, cleanup: Callable[[], None]
    ) -> None:
        """Prepare.

        Args:
            options: what the master needs to know.
            group: the supervised group of workers that it looks after, if any.
            cleanup: called by `close`, when everything else is closed.

        Raises:
            OSError: too few file descriptors are left.
        """
        self.inbox = Inbox()
        """For any thread."""
        self.coordinator = Coordinator(options, group, self._watch_group)
        self.opened: Future[None] = Future()
        """Done when all is open and started, or when that has failed and all is closed again.
        For any thread."""
        self._options = options
        self._cleanup = cleanup
        self._bell: Bell | None = None  # of its own workers
        # Not zmq.Poller: 0.6 us against 3 to 6; the price of it is `Channels.unread`.
        self._poller = select.poll()
        self._handlers: dict[int, Callable[[], object]] = {}  # by the descriptors it polls
        self._due: float | None = None  # the next deadline, as of the last wait
        if options.segments:
            options.segments.on_idle = self.inbox.wake

    def run(self) -> None:
        """Do everything, until all is done and closed."""
        try:
            self._open()
        except BaseException as error:
            try:
                self.close()
            finally:
                self.opened.set_exception(error)
            return
        self.opened.set_result(None)
        try:
            while not self.coordinator.done(unread=bool(self.inbox.items)):
                self._step()
        except BaseException as error:  # a defect of ours: no future may hang for it
            self.coordinator.break_off(f"the master thread failed: {error!r}")
            logger.exception("the master thread failed")  # which may raise, with a user's filter
        finally:
            self.inbox.close(self.coordinator.broken)
            try:
                self.coordinator.see_out()
            finally:
                self.close()

    # ------------------------------------------------------------------- steps

    def _step(self) -> None:
        handlers, coordinator = self._handlers, self.coordinator
        for descriptor in self._wait():
            if descriptor in handlers:  # the supervisor's may just have been replaced
                handlers[descriptor]()
        if self.inbox.items:
            self._read_inbox()
        now = time.monotonic()
        if self._due is not None and self._due <= now:
            coordinator.check_deadlines(now)
        coordinator.decide(now)
        coordinator.confirm()
        coordinator.finish()

    def _wait(self) -> list[int]:
        """Wait for the next event or deadline; which descriptors are ready."""
        inbox, coordinator = self.inbox, self.coordinator
        inbox.doze()
        timeout: int | None = None
        unread = [
            fd for channels in coordinator.channels if channels.used for fd in channels.unread()
        ]
        if inbox.items or unread:
            timeout = 0
            self._due = 0.0  # look at all deadlines: none was computed
        else:
            self._due = coordinator.next_deadline()
            if self._due is not None:
                # Rounded up to whole milliseconds: not to wake just before the time.
                seconds = min(LONGEST_WAIT, self._due - time.monotonic())
                timeout = max(0, math.ceil(seconds * 1000))
        try:
            if timeout != 0:
                inbox.offer = coordinator.make_offer()
            ready = self._poller.poll(timeout)
        finally:
            inbox.rouse()
            if (offer := inbox.offer) is not None:
                inbox.offer = None
                coordinator.withdraw(offer)
        return [*unread, *(descriptor for descriptor, _ in ready)]

    def _read_inbox(self) -> None:
        items, coordinator, now = self.inbox.items, self.coordinator, time.monotonic()
        for _ in range(len(items)):
            item = items.popleft()
            try:
                if isinstance(item, Task):
                    coordinator.submit(item, now)
                else:
                    item()
            except BaseException:
                items.appendleft(item)  # a task fails with the others that are here
                raise

    def _answer_bell(self) -> None:
        """Take the results of those workers that say that they have some."""
        assert self._bell
        for pid in self._bell.rung_by():
            for peer in self.coordinator.roster.of_process(pid):
                self.coordinator.read_journal(peer)

    # ------------------------------------------------------- what it listens to

    def _open(self) -> None:
        coordinator = self.coordinator
        for entrance in self._options.entrances:
            if entrance.bell:
                self._bell = Bell(entrance.bell)
            coordinator.channels.append(Channels(entrance, self._look_soon))
        # Sockets first: what workers have said comes before the news that they are dead.
        for channels in coordinator.channels:
            for descriptor, socket, handle in (
                (channels.work_fd, channels.work, coordinator.on_work),
                (channels.control_fd, channels.control, coordinator.on_control),
            ):
                read = partial(channels.read, socket, partial(handle, channels))
                self._watch(descriptor, read)
        self._watch(self.inbox.fileno(), self.inbox.clear)
        self._watch(coordinator.roster.fileno(), coordinator.roster.read_deaths)
        if self._bell:
            self._watch(self._bell.fileno(), self._answer_bell)
        coordinator.start_group()

    def _watch(self, descriptor: int, handle: Callable[[], object]) -> None:
        """Have it called whenever the descriptor, unless that is -1, is readable."""
        if descriptor != -1:
            self._handlers[descriptor] = handle
            self._poller.register(descriptor, select.POLLIN)

    def _watch_group(self) -> None:
        """Poll the supervisor that is there now: call it when that may have changed."""
        fleet = self.coordinator.fleet
        old, new = fleet.polled, fleet.fileno()
        if old != new:
            if old != -1:
                self._poller.unregister(old)
                del self._handlers[old]
            self._watch(new, self.coordinator.read_fleet)
            fleet.polled = new

    def _look_soon(self) -> None:
        """A connection was lost, of a worker perhaps. Any thread may call it."""
        self.inbox.call(lambda: self.coordinator.roster.look_soon(time.monotonic()))

    def close(self) -> None:
        """Close everything, whatever has been opened, and break the cycles of references."""
        coordinator = self.coordinator
        with contextlib.ExitStack() as last_first:  # each of them, even if another one raises
            last_first.callback(coordinator.let_go)
            last_first.callback(self._handlers.clear)  # a traceback that is kept may lead to it
            last_first.callback(self._cleanup)
            if self._options.segments:
                self._options.segments.on_idle = int
            if self._bell:
                last_first.callback(self._bell.close)
            for channels in coordinator.channels:
                last_first.callback(channels.close)
            last_first.callback(coordinator.roster.close)
            last_first.callback(coordinator.attendance.clear)
            last_first.callback(self.inbox.close, coordinator.broken)
