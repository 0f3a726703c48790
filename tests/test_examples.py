"""The three programs of the tutorial, each as a real process, on ipc and on TCP.

Ctrl-C is what a terminal makes of it: SIGINT to the process group of the program.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = {
    "master": "square_master.py",
    "worker": "square_worker.py",
    "workers": "square_workers.py",
    "bare": "bare_worker.py",
}
GROUP_SIZE = 5
PATIENCE = 30.0


@dataclass(frozen=True)
class Addresses:
    """Where the programs of one test meet; empty lists leave the choice to the programs."""

    endpoint: list[str]
    group_workpoint: list[str]
    single_workpoint: list[str]
    home: str


@contextmanager
def ipc_addresses() -> Iterator[Addresses]:
    with tempfile.TemporaryDirectory(prefix="sq-") as home:
        yield Addresses(
            [f"ipc://{home}/master"], [f"ipc://{home}/group-$WID"], [f"ipc://{home}/single"], home
        )


@contextmanager
def default_addresses() -> Iterator[Addresses]:
    """No arguments: the programs must agree by themselves."""
    with tempfile.TemporaryDirectory(prefix="sq-") as home:
        yield Addresses([], [], [], home)


@contextmanager
def tcp_addresses() -> Iterator[Addresses]:
    # Ports below those that the system gives to outgoing connections.
    for prefix in random.sample(range(1100, 3200), 200):
        # $WID is the last digit: 1 to 5 for the group, 0 and 9 for the two others.
        if all(is_free(prefix * 10 + digit) for digit in range(10)):
            break
    else:
        pytest.fail("no free ports")
    host = f"tcp://127.0.0.1:{prefix}"
    with tempfile.TemporaryDirectory(prefix="sq-") as home:
        yield Addresses([f"{host}0"], [f"{host}$WID"], [f"{host}9"], home)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


ADDRESSES = {"ipc": ipc_addresses, "tcp": tcp_addresses, "default": default_addresses}


class Program:
    """A running program and what it has printed: squares are counted, other lines kept."""

    def __init__(self, name: str, arguments: list[str], home: str) -> None:
        self.name = name
        self.squares = 0
        self.wrong: list[str] = []
        self.lines: list[str] = []
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", str(EXAMPLES / SCRIPTS[name]), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "HOME": home},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"reader of {name}")
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.strip().lstrip(".")  # the master prints dots while it waits
            with self._news:
                if not text.isdigit():
                    self.lines.append(text)
                elif math.isqrt(int(text)) ** 2 == int(text):
                    self.squares += 1
                else:
                    self.wrong.append(text)
                self._news.notify_all()

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until its output makes the condition true."""
        with self._news:
            if not self._news.wait_for(condition, PATIENCE):
                pytest.fail(f"{self.name}: no {what} in {PATIENCE} s; printed {self.lines}")

    def wait_for_squares(self, count: int = 20) -> None:
        """Wait until it has printed so many squares more than now."""
        goal = self.squares + count
        self.wait_until(lambda: self.squares >= goal, "squares")
        assert self.wrong == []

    def interrupt(self) -> None:
        """Press Ctrl-C and wait for a clean end."""
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # faulthandler tells where it hangs
            self._reader.join(PATIENCE)
            printed = "\n".join(self.lines)
            pytest.fail(f"{self.name} still runs {PATIENCE} s after Ctrl-C; printed {printed}")
        self._reader.join(PATIENCE)
        assert status == 0, f"{self.name}: exit status {status}; printed {self.lines}"
        assert not [line for line in self.lines if "Traceback" in line], self.lines

    def children(self) -> set[int]:
        """The workers of a group, whoever their parent is."""
        found = set()
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if any("square_worker.py" in part for part in child.cmdline()):
                    found.add(child.pid)
            except psutil.Error:  # it has just ended
                continue
        return found

    def close(self) -> None:
        """After a failure nothing may be left running."""
        family = []
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
        for child in family:
            try:
                child.kill()
            except psutil.Error:
                continue
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        if self.process.stdout is not None:
            self.process.stdout.close()


@dataclass
class Desk:
    """A few terminals on which the programs are started."""

    at: Addresses
    stack: ExitStack

    def start(self, name: str) -> Program:
        workpoint = {
            "master": [],
            "worker": self.at.single_workpoint,
            "bare": [],
            "workers": self.at.group_workpoint,
        }
        program = Program(name, self.at.endpoint + workpoint[name], self.at.home)
        self.stack.callback(program.close)
        return program


@pytest.fixture
def desk(request: pytest.FixtureRequest) -> Iterator[Desk]:
    with ADDRESSES[request.param]() as addresses, ExitStack() as stack:
        yield Desk(addresses, stack)


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for something of which no event tells us: a process of somebody else."""
    deadline = time.monotonic() + PATIENCE
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen in {PATIENCE} s")
        pause.wait(0.02)


NAMES = ("master", "worker", "workers")


@pytest.mark.parametrize("desk", ["ipc", "tcp"], indirect=True)
@pytest.mark.parametrize("order", list(itertools.permutations(NAMES)), ids="-".join)
def test_any_order_of_starting_and_stopping(desk: Desk, order: tuple[str, ...]) -> None:
    programs = {name: desk.start(name) for name in order}
    programs["master"].wait_for_squares()
    for name in order:
        programs[name].interrupt()
    # Ctrl-C may come between a number and the end of its line.
    assert programs["master"].lines[-1].endswith("bye")


@pytest.mark.parametrize("desk", ["ipc", "tcp"], indirect=True)
def test_a_worker_written_from_the_protocol_page(desk: Desk) -> None:
    bare = desk.start("bare")
    for _ in range(2):
        master = desk.start("master")
        master.wait_for_squares()
        master.interrupt()
    os.kill(bare.process.pid, signal.SIGTERM)
    assert bare.process.wait(PATIENCE) == -signal.SIGTERM


@pytest.mark.parametrize("desk", ["ipc", "tcp"], indirect=True)
def test_sigterm_ends_a_worker_whose_master_is_gone(desk: Desk) -> None:
    worker, master = desk.start("worker"), desk.start("master")
    master.wait_for_squares()
    master.interrupt()
    worker.process.terminate()
    assert worker.process.wait(PATIENCE) == 0
    assert worker.lines == []


@pytest.mark.parametrize("desk", ["default"], indirect=True)
@pytest.mark.parametrize("helper", ["worker", "workers"])
def test_without_arguments_they_find_each_other(desk: Desk, helper: str) -> None:
    working, master = desk.start(helper), desk.start("master")
    master.wait_for_squares()
    master.interrupt()
    working.interrupt()


@pytest.mark.parametrize("desk", ["ipc", "tcp"], indirect=True)
def test_killed_workers_are_respawned_and_register_again(desk: Desk) -> None:
    workers, master = desk.start("workers"), desk.start("master")
    master.wait_for_squares()
    eventually(lambda: len(workers.children()) == GROUP_SIZE, "start of five workers")

    before = workers.children()
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    eventually(
        lambda: victim not in workers.children() and len(workers.children()) == GROUP_SIZE,
        "respawn of one worker",
    )
    master.wait_for_squares()

    # Only workers that were respawned and registered again can answer after this.
    for pid in workers.children():
        os.kill(pid, signal.SIGKILL)
    eventually(
        lambda: not workers.children() & before and len(workers.children()) == GROUP_SIZE,
        "respawn of all workers",
    )
    master.wait_for_squares(200)
    master.interrupt()
    last = workers.children()
    workers.interrupt()
    eventually(lambda: not any(map(psutil.pid_exists, last)), "end of the workers")


@pytest.mark.parametrize("desk", ["ipc", "tcp"], indirect=True)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["stopped", "killed"])
def test_running_workers_find_a_master_that_comes_back(desk: Desk, how: signal.Signals) -> None:
    workers, master = desk.start("workers"), desk.start("master")
    master.wait_for_squares()
    eventually(lambda: len(workers.children()) == GROUP_SIZE, "start of five workers")
    before = workers.children()
    if how == signal.SIGINT:
        master.interrupt()
    else:
        master.process.kill()
        master.process.wait(PATIENCE)

    again = desk.start("master")
    again.wait_for_squares()
    assert workers.children() == before
    again.interrupt()
    workers.interrupt()
