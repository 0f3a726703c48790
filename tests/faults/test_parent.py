"""However the program ends, and whenever: nothing of the pool outlives it."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import textwrap
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zmqexecutor import ZmqExecutor
from zmqexecutor.system import directories

from ..conftest import eventually

PROGRAM = """
import os, signal, subprocess, sys, time
from zmqexecutor import ZmqExecutor

def work(directory, number, seconds):
    open(os.path.join(directory, f"{os.getpid()} {os.getppid()}"), "w").close()
    if seconds:
        subprocess.run(["sleep", seconds])
    else:
        time.sleep(1000)

if __name__ == "__main__":
    directory, ending, seconds = sys.argv[1:]
    executor = ZmqExecutor(2)
    futures = [executor.submit(work, directory, i, seconds) for i in range(8)]
    while len(os.listdir(directory)) < 2:
        time.sleep(0.005)
    print("running", flush=True)
    if ending == "uncaught exception":
        raise ZeroDivisionError("on purpose")
    if ending == "os._exit":
        os._exit(3)
    if ending == "Ctrl-C":
        futures[0].result()
    time.sleep(1000)
"""
MARK = "ZMQEXECUTOR_TEST_PARENT"


class Program:
    """The program in a session of its own, and what is there of its processes and files."""

    def __init__(self, ending: str, directory: Path, terminal: int | None = None) -> None:
        self.mark = f"{MARK}={uuid.uuid4().hex}"
        self.notes = directory / "notes"
        self.notes.mkdir()
        script = directory / "program.py"
        script.write_text(textwrap.dedent(PROGRAM))
        seconds = "0.1" if ending == "uncaught exception" else "1000"
        if ending == "killed with its supervisor":
            seconds = ""  # nobody is left who would end what the task has started
        name, _, value = self.mark.partition("=")

        def prepare() -> None:
            for signum in (signal.SIGINT, signal.SIGHUP):  # a shell's job, or nohup's
                signal.signal(signum, signal.SIG_DFL)
            if terminal is not None:
                fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, str(script), str(self.notes), ending, seconds],
            stdin=subprocess.DEVNULL if terminal is None else terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, name: value},
            start_new_session=True,
            preexec_fn=prepare,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "running\n"

    @property
    def pid(self) -> int:
        return self.process.pid

    def supervisor(self) -> int:
        return int(next(self.notes.iterdir()).name.split()[1])

    def living(self) -> list[int]:
        """Processes with the mark in their environment."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
                except OSError:
                    pass
        return found

    def directories(self) -> list[Path]:
        roots = [Path(base, f"zmqexecutor-{os.geteuid()}") for base in directories._bases()]
        return [path for root in roots for path in root.glob(f"{self.pid}-*")]

    def clean_up(self) -> None:
        for pid in self.living():
            os.kill(pid, signal.SIGKILL)
        self.process.communicate()


Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    programs: list[Program] = []

    def start_program(ending: str, terminal: int | None = None) -> Program:
        directory = tmp_path / str(len(programs))
        directory.mkdir()
        programs.append(Program(ending, directory, terminal))
        return programs[-1]

    yield start_program
    for program in programs:
        program.clean_up()


@pytest.mark.parametrize(
    ("ending", "returncode"),
    [
        ("SIGKILL", -signal.SIGKILL),
        ("SIGTERM", -signal.SIGTERM),
        ("Ctrl-C", -signal.SIGINT),
        ("os._exit", 3),
        ("uncaught exception", 1),
    ],
)
def test_nothing_outlives_the_program(start: Start, ending: str, returncode: int) -> None:
    """With tasks that run, in processes of their own, and tasks that wait."""
    program = start(ending)
    if ending.startswith("SIG"):
        os.kill(program.pid, getattr(signal, ending))
    elif ending == "Ctrl-C":
        os.killpg(program.pid, signal.SIGINT)
    assert program.process.wait(60) == returncode
    assert eventually(lambda: not program.living(), 10), program.living()
    assert eventually(lambda: not program.directories(), 10), program.directories()


def test_nothing_outlives_a_closed_terminal(start: Start) -> None:
    ours, theirs = pty.openpty()
    try:
        program = start("closed terminal", theirs)
    finally:
        os.close(theirs)
        os.close(ours)  # the kernel sends SIGHUP to who holds the terminal
    assert program.process.wait(60) == -signal.SIGHUP
    assert eventually(lambda: not program.living(), 10), program.living()
    assert eventually(lambda: not program.directories(), 10), program.directories()


def test_parent_and_supervisor_are_killed_together(start: Start) -> None:
    """The kernel ends the workers; the next start sweeps, and touches nothing that lives."""

    def leave_a_directory() -> list[Path]:
        program = start("killed with its supervisor")
        program.process.send_signal(signal.SIGSTOP)  # not to start another one meanwhile
        os.kill(program.supervisor(), signal.SIGKILL)
        os.kill(program.pid, signal.SIGKILL)
        program.process.wait(60)
        assert eventually(lambda: not program.living(), 10), program.living()
        return program.directories()

    with ZmqExecutor(1) as neighbour:
        assert neighbour.submit(pow, 2, 2).result(60) == 4
        # Another program of this user may start an executor just then.
        (left,) = next(filter(None, (leave_a_directory() for _ in range(10))))
        with ZmqExecutor(1) as another:
            assert not left.exists()
            assert another.submit(pow, 2, 3).result(60) == 8
        assert neighbour.submit(os.path.exists, "/").result(60)
        assert neighbour.submit(pow, 2, 4).result(60) == 16
