"""An entrance: the two sockets, control and work, on which some workers reach the master."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec
import zmq

from ..errors import ProtocolError
from ..system.arguments import check_seconds
from ..system.descriptors import check_descriptors, check_threads
from ..wire import protocol, security
from ..wire.liveness import LOST_AFTER
from ..wire.protocol import LARGEST_CONTROL_MESSAGE, Frame
from ..wire.security import has_message

if TYPE_CHECKING:
    from .gatekeeper import Gatekeeper

__all__ = ["Channels", "Entrance", "joining_entrance"]

logger = logging.getLogger(__name__)

MESSAGES_PER_STEP: Final = 256
"""Messages read from one socket before the others have their turn."""

_MORE: Final = zmq.DONTWAIT | zmq.SNDMORE

Handle: TypeAlias = Callable[[bytes, Frame, list[Frame]], None]


class Entrance(msgspec.Struct, frozen=True):
    """Where workers come in, and which.

    Attributes:
        endpoint: where they register.
        work: where they connect for jobs; `tcp://HOST:*` is any free port.
        setup: what they must prepare before they are ready, or None if that will be told
            later; those that register before have to wait.
        group_only: whether only processes of the master's own group may.
        python: the version of Python, such as "3.13", that they must run; empty for any.
        calls: whether clients may send jobs.
        lost_after: seconds after which a worker that is not heard of is taken for lost;
            on this machine the kernel tells.
        access: who may connect.
        bell: where to make the bell for these workers, if they have one; see `shortcuts`.
    """

    endpoint: str
    work: str
    setup: bytes | None = b""
    group_only: bool = False
    python: str = ""
    calls: bool = False
    lost_after: float = LOST_AFTER
    access: security.Access = msgspec.field(default_factory=security.Access)
    bell: str | None = None


def joining_entrance(
    endpoint: str, work: str | None, lost_after: float, access: security.Access
) -> Entrance:
    """Where workers can join that somebody else has started.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an address cannot be used, or a number is out of range.
    """
    if work is not None:
        access.check(work, "work_address")
    elif endpoint.startswith("tcp://"):
        work = endpoint.rpartition(":")[0] + ":*"
    else:
        work = endpoint + ".work"
    return Entrance(endpoint, work, lost_after=_check_lost_after(lost_after), access=access)


def _check_lost_after(seconds: float) -> float:
    """Return what `Entrance.lost_after` may be.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    checked = check_seconds("lost_after", seconds)
    if not 0.2 <= checked <= 3600:
        raise ValueError(f"lost_after must be 0.2 to 3600 seconds, not {seconds}")
    return checked


class Channels:
    """Made, used and closed by the master thread. Workers are named by their routing ids.

    Attributes:
        entrance: what it was made from.
        setup: what workers that come here must prepare, or None if that is not known yet.
        dropped: how many messages were none.
        control: the socket at the endpoint, where workers register and are controlled.
        work: the socket for jobs and results, bound, and connected to workpoints.
        control_fd: the descriptor of `control`, to be polled for reading; see `unread`.
        work_fd: that of `work`.
        used: the sockets that were used since they were last found empty; see `unread`.
        work_address: where workers that name no workpoint connect.
    """

    def __init__(self, entrance: Entrance, on_lost: Callable[[], None] = lambda: None) -> None:
        """Bind both sockets.

        Args:
            entrance: what is bound.
            on_lost: called by another thread when it is known that a connection is lost.

        Raises:
            OSError: an address is in use, or cannot be used.
        """
        self.entrance = entrance
        self.setup = entrance.setup
        self.dropped = 0
        endpoint, work = entrance.endpoint, entrance.work
        check_descriptors()
        check_threads()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        keys = entrance.access.keys
        lost_after = entrance.lost_after
        self.control = security.socket(
            self._context, zmq.ROUTER, endpoint, keys, lost_after=lost_after
        )
        self.control.setsockopt(zmq.MAXMSGSIZE, LARGEST_CONTROL_MESSAGE)
        self.work = security.socket(
            self._context, zmq.ROUTER, work, keys, lost_after=lost_after, bulk=True
        )
        # The end of a connection to a workpoint is noticed, as that of others is.
        self.work.immediate = True
        self.control_fd = self.control.fileno()
        self.work_fd = self.work.fileno()
        self._bound: dict[zmq.Socket[bytes], str] = {}
        self._gatekeeper: Gatekeeper | None = None
        self.used: set[zmq.Socket[bytes]] = {self.control, self.work}
        try:
            if keys is not None:
                from .gatekeeper import Gatekeeper  # of no use to a pool on one host

                sockets = {"endpoint": self.control, "work address": self.work}
                self._gatekeeper = Gatekeeper(self._context, keys, sockets, on_lost)
            self._bound[self.control] = security.bind(self.control, endpoint)
            self.work_address = self._bound[self.work] = security.bind(self.work, work)
        except BaseException:
            self.close()
            raise

    def read(self, socket: zmq.Socket[bytes], handle: Handle) -> None:
        """Hand what has come on this socket to `handle`; what is no message is dropped.

        Args:
            socket: `control` or `work`.
            handle: called with the sender's id, the message, and its buffers; may
                raise ProtocolError to have it counted as garbage.
        """
        self.used.add(socket)
        for _ in range(MESSAGES_PER_STEP):
            try:
                identity = socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                self.used.discard(socket)
                return
            message = socket.recv(zmq.DONTWAIT)  # a ROUTER puts the id before one frame or more
            buffers: list[Frame] = []
            while socket.getsockopt(zmq.RCVMORE):
                # The message itself is small; what follows it is large, and not copied.
                buffers.append(socket.recv(copy=False).buffer)
            try:
                handle(identity, message, buffers)
            except ProtocolError as error:
                self.dropped += 1
                level = logging.WARNING if self.dropped == 1 else logging.DEBUG
                logger.log(level, "dropped what a peer sent: %s", str(error))
            # Not until `recv` raises Again: 1.4 us against 6.
            if not has_message(socket):
                self.used.discard(socket)
                return

    def unread(self) -> list[int]:
        """The descriptors of the sockets that have messages. Ask before polling them.

        ZeroMQ makes them readable when something happens, and not again for what is there
        once the socket has been used, even for sending.
        """
        self.used = {socket for socket in self.used if has_message(socket)}
        return [self.work_fd if socket is self.work else self.control_fd for socket in self.used]

    def connect(self, workpoint: str) -> None:
        """Have jobs for a worker that has bound its work socket go there.

        Raises:
            zmq.ZMQError: it is no address to connect to.
        """
        self.used.add(self.work)
        self.work.connect(workpoint)

    def disconnect(self, workpoint: str) -> None:
        """Undo `connect`, if it was done."""
        self.used.add(self.work)
        try:
            self.work.disconnect(workpoint)
        except zmq.ZMQError:
            pass  # it was not connected

    def tell(
        self, identity: bytes, message: protocol.ControlFromMaster | protocol.ToClient
    ) -> bool:
        """Send a control message; False if there is no way to the worker or client."""
        return self._send(self.control, identity, [protocol.encode(message)])

    def send_work(self, identity: bytes, frame: bytes, buffers: Sequence[Frame] = ()) -> bool:
        """Send jobs, encoded, and their buffers; False if there is no way to the worker."""
        return self._send(self.work, identity, [frame, *buffers])

    def is_read(self) -> bool:
        """Whether no message is waiting on the work socket."""
        return not has_message(self.work)

    def _send(self, socket: zmq.Socket[bytes], identity: bytes, parts: list[Frame]) -> bool:
        self.used.add(socket)
        try:
            socket.send(identity, _MORE)
            for part in parts[:-1]:
                socket.send(part, _MORE)
            socket.send(parts[-1], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def bar(self, barred: bool) -> None:
        """Let no more workers connect, or let them again. Those that have, stay.

        Local addresses only: their files get other names for a while.
        """
        for address in self._bound.values():
            if address.startswith("ipc://"):
                path = address.removeprefix("ipc://")
                names = path, f"{path}.barred"
                with contextlib.suppress(OSError):  # the directory has been removed
                    os.rename(*names if barred else reversed(names))

    @property
    def refused(self) -> Mapping[str, int]:
        """How many connections were refused over TCP with keys, by reason. Any thread."""
        return self._gatekeeper.refused if self._gatekeeper else {}

    def close(self) -> None:
        """Close the sockets. What has not been sent is dropped."""
        if self._gatekeeper:
            self._gatekeeper.close()
        for socket in (self.control, self.work):
            security.close(socket, self._bound.get(socket))
        self._context.term()
