"""What no pool can beat: no pool at all, a plain copy in memory, and bare ZeroMQ.

They are called as pools are, but only for the workloads to which they are a limit.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import tasks


class Serial:
    """A loop in this process."""

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], _chunksize: int) -> Iterable[Any]:
        return map(fn, items)

    def shutdown(self) -> None:
        """Nothing to do."""


class MemoryCopy:
    """Copies what would travel once for each way, and runs the task here."""

    def call(self, fn: Callable[..., Any], data: Any) -> Any:
        if fn is not tasks.give:
            data = _copy(data)
        result = fn(data)
        return result if fn is tasks.length else _copy(result)

    def shutdown(self) -> None:
        """Nothing to do."""


def _copy(data: Any) -> Any:
    return data.copy() if hasattr(data, "copy") else bytearray(data)


class ZmqEcho:
    """Two processes and a pair of sockets over ipc; no pickle, no task, no copy in Python."""

    def __init__(self) -> None:
        import zmq

        self._directory = tempfile.TemporaryDirectory(prefix="benchmarks-")
        address = f"ipc://{self._directory.name}/echo"
        self._context: Any = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.bind(address)
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(target=_echo, args=(address, os.getpid()), daemon=True)
        self._process.start()

    def call(self, fn: Callable[..., Any], data: Any) -> Any:
        name = fn.__name__.encode()
        if fn is tasks.give:
            self._socket.send_multipart([name, str(data).encode()])
        else:
            self._socket.send_multipart([name, data], copy=False)
        return self._socket.recv(copy=False).buffer

    def shutdown(self) -> None:
        self._socket.send_multipart([b"end", b""])
        self._process.join()
        self._socket.close(linger=0)
        self._context.term()
        self._directory.cleanup()


def _echo(address: str, parent: int) -> None:
    import zmq

    context: Any = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(address)
    while os.getppid() == parent:
        if not socket.poll(1000):
            continue
        name, data = socket.recv_multipart(copy=False)
        kind = name.bytes
        if kind == b"end":
            break
        if kind == b"length":
            socket.send(b"x")
        elif kind == b"give":
            socket.send(tasks.give(int(data.bytes)), copy=False)
        else:
            socket.send(data, copy=False)
    socket.close(linger=1000)
    context.term()
