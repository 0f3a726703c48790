"""Many workers that are none: they speak the protocol, and do nothing.

Written from docs/protocol.md. A few processes hold hundreds of them each, so that the
master is what is measured and not hundreds of interpreters on a few processors. They have
no journal, as workers in other languages, so a master sends them one job at a time. They
name no machine, so the master learns by pings whether they are there.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import tempfile
import time
import uuid
from typing import Any

import zmq
from msgspec.msgpack import decode, encode

PROCESSES = 4


class Fake:
    """One such worker; whoever holds it polls its descriptors, and calls `control` or `work`."""

    def __init__(self, context: Any, endpoint: str) -> None:
        self.name = uuid.uuid4().hex
        self._control_socket = self._open(context)
        self._work_socket = self._open(context)
        self._control_socket.immediate = True
        self._control_socket.connect(endpoint)
        hello = ["Hello", 1, self.name, os.getpid(), os.uname().nodename, "", None, None]
        self._control_socket.send(encode(hello))  # blocks until there is a connection

    def _open(self, context: Any) -> Any:
        socket = context.socket(zmq.DEALER)
        socket.routing_id = self.name.encode()
        socket.linger = 0
        return socket

    def sources(self) -> list[tuple[int, Any]]:
        """Descriptors that become readable once per change, and what to call then."""
        return [
            (self._control_socket.getsockopt(zmq.FD), self.control),
            (self._work_socket.getsockopt(zmq.FD), self.work),
        ]

    def control(self) -> None:
        for frame in _messages(self._control_socket):
            kind, *fields = decode(frame)
            if kind == "Welcome":
                self._work_socket.connect(fields[1])
                self._work_socket.send(encode(["Ready", self.name]))
            elif kind == "Refused":
                raise RuntimeError(fields[0])
        self.work()  # to send may have used up the sign that something has come

    def work(self) -> None:
        for frame in _messages(self._work_socket):
            results = [[job[0], True, job[2], job[3], 0.0] for job in decode(frame)[2]]
            if results:
                self._work_socket.send(encode(["Results", 0, results]))

    def close(self) -> None:
        self._control_socket.close()
        self._work_socket.close()


def _messages(socket: Any) -> Any:
    """Until there are none: the descriptor tells only of the first."""
    while True:
        try:
            yield socket.recv(zmq.DONTWAIT)
        except zmq.Again:
            return


def hold(endpoint: str, count: int, parent: int) -> None:
    """Be the process of so many fakes, until the parent has ended or kills it."""
    from benchmarks.life import raise_descriptor_limit

    raise_descriptor_limit(count * 6 + 200)
    context: Any = zmq.Context()
    context.set(zmq.MAX_SOCKETS, count * 2 + 10)
    poll = select.epoll()
    calls: dict[int, Any] = {}
    fakes = [Fake(context, endpoint) for _ in range(count)]
    for fake in fakes:
        for descriptor, call in fake.sources():
            calls[descriptor] = call
            poll.register(descriptor, select.EPOLLIN | select.EPOLLET)
            call()
    while os.getppid() == parent:
        for descriptor, _ in poll.poll(1):
            calls[descriptor]()


def dispatch(workers: int, jobs: int) -> dict[str, float]:
    """Send jobs to so many fakes; the rate, and the processor time of this process for each."""
    from zmqexecutor import JobRunner

    processes = min(PROCESSES, workers)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as directory:
        endpoint = f"ipc://{directory}/m"
        shares = [workers // processes + (k < workers % processes) for k in range(processes)]
        holders = [
            spawn.Process(target=hold, args=(endpoint, share, os.getpid()), daemon=True)
            for share in shares
        ]
        with JobRunner(endpoint, patience=None) as runner:
            start = time.perf_counter()
            for holder in holders:
                holder.start()
            try:
                while len(runner.workers) < workers:
                    if time.perf_counter() - start > 50:
                        raise TimeoutError(f"{len(runner.workers)} of {workers} registered")
                    time.sleep(0.01)
                registration = (time.perf_counter() - start) / workers
                for future in [runner.submit("", b"x") for _ in range(workers)]:
                    future.result()
                start, cpu = time.perf_counter(), time.process_time()
                futures = [runner.submit("", b"x") for _ in range(jobs)]
                for future in futures:
                    future.result()
                seconds = time.perf_counter() - start
                cpu = time.process_time() - cpu
            finally:
                for holder in holders:
                    holder.kill()
                    holder.join()
    return {"rate": jobs / seconds, "cpu": cpu / jobs, "registration": registration}
