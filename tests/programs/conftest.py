"""Whole programs, each in a process of its own, with our pool and the standard library's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import psutil
import pytest

from zmqexecutor.system import directories

from ..conftest import eventually

IMPORTS = {
    "ours": "from zmqexecutor import ZmqExecutor as Pool",
    "standard": "from concurrent.futures import ProcessPoolExecutor as Pool",
}
"""The one line in which the programs differ."""
MARK = "ZMQEXECUTOR_TEST_PROGRAM"
"""A variable of the environment by which the processes of a program are known."""
PATIENCE = 60

Done: TypeAlias = "subprocess.CompletedProcess[str]"


class Program:
    """Runs programs in a directory of their own, and looks at what they leave behind."""

    def __init__(self, pool: str, directory: Path) -> None:
        self.pool = pool
        self.directory = directory
        self._pids: list[int] = []
        self.mark = uuid.uuid4().hex
        self.environment = dict(os.environ, **{MARK: self.mark})
        for name in ("PYTHONWARNINGS", "PYTHONUNBUFFERED"):
            self.environment.pop(name, None)

    @property
    def ours(self) -> bool:
        return self.pool == "ours"

    def has_defect(self, request: pytest.FixtureRequest, diagnosis: str) -> None:
        """Expect the test to fail with our pool, though it passes with the other."""
        if self.ours:
            request.applymarker(pytest.mark.xfail(strict=True, reason=diagnosis))

    def text(self, source: str) -> str:
        return f"{IMPORTS[self.pool]}\n{textwrap.dedent(source)}"

    def write(self, name: str, source: str) -> Path:
        """Write a file into the program's directory."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return path

    def __call__(self, source: str, *arguments: str) -> str:
        """Run a script that succeeds, and return what it prints."""
        done = self.finish(source, *arguments)
        assert done.returncode == 0, done.stderr
        if self.ours:
            assert done.stderr == ""
        return done.stdout

    def finish(self, source: str, *arguments: str) -> Done:
        """Run a script, however it ends."""
        script = self.write("script.py", self.text(source))
        return self.execute([str(script), *arguments])

    def execute(
        self, arguments: Sequence[str], *, stdin: str = "", cwd: Path | None = None
    ) -> Done:
        """Run this interpreter with these arguments until it ends."""
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd or self.directory,
            env=self.environment,
        )
        self._pids.append(process.pid)
        with process:
            try:
                out, err = process.communicate(stdin, timeout=PATIENCE)
            except subprocess.TimeoutExpired as late:
                process.kill()
                raise AssertionError(f"it never ends; it wrote {late.stdout!r}, {late.stderr!r}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(self, source: str) -> subprocess.Popen[str]:
        """Start a script in a process group of its own, as a shell does, Ctrl-C at default."""
        script = self.write("script.py", self.text(source))
        # Its private directory is not looked for: a second Ctrl-C may cut its removal short.
        return subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env=self.environment,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        )

    def processes(self) -> list[psutil.Process]:
        """Those that this program started, and that are not gone yet."""
        found = []
        word = f"{MARK}={self.mark}".encode()
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                if word in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                    found.append(psutil.Process(int(entry)))
            except (OSError, psutil.NoSuchProcess):
                pass
        return found

    def check_left(self) -> None:
        """Fail if there is a process or a private directory of the program still."""
        assert eventually(lambda: not self.processes(), 15), self.processes()
        roots = [Path(base, f"zmqexecutor-{os.geteuid()}") for base in directories._bases()]
        left = [path for root in roots for pid in self._pids for path in root.glob(f"{pid}-*")]
        assert left == []


@pytest.fixture(autouse=True)
def no_leaks() -> None:
    """Nothing of this process; what programs could leave behind is looked for with `Program`."""


def _program(pool: str, directory: Path) -> Iterator[Program]:
    program = Program(pool, directory)
    try:
        yield program
        if program.ours:
            program.check_left()
    finally:
        for process in program.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass


@pytest.fixture(params=list(IMPORTS))
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Program]:
    """Run the program with our pool, and with the standard library's."""
    yield from _program(request.param, tmp_path)


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Program]:
    """Run a program that the standard library's pool cannot run, or not like this."""
    yield from _program("ours", tmp_path)
