"""Handshakes that failed, as ZeroMQ's monitor tells of them, in words.

ZeroMQ says little of them, and on purpose nothing to the peer that is refused; what
can be told is told here, for both sides.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import zmq

if TYPE_CHECKING:
    from ..keys import Keys

__all__ = [
    "FAILED",
    "WATCHED",
    "Connections",
    "Failure",
    "Handshakes",
    "explain",
    "open_monitor",
    "read_event",
]

FAILED: Final = (
    zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
)
WATCHED: Final = (
    FAILED
    | zmq.Event.ACCEPTED
    | zmq.Event.CONNECTED
    | zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.DISCONNECTED
)
"""The events that `Handshakes` and `Connections` are to be told."""

_WRONG_KEY: Final = 0x11000001  # ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC
_MISMATCH: Final = 0x11000002  # ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
_REFUSED: Final = 400  # ZAP's code for credentials that are not accepted


def open_monitor(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    """Make the socket on which the events come that another one sends to this address."""
    monitor = context.socket(zmq.PAIR)
    # ZeroMQ's I/O thread, and with it every connection, would wait for a full queue.
    monitor.rcvhwm = 0
    monitor.connect(address)
    return monitor


def read_event(parts: list[bytes]) -> tuple[int, int]:
    """Number and value of an event; `zmq.utils.monitor` would load asyncio."""
    event, value = struct.unpack("=HI", parts[0])
    return event, value


class Handshakes:
    """Follows the connections of one of the master's sockets: which were refused.

    Used by one thread. Those that the gatekeeper refuses are not told: it knows.
    """

    def __init__(self) -> None:
        self._under_way: set[int] = set()  # descriptors
        self._told = 0  # of those, how many have failed and will be disconnected

    def happened(self, event: int, value: int) -> str | None:
        """Take note of an event; why a peer was refused, if it was.

        Args:
            event: its number.
            value: what comes with it: a descriptor, or a code.
        """
        if event in (zmq.Event.ACCEPTED, zmq.Event.CONNECTED):
            self._under_way.add(value)
        elif event == zmq.Event.HANDSHAKE_SUCCEEDED:
            # Which one it was is not said. If it cannot be told, none of them is
            # counted when it is disconnected: rather one too few.
            self._under_way.clear()
            self._told = 0
        elif event & FAILED:
            self._told = min(self._told + 1, len(self._under_way))
            return _words(event, value)
        elif event == zmq.Event.DISCONNECTED and value in self._under_way:
            self._under_way.discard(value)
            if self._told:
                self._told -= 1
            else:
                # ZeroMQ has no event for what does not even begin as its protocol does.
                return "does not speak ZeroMQ's protocol, or an old version without security"
        return None


class Connections:
    """Follows the connections of a worker's socket: whether an established one was lost.

    Strangers that come to a workpoint, and fail, are not the master's end.
    """

    def __init__(self) -> None:
        self._under_way: set[int] = set()  # descriptors
        self._established: set[int] = set()
        self._failed = False

    @property
    def established(self) -> bool:
        """Whether there is a connection now."""
        return bool(self._established)

    def lost(self, event: int, value: int) -> bool:
        """Take note of an event; whether it is the end of an established connection.

        Args:
            event: its number.
            value: what comes with it: a descriptor, or a code.
        """
        failed, self._failed = self._failed, bool(event & FAILED)
        if event in (zmq.Event.ACCEPTED, zmq.Event.CONNECTED):
            self._under_way.add(value)
        elif event == zmq.Event.HANDSHAKE_SUCCEEDED:
            # Which one it was is not said; a failure, as opposed to that, is told
            # immediately before the end of its connection.
            self._established |= self._under_way
            self._under_way.clear()
        elif event == zmq.Event.DISCONNECTED:
            self._under_way.discard(value)
            known = value in self._established
            self._established.discard(value)
            return known and not failed
        return False


def _words(event: int, value: int) -> str | None:
    if event == zmq.Event.HANDSHAKE_FAILED_AUTH:
        return None  # told by the gatekeeper
    if event == zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
        # Also one that speaks plain text, if it has been the first to notice.
        return "went away before it had shown a key"
    if value == _MISMATCH:
        return "has no keys: it speaks plain text"
    if value == _WRONG_KEY:
        return "expects a master with another key: its master.public is not that of this master"
    return "broke the rules of the handshake"


class Failure(NamedTuple):
    """Why a worker has not reached the master.

    Attributes:
        reason: in words, with what to do about it.
        final: whether it is of no use to try again.
    """

    reason: str
    final: bool


def explain(event: int, value: int, endpoint: str, keys: Keys | None) -> Failure:
    """What a worker makes of a handshake that failed.

    Args:
        event: one of `FAILED`.
        value: the code that comes with it.
        endpoint: where the master should be.
        keys: the worker's, if it has any.
    """
    if event == zmq.Event.HANDSHAKE_FAILED_AUTH and value == _REFUSED and keys is not None:
        assert keys.worker_public is not None
        return Failure(
            f"the master at {endpoint} refused this worker's key (in {keys.directory}); it admits "
            "those in its folder authorized: put a file NAME.public there with the line "
            f"{keys.worker_public.decode()}",
            True,
        )
    if event == zmq.Event.HANDSHAKE_FAILED_PROTOCOL and value == _MISMATCH:
        if keys is None:
            reason = (
                f"the master at {endpoint} speaks CURVE, and this worker has no keys; "
                "copy them from the master's host (see `zmqexecutor keygen`), and pass keys="
            )
        else:
            reason = (
                f"the master at {endpoint} has no keys and speaks plain text; this worker "
                f"has keys (in {keys.directory}) and does not: give the master its keys"
            )
        return Failure(reason, True)
    # A mismatch too, if the other side has been the first to notice.
    who = (
        "it wants keys, which this worker does not have, or is not a master"
        if keys is None
        else f"it is not the master whose key is {keys.directory / 'master.public'}, "
        "or that one has no keys"
    )
    return Failure(f"what listens at {endpoint} ended the handshake: {who}", False)
