"""Runs a suite's tests one by one in a process of its own, the runner.

    pytest                                      the runner
    Driver.run(test) ──── {"test": ...} ────►   serve() ──► run_one(test)
                     ◄─── {"outcome": ...} ──

The runner's output goes to a file, of which each failure shows its part. A runner
that crashes or hangs costs one test: the next test gets a new one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

__all__ = ["Driver", "Outcome", "UpstreamFailed", "serve"]

TESTS = Path(__file__).resolve().parent.parent
BOOT = "import sys; sys.path.append({path!r}); from upstream.{module} import main; main()"
STARTING = 30.0  # seconds for a runner to say that it is ready
DUMPING = 1.0  # seconds for a runner to write its stacks


class UpstreamFailed(Exception):  # noqa: N818  (it reads as what happened)
    """A test of the suite failed, crashed its process or took too long."""


class Outcome(NamedTuple):
    """What became of a test: `passed`, `skipped` or `failed`, and the reason."""

    outcome: str
    text: str = ""


class Driver:
    """The parent's handle on a runner, which is started when the first test needs it."""

    def __init__(self, module: str, args: Sequence[str], limit: float) -> None:
        """Name the runner's module in this package, and its arguments.

        `limit` is how many seconds one test may take.
        """
        self._command = [sys.executable, "-c", BOOT.format(path=str(TESTS), module=module)]
        self._args = list(args)
        self._limit = limit
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._lines: IO[str] | None = None
        self._log = tempfile.NamedTemporaryFile(prefix="upstream-", suffix=".log")  # noqa: SIM115
        self._directory = tempfile.TemporaryDirectory(prefix="upstream-")

    def run(self, test: str) -> Outcome:
        """Run one test, and return what became of it."""
        start = self._log.seek(0, os.SEEK_END)
        if self._process is None:
            self._start()
        assert self._channel is not None
        self._channel.settimeout(self._limit)
        try:
            self._channel.sendall(json.dumps({"test": test}).encode() + b"\n")
            reply = self._receive()
        except TimeoutError:
            reply = Outcome("failed", f"it has not ended after {self._limit:g} s")
            self._kill()
        except (EOFError, OSError) as error:
            reply = Outcome("failed", f"the runner ended ({error}, {self._kill()})")
        if reply.outcome != "failed":
            return reply
        self._log.seek(start)
        output = self._log.read().decode(errors="replace")
        return reply._replace(text=f"{reply.text}\n----- its output:\n{output}")

    def close(self) -> None:
        """End the runner."""
        if self._process is not None:
            assert self._channel is not None
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_WR)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                pass
            self._kill()
        self._log.close()
        self._directory.cleanup()

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno()), *self._args],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                cwd=self._directory.name,
                env=_environment(),
                start_new_session=True,
            )
        self._lines = self._channel.makefile("r")
        self._channel.settimeout(STARTING)
        try:
            ready = self._receive()
        except (TimeoutError, EOFError, OSError) as error:
            self._kill()
            ready = Outcome("failed", f"it did not start: {error!r}")
        if ready.outcome != "ready":
            self._log.seek(0)
            raise RuntimeError(f"{ready.text}\n{self._log.read().decode(errors='replace')}")

    def _receive(self) -> Outcome:
        assert self._lines is not None
        line = self._lines.readline()
        if not line:
            raise EOFError("the connection was closed")
        return Outcome(**json.loads(line))

    def _kill(self) -> int:
        """End the runner and its process group, after it has written its stacks."""
        assert self._process is not None
        assert self._channel is not None
        assert self._lines is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(DUMPING)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self._lines.close()
        self._channel.close()
        self._process = None
        return code


def _environment() -> dict[str, str]:
    """Return the environment without what tells Python to behave in another way."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return {key: value for key, value in kept.items() if not key.startswith("PYTEST")}


def serve(run_one: Callable[[str], Outcome]) -> None:
    """Be a runner, on the channel that the first argument names, until it is closed."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # Crashes are part of the tests; nobody wants the cores.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    with channel, channel.makefile("r") as lines:
        channel.sendall(_encode(Outcome("ready")))
        for line in lines:
            start = time.monotonic()
            outcome = run_one(json.loads(line)["test"])
            channel.sendall(_encode(outcome))
            print(f"{outcome.outcome} after {time.monotonic() - start:.2f} s", flush=True)


def _encode(outcome: Outcome) -> bytes:
    return json.dumps(outcome._asdict()).encode() + b"\n"
