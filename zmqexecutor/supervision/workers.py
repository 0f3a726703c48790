"""A group of processes that Circus keeps alive: the parent's handle on it.

`Workers` starts the supervisor process (see `supervisor`), tells it over a socket
pair what to run, and hears from it of every start and end of a process. Circus
and Tornado live over there only; here no thread is started, no signal handler is
set, and no child is waited for but the supervisor.

Two ways to use a group:

- `run()` blocks until `stop()`, as a program does that only keeps workers alive;
- `start()`, then `fileno()` in a poller of one's own and `receive()` when it is
  readable, as the master does.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final

from ..errors import ForkedExecutorError
from ..system.arguments import check_integer, check_seconds
from ..system.directories import PrivateDirectory
from ..system.limits import check_rlimits
from ..wire.protocol import Configure, GroupFailed, Preloaded, Quit, Scale
from .restarts import PERIOD, RESTARTS, Restarts
from .supervisor_link import TERM_GRACE, Event, SupervisorLink
from .supervisor_process import SupervisorProcess

__all__ = ["Workers"]

STOP_MARGIN: Final = 1.0
"""Seconds that a supervisor has for its own end, beside its processes' grace."""
LONGEST_GRACE: Final = 1e6
"""Seconds; a poll cannot wait for much longer."""


class Workers:
    """Keeps `numprocesses` copies of a command alive, by Circus in a process of its own.

    A process that ends is replaced at once. Processes have no standard input,
    share standard output with this program, and their standard error arrives on
    this program's. They end when this program ends, however it ends.

    Instances may be used from several threads. In a child process made by
    `os.fork` an instance does nothing and its group goes on undisturbed.

    Attributes:
        cmd: the arguments of the command, the program first.
        numprocesses: how many are kept alive.
        directory: where Circus's own sockets are, or None before `start`.
    """

    preloaded: Preloaded | None = None
    """What the command does, if its processes may be forked (see `template`)."""
    supervisor: SupervisorProcess | None = None
    """The first supervisor, if it has been started already."""

    def __init__(
        self,
        cmd: str | Sequence[str],
        numprocesses: int = 5,
        *,
        env: Mapping[str, str] | None = None,
        working_dir: str | None = None,
        graceful_timeout: float = 5.0,
        directory: str | None = None,
        remove_directory: bool = False,
        rlimits: Mapping[str, int] | None = None,
    ) -> None:
        """Describe the group; nothing is started yet.

        Args:
            cmd: the command: text, split as a shell would, or a sequence of exact
                arguments. In each `$WID` (or `$(circus.wid)`) becomes a number
                that no other living process of the group has.
            numprocesses: how many to keep alive; may be 0.
            env: variables set for the processes beside those of this program.
            working_dir: where the processes run; by default, where this program does.
            graceful_timeout: seconds between SIGTERM and SIGKILL for a process that
                is stopped.
            directory: an existing private directory (mode 0700) for Circus's
                sockets; by default one is made and removed. `stop` leaves a given
                one alone, but the supervisor removes it when this program dies or
                drops the group without `stop`.
            remove_directory: let `stop` have the supervisor remove a given directory
                too. What this program then has no time for, it need not do.
            rlimits: resource limits of each process, by their names in lower case
                without `RLIMIT_`, as Circus takes them: "as", "data", "stack",
                "core" and "fsize" in bytes, "cpu" in seconds of processor time,
                "nofile" and "nproc" in numbers, and so on (see `resource`). Each is
                both the soft and the hard limit. If the system refuses one, the
                group fails.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument has an impossible value.
        """
        self.cmd = _check_cmd(cmd)
        self.numprocesses = _check_number(numprocesses)
        grace = check_seconds("graceful_timeout", graceful_timeout)
        if not 0 <= grace <= LONGEST_GRACE:
            raise ValueError(
                f"graceful_timeout must be 0 to {LONGEST_GRACE:.0f} seconds, not {graceful_timeout}"
            )
        self.directory = directory
        self._given_directory = directory
        self._private: PrivateDirectory | None = None
        self._env = None if env is None else dict(env)
        self._remove_directory_too = remove_directory or directory is None
        self._rlimits = check_rlimits(rlimits)
        self._working_dir = None if working_dir is None else os.path.abspath(working_dir)
        self._graceful_timeout = grace
        self._owner = os.getpid()
        self._link: SupervisorLink | None = None
        self._closed = False
        self._stopping = False
        self._lifecycle = threading.RLock()

    # ------------------------------------------------------------- life

    def start(self) -> None:
        """Start the group in the background, and return at once.

        Raises:
            RuntimeError: it is started already.
            OSError: the supervisor or its directory cannot be made.
        """
        self._check_owner()
        with self._lifecycle:
            if self._link is not None:
                raise RuntimeError(
                    "this group is started already; call stop() before starting it again"
                )
            if self._given_directory is None:
                self._private = PrivateDirectory()
                self.directory = self._private.path
            self._stopping = False
            try:
                self._launch()
            except BaseException:
                self._remove_directory()
                raise

    def restart(self) -> None:
        """Start a new supervisor after `closed` has told the end of the last one.

        What the old one's processes were is lost: all of them are killed first.

        Raises:
            RuntimeError: the group is not started, or its supervisor lives.
            OSError: the supervisor cannot be started.
        """
        self._check_owner()
        with self._lifecycle:
            if self._link is None or not self._closed:
                raise RuntimeError("only a group whose supervisor has ended can be restarted")
            self._link.kill()
            self._link.wait(None)
            self._link.close()
            self._launch()

    def run(self) -> None:
        """Start the group if need be, and keep it until `stop` is called elsewhere.

        A supervisor that ends unasked is replaced, up to three times within a
        minute. KeyboardInterrupt and what other signal handlers raise come
        through at once; call `stop` then.

        Raises:
            RuntimeError: processes cannot be started at all, or the supervisor
                ended too often; the message says why.
        """
        self._check_owner()
        if self._link is None:
            self.start()
        restarts = Restarts()
        while True:
            self._wait_readable(None)
            for event in self.receive():
                if isinstance(event, GroupFailed):
                    raise RuntimeError(event.reason)
            if not self._closed:
                continue
            with self._lifecycle:  # held by a stop() in progress
                if self._stopping or self._link is None:
                    return
                if not restarts.add(time.monotonic()):
                    raise RuntimeError(
                        f"the supervisor process ended {RESTARTS + 1} times within "
                        f"{PERIOD:.0f} seconds, the last time with exit code "
                        f"{self._link.wait(TERM_GRACE)}; its standard error says why, if "
                        "nobody killed it"
                    )
                self.restart()

    def stop(self, timeout: float | None = None, *, with_children: bool = False) -> None:
        """Stop all processes and the supervisor, in bounded steps.

        They are asked, then killed. Nothing happens if the group is not running.

        Args:
            timeout: seconds between SIGTERM and SIGKILL for the processes; by
                default the group's `graceful_timeout`. The whole stop takes up to
                two seconds more.
            with_children: send SIGTERM also to what the processes have started in their
                process groups. Otherwise that ends only with a process that is killed.
        """
        if self._owner != os.getpid():
            return
        grace = self._graceful_timeout
        if timeout is not None:
            grace = min(max(0.0, timeout), LONGEST_GRACE)
        self._stopping = True
        with self._lifecycle:
            link = self._link
            if link is None:
                return
            try:
                message = Quit(grace, self._remove_directory_too, with_children)
                link.send(message, timeout=STOP_MARGIN)
                if not link.wait_end(grace + STOP_MARGIN):
                    link.signal(signal.SIGTERM)
                    link.wait_end(TERM_GRACE)
            except (OSError, RuntimeError):
                link.wait_end(0.0)  # it is gone, or does not listen
            finally:
                if not link.ended:
                    link.kill()
                link.wait(TERM_GRACE)
                link.close()
                self._link = None
                self._closed = True
                self._remove_directory()

    def terminate(self) -> None:
        """Have the supervisor end now if all its processes have, else as by `stop`.

        Returns at once. It need not have come so far that it would hear of `stop`, which is
        still needed to clean up.
        """
        link = self._link
        if link is not None and self._owner == os.getpid():
            link.signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL for the supervisor, every known process and what that has started, at once.

        Takes no lock and does not wait, so that a signal handler may call it.
        `stop` is still needed to clean up.
        """
        link = self._link
        if link is not None and self._owner == os.getpid():
            link.kill()

    def scale(self, numprocesses: int, *, spare: bool = False) -> None:
        """Keep this many processes alive from now on; the youngest go first.

        It also makes the supervisor forget earlier failures: a replacement that
        was put off, because processes died again and again right after their
        start, is started at once.

        Args:
            numprocesses: how many; may be 0, and may be the same as before.
            spare: let surplus processes end by themselves instead of stopping them.

        Raises:
            RuntimeError: the supervisor is gone or takes no commands; `restart` starts so many.
            TypeError: the number is not an int.
            ValueError: the number is negative.
        """
        self._check_owner()
        self.numprocesses = _check_number(numprocesses)
        link = self._link
        if link is not None:
            link.send(Scale(self.numprocesses, spare))

    # ------------------------------------------------------------- watching it

    def fileno(self) -> int:
        """The descriptor to poll for reading; when it is readable, call `receive`.

        It changes with `restart`. Once `closed` is true it stays readable.

        Raises:
            RuntimeError: the group is not started.
        """
        link = self._link
        if link is None:
            raise RuntimeError("this group is not running; call start() first")
        return link.socket.fileno()

    def receive(self) -> list[Event]:
        """What has been heard from the supervisor since the last call; never waits.

        For each process `Spawned` comes before `Reaped`, and each comes once.
        `GroupFailed` tells that no process can be started any more; `scale` makes
        the supervisor try again. When the supervisor has ended, `closed` becomes
        true after the last event; its processes end with it, without `Reaped`.
        """
        link = self._link
        if link is None or self._owner != os.getpid():
            return []
        events = link.receive()
        if link.ended:
            self._closed = True
        return events

    @property
    def closed(self) -> bool:
        """Whether `receive` has come to the supervisor's end (asked for or not)."""
        return self._closed

    @property
    def hung_up(self) -> bool:
        """Whether that is because this process is exiting."""
        return self._link is not None and self._link.hung_up

    @property
    def alive(self) -> bool:
        """Whether the supervisor process is running."""
        link = self._link
        return link is not None and link.process.poll() is None

    @property
    def supervisor_pid(self) -> int | None:
        """The supervisor's process id, or None if the group is not started."""
        link = self._link
        return None if link is None else link.process.pid

    @property
    def pids(self) -> frozenset[int]:
        """The living processes, as far as `receive` has told."""
        link = self._link
        return frozenset() if link is None else frozenset(link.pids)

    # ------------------------------------------------------------- the rest

    def _launch(self) -> None:
        assert self.directory is not None
        config = Configure(
            self.cmd,
            self.numprocesses,
            self.directory,
            self._env,
            self._working_dir,
            self._graceful_timeout,
            rlimits=self._rlimits,
            preloaded=self.preloaded,
        )
        ahead, self.supervisor = self.supervisor, None
        link = None
        if ahead is not None:
            with contextlib.suppress(RuntimeError):  # it has been killed since
                link = SupervisorLink(config, ahead)
        self._link = link or SupervisorLink(config)
        self._closed = False

    def _wait_readable(self, timeout: float | None) -> None:
        link = self._link
        if link is not None:
            link.wait_readable(timeout)

    def _check_owner(self) -> None:
        if self._owner != os.getpid():
            raise ForkedExecutorError(
                "this group was made before os.fork() and belongs to the parent process; "
                "make a new one here"
            )

    def _remove_directory(self) -> None:
        if self._private is not None:
            self._private.close()
            self._private = None
            self.directory = None

    def __enter__(self) -> Workers:
        """Start the group if need be."""
        if self._link is None:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it."""
        self.stop()

    def __repr__(self) -> str:
        state = "stopped" if self._link is None else f"supervisor {self.supervisor_pid}"
        return f"<Workers {shlex.join(self.cmd)!r} x {self.numprocesses}, {state}>"


def _check_cmd(cmd: str | Sequence[str]) -> list[str]:
    if isinstance(cmd, str):
        try:
            parts = shlex.split(cmd)
        except ValueError as error:
            raise ValueError(f"cmd {cmd!r} cannot be split: {error}; give a list instead") from None
    else:
        try:
            parts = list(cmd)
        except TypeError:
            raise TypeError(f"cmd must be text or a sequence of arguments, not {cmd!r}") from None
    if not parts or not parts[0]:
        raise ValueError("cmd is empty; give a program and its arguments")
    for part in parts:
        if not isinstance(part, str):
            raise TypeError(f"cmd must consist of text, but has {part!r}")
        if "\0" in part:
            raise ValueError(f"cmd has a null character in {part!r}")
    return parts


def _check_number(numprocesses: int) -> int:
    if check_integer("numprocesses", numprocesses) < 0:
        raise ValueError(f"numprocesses must be 0 or more, not {numprocesses}")
    return numprocesses
