"""Who may connect to a master over TCP: asked for each connection, and counted.

ZeroMQ asks a *ZAP handler*, one for each context, whether it is to accept the key of
a peer that has proved to have it. pyzmq's `zmq.auth.thread` would be one, but it loads
asyncio, its thread ends with the first exception of a callback, after which every new
peer waits for ever, and it does not see those that fail before they show a key.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

import zmq
from zmq.utils import z85

from ..keys import Keys
from ..wire.handshakes import WATCHED, Connections, Handshakes, open_monitor, read_event
from ..wire.wakeup import Wakeup

__all__ = ["Gatekeeper"]

logger = logging.getLogger(__name__)

_ADDRESS: Final = "inproc://zeromq.zap.01"  # from the specification of ZAP
_VERSION: Final = b"1.0"


class Gatekeeper:
    """A thread that admits authorized peers to the sockets of one context.

    Attributes:
        refused: how many connections were refused, by reason; replaced, never changed,
            by its thread.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: Keys,
        sockets: dict[str, zmq.Socket[bytes]],
        on_lost: Callable[[], None],
    ) -> None:
        """Start the thread. It is ready when this returns.

        Args:
            context: of the sockets, which ask nobody else.
            keys: the master's.
            sockets: by what they are called in messages; not bound yet.
            on_lost: called by the thread when a peer's connection to one of them is lost.
        """
        self.refused: dict[str, int] = {}
        self._context = context
        self._keys = keys
        self._sockets = sockets
        self._on_lost = on_lost
        self._wakeup = Wakeup()
        self._opened: Future[None] = Future()
        for number, socket in enumerate(sockets.values()):
            socket.monitor(f"inproc://handshakes-{number}", WATCHED)
        self._thread = threading.Thread(
            target=self._run, name="zmqexecutor-gatekeeper", daemon=True
        )
        self._thread.start()
        self._opened.result()

    def close(self) -> None:
        """End the thread; nobody is admitted any more. Before the sockets are closed."""
        for socket in self._sockets.values():
            socket.disable_monitor()
        self._wakeup.set()
        self._thread.join()
        del self._on_lost  # nothing should wait for a garbage collection because of it

    def _run(self) -> None:
        opened: list[zmq.Socket[bytes]] = []
        try:
            self._open(opened)
        except BaseException as error:
            self._opened.set_exception(error)
        else:
            self._opened.set_result(None)
            self._serve(opened[0], dict(zip(opened[1:], self._sockets, strict=True)))
        finally:
            for socket in opened:
                socket.close(0)

    def _open(self, opened: list[zmq.Socket[bytes]]) -> None:
        opened.append(self._context.socket(zmq.REP))
        opened[0].bind(_ADDRESS)
        for number in range(len(self._sockets)):
            monitor = open_monitor(self._context, f"inproc://handshakes-{number}")
            opened.append(monitor)

    def _serve(self, zap: zmq.Socket[bytes], monitors: dict[zmq.Socket[bytes], str]) -> None:
        poller = zmq.Poller()
        poller.register(self._wakeup.fileno(), zmq.POLLIN)
        for socket in (zap, *monitors):
            poller.register(socket, zmq.POLLIN)
        handshakes = {monitor: Handshakes() for monitor in monitors}
        connections = {monitor: Connections() for monitor in monitors}
        while True:
            ready = dict(poller.poll())
            if self._wakeup.fileno() in ready:
                return
            if zap in ready:
                zap.send_multipart(self._answer(zap.recv_multipart()))
            for monitor, name in monitors.items():
                if monitor not in ready:
                    continue
                event, value = read_event(monitor.recv_multipart())
                if (reason := handshakes[monitor].happened(event, value)) is not None:
                    self._refuse(f"a peer at the {name}", reason)
                if connections[monitor].lost(event, value):
                    self._on_lost()

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """The answer to a question of ZeroMQ's: who has this key, if it is admitted."""
        _, number, _, address, _, mechanism, *credentials = request
        name: str | None = None
        try:
            if mechanism == b"CURVE":
                name = self._keys.who(public := z85.encode(credentials[0]))
                if name is None:
                    self._refuse(
                        f"a peer from {address.decode(errors='replace')} "
                        f"with the public key {public.decode()}",
                        f"is not in {self._keys.directory / 'authorized'}",
                    )
        except Exception as error:  # nobody may be admitted, or be kept waiting, for it
            self._refuse("a peer", f"cannot be looked up: {error}")
        if name is None:
            return [_VERSION, number, b"400", b"not authorized", b"", b""]
        return [_VERSION, number, b"200", b"OK", name.encode(errors="replace"), b""]

    def _refuse(self, who: str, reason: str) -> None:
        count = self.refused.get(reason, 0) + 1
        self.refused = {**self.refused, reason: count}
        level = logging.WARNING if count == 1 else logging.DEBUG
        try:
            logger.log(level, "refused %s: it %s (%d of this kind)", who, reason, count)
        except Exception:
            # Of a logging filter of the user's. Without this thread ZeroMQ's would stop:
            # it waits for whoever reads its monitors.
            traceback.print_exc()
