"""What no pool can beat: no pool at all, a plain copy in memory, and bare ZeroMQ.

They are called as pools are, but only for the workloads to which they are a limit.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
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


class ZmqFutures:
    """The way of a task of ours, and nothing else: no pickle, no books, no journal.

    the caller ─ wake-up ─► a thread ─ ROUTER ─► DEALER in another process
    Future.result ◄──────── set_result ◄────────┘
    """

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="benchmarks-")
        self._address = f"ipc://{self._directory.name}/futures"
        self._inbox: deque[Future[Any] | None] = deque()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(
            target=_answer, args=(self._address, os.getpid()), daemon=True
        )
        self._process.start()

    def submit(self, fn: Callable[..., Any]) -> Future[Any]:
        if fn is not tasks.nothing:
            raise ValueError("only for tasks that do nothing")
        future: Future[Any] = Future()
        self._hand_over(future)
        return future

    def shutdown(self) -> None:
        self._hand_over(None)
        self._thread.join()
        self._process.join()
        os.close(self._wakeup)
        self._directory.cleanup()

    def _hand_over(self, item: Future[Any] | None) -> None:
        self._inbox.append(item)
        os.eventfd_write(self._wakeup, 1)

    def _run(self) -> None:
        import zmq

        context: Any = zmq.Context()
        socket = context.socket(zmq.ROUTER)
        socket.bind(self._address)
        worker, _ = socket.recv_multipart()
        poller = select.poll()
        poller.register(self._wakeup, select.POLLIN)
        poller.register(socket, select.POLLIN)
        waiting: deque[Future[Any]] = deque()
        while True:
            while socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                socket.recv_multipart()
                waiting.popleft().set_result(None)
            for descriptor, _ in poller.poll():
                if descriptor == self._wakeup:
                    os.eventfd_read(self._wakeup)
            while self._inbox:
                future = self._inbox.popleft()
                if future is None:
                    socket.send_multipart([worker, b"end"])
                    context.destroy(linger=1000)
                    return
                waiting.append(future)
                future.set_running_or_notify_cancel()
                socket.send_multipart([worker, b"task"])


def _answer(address: str, parent: int) -> None:
    import zmq

    context: Any = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.rcvtimeo = 1000
    socket.connect(address)
    socket.send(b"ready")
    while os.getppid() == parent:
        try:
            if socket.recv() == b"end":
                break
        except zmq.Again:
            continue
        socket.send(b"result")
    context.destroy(linger=0)
