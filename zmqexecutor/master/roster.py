"""The workers that have registered with a master: who may, and who is still there."""

from __future__ import annotations

import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final

import zmq

from ..errors import ProtocolError
from ..system.machine import machine_id
from ..wire import protocol
from ..wire.journal import JournalReader
from ..wire.protocol import makes_calls
from ..wire.shortcuts import Post
from .channels import Channels
from .fleet import WAIT_FOR_EXIT, Fleet
from .peers import DeathWatch, Peer

__all__ = ["Roster"]

logger = logging.getLogger(__name__)

PINGS_PER_STEP: Final = 16
"""Workers that are pinged before other things have their turn."""
SOON: Final = 0.005
"""Seconds from the end of a connection until ZeroMQ has cleared it away, and a bit more."""
LAST_WORDS: Final = 5.0
"""Seconds for which a worker that is gone is listened to, if its connection does not end.

What it has sent is lost after that. With every processor busy, ZeroMQ's thread was seen to
need more than a quarter of a second to read the last result. Who waits that long for nothing
is a worker whose connection outlives it, in a process that it has forked.
"""
LOOK: Final = 0.001
"""Seconds until the first look whether all that it has sent is read."""
LOOK_GROWTH: Final = 1 / 8
"""Then looks come after this part of the time that has passed."""


class Roster:
    """Used by the master thread only."""

    def __init__(
        self,
        ping_interval: float,
        fleet: Fleet,
        lose: Callable[[Peer, int | None], None],
        drain: Callable[[Peer], None],
    ) -> None:
        """Begin without any worker.

        Args:
            ping_interval: seconds between two looks for the connection of a worker.
            fleet: the group, for entrances that let only its processes in.
            lose: called with a worker that is gone, and the job that it was running, if
                that is known; it calls `remove`.
            drain: called with a worker that is to be sent no more jobs.
        """
        self._ping_interval = ping_interval
        self._fleet = fleet
        self._lose = lose
        self._drain = drain
        self._deaths = DeathWatch()
        self._peers: dict[bytes, Peer] = {}
        self._by_pid: dict[int, set[Peer]] = {}  # threads of one process may be workers
        self._by_workpoint: dict[str, Peer] = {}
        # Those to be pinged, longest without it first:
        self._unwatched: OrderedDict[bytes, Peer] = OrderedDict()
        self._hurried = 0  # how many of them are to be pinged soon
        self._leaving: dict[Peer, float] = {}  # gone, and since when
        # Processes of the group that should end by themselves, and when they are killed:
        self._outgoing: dict[int, float] = {}
        self.next_ping: float | None = None
        """When `ping` must be called."""
        self.next_look: float | None = None
        """When `see_off` must be called."""

    @property
    def next_kill(self) -> float | None:
        """When `kill_overdue` must be called."""
        return next(iter(self._outgoing.values()), None)  # all have equally long

    def __iter__(self) -> Iterator[Peer]:
        """Those there are now, whatever becomes of them meanwhile."""
        return iter(list(self._peers.values()))

    def get(self, identity: bytes) -> Peer | None:
        """The worker of this routing id, if it has registered and is not lost."""
        return self._peers.get(identity)

    def of_process(self, pid: int) -> list[Peer]:
        """The workers that are this process of this machine."""
        return list(self._by_pid.get(pid, ()))

    # ------------------------------------------------------------- coming

    def register(self, channels: Channels, identity: bytes, hello: protocol.Hello) -> None:
        """A worker asks to be registered, on these channels.

        Raises:
            ProtocolError: it may not; it gets no answer.
        """
        if hello.worker.encode() != identity:
            raise ProtocolError("a worker must use its name as the id of its sockets")
        if hello.version != protocol.VERSION:
            reason = f"the master speaks protocol {protocol.VERSION}, not {hello.version}"
            channels.tell(identity, protocol.Refused(reason))
            return
        wanted = channels.entrance.python
        if wanted and hello.python and not f"{hello.python}.".startswith(f"{wanted}."):
            reason = (
                f"the master runs Python {wanted}, and functions can only be sent to the same "
                f"version, not to {hello.python}; start the worker with Python {wanted}"
            )
            channels.tell(identity, protocol.Refused(reason))
            return
        if not hello.services:
            raise ProtocolError("a worker must offer a service")
        if wanted and not any(makes_calls(name) for name in hello.services):
            reason = (
                "the master here is a ZmqExecutor, whose workers make calls "
                "(zmqexecutor worker --calls); for other services it needs a JobRunner"
            )
            channels.tell(identity, protocol.Refused(reason))
            return
        if hello.workpoint is not None:
            try:
                channels.entrance.access.check_workpoint(hello.workpoint)
            except ValueError as error:
                raise ProtocolError(str(error)) from None
        local = hello.machine == machine_id()
        if hello.workpoint is not None and not self._clear_workpoint(
            hello.workpoint, hello.pid if local else None
        ):
            reason = f"another worker has the workpoint {hello.workpoint}; each needs its own"
            channels.tell(identity, protocol.Refused(reason))
            return
        self._make_way(channels, identity, hello.pid if local else None)
        peer = Peer(
            hello,
            identity,
            channels,
            _map_journal(hello) if local else None,
            _post(hello) if channels.entrance.group_only else None,
        )
        self._peers[identity] = peer
        if hello.workpoint is not None:
            self._by_workpoint[hello.workpoint] = peer
        if not self._is_watched(peer):
            self._unwatched[identity] = peer
            self.next_ping = self.next_ping or time.monotonic() + self._ping_interval
        if hello.workpoint is not None:
            try:
                channels.connect(hello.workpoint)
            except zmq.ZMQError as error:
                self._lose(peer, None)
                raise ProtocolError(f"workpoint {hello.workpoint!r}: {error}") from None
        if local:
            self._by_pid.setdefault(hello.pid, set()).add(peer)
            self._outgoing.pop(hello.pid, None)  # it had only lost its connection
            if not self._deaths.add(hello.pid):
                self._lose(peer, None)
                return
        self._welcome(peer)

    def _make_way(self, channels: Channels, identity: bytes, pid: int | None) -> None:
        """Forget a worker that registers again; refuse what cannot be one of the group's.

        Args:
            channels: the way to the new worker.
            identity: its routing id there.
            pid: its process, if that is on this machine.

        Raises:
            ProtocolError: it is no worker of the group.
        """
        if (known := self._peers.get(identity)) is not None:
            if known.channels is not channels:
                raise ProtocolError("another worker has this name")
            self._lose(known, None)
        group_only = channels.entrance.group_only
        if group_only and (pid is None or not self._fleet.has(pid)):
            raise ProtocolError(f"process {pid} is none of this pool's workers")
        for other in list(self._by_pid.get(pid or 0, ())):
            if not other.tell(protocol.Ping()):
                self._lose(other, None)  # it has lost its connection, and takes a new name
            elif group_only:
                raise ProtocolError(f"process {pid} is registered as {other.hello.worker}")

    def _clear_workpoint(self, workpoint: str, pid: int | None) -> bool:
        """Forget the worker that was there; False if it still is.

        There must not be two connections to one workpoint, and each keeps the routing id that
        its other end had at first. On another host a worker that comes to a workpoint is one
        that has been started again, or whose lost connection is not known here to be so.
        So is, on this one, another registration of the same process.

        Args:
            workpoint: where a new worker has bound its work socket.
            pid: its process, if that is on this machine.
        """
        before = self._by_workpoint.get(workpoint)
        if before is None:
            return True
        if pid not in (None, before.hello.pid) and before.tell(protocol.Ping()):
            return False
        self._lose(before, None)
        return True

    def equipped(self) -> None:
        """It is known now what workers must prepare; those that wait for it are welcomed."""
        for peer in self:
            self._welcome(peer)

    def _welcome(self, peer: Peer) -> None:
        channels = peer.channels
        if channels.setup is None or peer.welcomed:
            return  # it waits for `equipped`, or was there before
        peer.welcomed = True
        entrance = channels.entrance
        welcome = protocol.Welcome(
            protocol.VERSION,
            channels.work_address,
            channels.setup,
            entrance.lost_after,
            entrance.bell if peer.journal else None,  # which says to look into the journal
        )
        if not peer.tell(welcome):
            self._lose(peer, None)

    # ------------------------------------------------------------- going

    def remove(self, peer: Peer) -> None:
        """Strike off a worker that is lost."""
        del self._peers[peer.identity]
        self._unwatched.pop(peer.identity, None)
        if self._leaving.pop(peer, None) is None:
            self.should_end(peer)
        pid = peer.hello.pid
        namesakes = self._by_pid.get(pid, set())
        namesakes.discard(peer)
        if not namesakes and self._by_pid.pop(pid, None) is not None and pid not in self._outgoing:
            self._deaths.remove(pid)
        if peer.hello.workpoint is not None:
            del self._by_workpoint[peer.hello.workpoint]
            peer.channels.disconnect(peer.hello.workpoint)

    def should_end(self, peer: Peer) -> None:
        """A worker leaves. If it is the group's, its process is killed if that does not end.

        It would hold the place of its successor: a thread that a task has left, or an exit
        handler, may keep it for ever.
        """
        pid, deaths = peer.hello.pid, self._deaths
        if peer.grouped and (deaths.watches(pid) or deaths.fileno() == -1):  # not dead already
            self._outgoing.setdefault(pid, time.monotonic() + WAIT_FOR_EXIT)

    def kill_overdue(self, now: float) -> None:
        """Kill the processes that should have ended."""
        for pid in [pid for pid, due in self._outgoing.items() if due <= now]:
            del self._outgoing[pid]
            logger.warning(
                "worker %d is killed: it was to leave and has not ended within %g s; what may "
                "keep it is a thread that a task has left, or an exit handler",
                pid,
                WAIT_FOR_EXIT,
            )
            self._deaths.kill(pid)

    def fileno(self) -> int:
        """The descriptor that is readable when `read_deaths` has something to do, or -1."""
        return self._deaths.fileno()

    def read_deaths(self) -> None:
        """Lose the workers whose processes have died."""
        for pid in self._deaths.dead():
            self._deaths.remove(pid)
            self.lose_process(pid)

    def lose_process(self, pid: int) -> None:
        """A process of this machine has died."""
        for peer in self.of_process(pid):
            self._part(peer)
        self._outgoing.pop(pid, None)

    def _part(self, peer: Peer) -> None:
        """It is gone. Unless it has a journal, its last result may still be on its way."""
        if peer.journal:
            self._lose(peer, None)
        else:
            now = time.monotonic()
            self._drain(peer)  # it still looks idle, or would when its result has come
            self._leaving.setdefault(peer, now)
            self.see_off(now)

    def see_off(self, now: float) -> None:
        """Lose those that are gone, when nothing is to be expected or all of it is read."""
        for peer, since in list(self._leaving.items()):
            if not peer.holding or now - since >= LAST_WORDS or peer.heard_out():
                self._lose(peer, None)
        self.next_look = None
        if self._leaving:
            shortest = now - max(self._leaving.values())
            self.next_look = now + max(LOOK, shortest * LOOK_GROWTH)

    def lose_unwatched(self) -> None:
        """The supervisor has died, who would have told of deaths: all are lost."""
        if self._deaths.fileno() == -1:
            for peer in self:
                if peer.grouped:
                    self._lose(peer, None)
            self._outgoing.clear()  # nobody would tell when these ids are others'

    def kill(self, peer: Peer) -> None:
        """End a worker's process, wherever that is, with the job that it runs.

        Only of the group's own it is known whose process id that is.
        """
        if peer.grouped:
            self._deaths.kill(peer.hello.pid)
        else:
            peer.tell(protocol.Die())

    def ping(self, now: float) -> None:
        """Find out which workers have left without a word that would be told.

        A message to a worker whose connection has been lost cannot be sent. Many are
        pinged a few at a time, each once in an interval.
        """
        for peer in list(itertools.islice(self._unwatched.values(), PINGS_PER_STEP)):
            self._unwatched.move_to_end(peer.identity)
            if not peer.tell(protocol.Ping()):
                self._part(peer)
        self.next_ping = None
        if self._unwatched:
            steps = -(-len(self._unwatched) // PINGS_PER_STEP)
            self._hurried = max(0, self._hurried - PINGS_PER_STEP)
            self.next_ping = now + (SOON if self._hurried else self._ping_interval / steps)

    def look_soon(self, now: float) -> None:
        """A connection was lost; whose it was is not known."""
        self._hurried = len(self._unwatched)
        if self.next_ping is not None:
            self.next_ping = min(self.next_ping, now + SOON)

    def _is_watched(self, peer: Peer) -> bool:
        """Whether the death of its process is told, and is how its connection would end."""
        return peer.grouped and self._deaths.fileno() != -1

    def see_out(self, timeout: float) -> set[int] | None:
        """Wait until all ready workers of the group, which were told to leave, have ended.

        Returns:
            The ids of those that have, within so many seconds; None, at once, if only the
            supervisor will hear of some deaths.
        """
        staying = {peer.hello.pid for peer in self if peer.grouped and peer.state}
        if not all(map(self._deaths.watches, staying)):
            return None
        ended: set[int] = set()
        deadline = time.monotonic() + timeout
        while not staying <= ended and (left := deadline - time.monotonic()) > 0:
            self._deaths.wait(left)
            for pid in self._deaths.dead():
                self._deaths.remove(pid)
                ended.add(pid)
        return ended

    def close(self) -> None:
        """Let all of them go."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
        self._unwatched.clear()
        self._deaths.close()


def _map_journal(hello: protocol.Hello) -> JournalReader | None:
    if hello.journal is None:
        return None
    try:
        return JournalReader(hello.journal)
    except (OSError, ValueError) as error:
        logger.debug("no journal of worker %s: %s", hello.worker, error)
        return None


def _post(hello: protocol.Hello) -> Post | None:
    if hello.mailbox is None:
        return None
    try:
        return Post(hello.mailbox)
    except OSError as error:
        logger.debug("no short cut to worker %s: %s", hello.worker, error)
        return None
