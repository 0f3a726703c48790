"""Runs the workloads over the peers, in rounds, each peer in a process of its own.

In each round every peer is made, does all workloads, and is shut down; the order of
the peers changes from round to round, so that a busy moment of the machine hits none in
particular. One peer in one workload is a cell. A cell that takes too long, or fails, is
noted and not tried again, and its peer goes on with the next workload in a new process.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.base import SCALES, Scale, Workload
from benchmarks.peers import PEERS

_MARK = "ZMQEXECUTOR_BENCHMARK"
OPEN_SECONDS = 60.0

Progress = Callable[[str], None]


@dataclass
class Samples:
    """What was found.

    Attributes:
        values: peer, then `workload:figure`, then one value for each round.
        notes: peer, then workload: why there is no value.
        reasons: the same, at length.
        seconds: peer, then how long all of it took.
        rounds: how many there were.
    """

    values: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    notes: dict[str, dict[str, str]] = field(default_factory=dict)
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rounds: int = 0

    def add(self, peer: str, workload: Workload, reply: dict[str, Any]) -> None:
        for key, value in reply.get("figures", {}).items():
            values = self.values.setdefault(peer, {})
            values.setdefault(f"{workload.name}:{key}", []).append(value)
        if "no" in reply:
            self.notes.setdefault(peer, {})[workload.name] = reply["no"]
        if "error" in reply:
            late = reply["error"].startswith("no answer within")
            self.notes.setdefault(peer, {})[workload.name] = "too long" if late else "error"
            self.reasons.setdefault(peer, {})[workload.name] = reply["error"]


class Host:
    """The process of one peer."""

    def __init__(self, peer: str, workers: int, scale: str) -> None:
        self._mark = uuid.uuid4().hex
        self._connection, theirs = socket.socketpair()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `end`)
        # One thread for each worker: numpy's own would make it a benchmark of BLAS.
        threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        # Where parsl and ipyparallel look for their programs.
        path = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", os.defpath)
        # With it each interpreter would compile our modules, and no others, at its start.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        arguments = [peer, str(workers), scale, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.host", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                env={**environment, **threads, "PATH": path, _MARK: self._mark},
                cwd=Path(__file__).parent.parent,
                start_new_session=True,
            )
        self._lines = self._connection.makefile("rw")

    def ask(self, what: str, seconds: float) -> dict[str, Any]:
        """Have it do something; what went wrong, or took too long, is an "error"."""
        try:
            self._lines.write(json.dumps(what) + "\n")
            self._lines.flush()
            if not select.select([self._connection], [], [], seconds)[0]:
                return {"error": f"no answer within {seconds:g} s"}
            if line := self._lines.readline():
                reply: dict[str, Any] = json.loads(line)
                return reply
        except OSError:
            pass  # it is gone, as when it closes the connection
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        return {"error": f"its process ended: {last}"[:300]}

    def end(self, patient: bool) -> None:
        """Shut the peer down, and kill what is left of it."""
        # Some change their titles, and with them what can be seen of their environment.
        left = _descendants(self._process.pid)
        if patient:
            self.ask("close", 20)
        self._lines.close()
        self._connection.close()
        if patient:
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                pass  # and killed below
        for process in psutil.process_iter():
            try:
                if process in left or process.environ().get(_MARK) == self._mark:
                    process.kill()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                pass  # not one of ours, or gone
        self._process.wait()
        self._errors.close()


def _descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def run(
    peers: Sequence[str],
    workloads: Sequence[Workload],
    scale_name: str,
    workers: int,
    progress: Progress,
) -> Samples:
    """Take every figure, once in each round."""
    scale = SCALES[scale_name]
    samples = Samples()
    begin = time.perf_counter()
    for number in range(scale.rounds):
        if time.perf_counter() - begin > scale.patience:
            break  # a slow machine
        samples.rounds += 1
        shift = number % len(peers)
        for peer in [*peers[shift:], *peers[:shift]]:
            todo = [
                workload
                for workload in workloads
                if workload.concerns(peer)
                and number < workload.rounds_at(scale)
                and workload.name not in samples.notes.get(peer, {})
            ]
            start = time.perf_counter()
            if todo:
                label = f"round {number + 1} of {scale.rounds}, {peer}: "
                _one_round(
                    peer, todo, scale_name, workers, samples, lambda t, h=label: progress(h + t)
                )
            samples.seconds[peer] = samples.seconds.get(peer, 0.0) + time.perf_counter() - start
    progress("")
    return samples


def _one_round(
    peer: str,
    todo: Sequence[Workload],
    scale_name: str,
    workers: int,
    samples: Samples,
    progress: Progress,
) -> None:
    host: Host | None = None
    for workload in todo:
        progress(workload.name)
        if host is None:
            host = Host(peer, workers, scale_name)
            if not workload.own_pool:
                opened = host.ask("open", OPEN_SECONDS)
                if "error" in opened:
                    host.end(patient=False)
                    for missed in todo[todo.index(workload) :]:
                        samples.add(peer, missed, opened)
                    return
        reply = host.ask(workload.name, _limit(peer, workload, SCALES[scale_name]))
        samples.add(peer, workload, reply)
        if "error" in reply:
            host.end(patient=False)
            host = None
    if host is not None:
        host.end(patient=True)


def _limit(peer: str, workload: Workload, scale: Scale) -> float:
    """Seconds; those that start servers have a second start of them in their time."""
    limit = workload.cell if workload.cell and scale is SCALES["full"] else scale.cell
    return limit + 20 if workload.own_pool and PEERS[peer].heavy else limit
