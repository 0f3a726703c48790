"""Groups of real processes under a real supervisor."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import select
import shlex
import signal
import stat
import subprocess
import sys
import termios
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from tests.conftest import run_in_supervisors
from zmqexecutor.errors import ForkedExecutorError
from zmqexecutor.master.fleet import Fleet
from zmqexecutor.supervision.restarts import Restarts
from zmqexecutor.supervision.workers import Workers
from zmqexecutor.wire.protocol import GroupFailed, Reaped, Spawned

T = TypeVar("T", Spawned, Reaped, GroupFailed)

PYTHON = [sys.executable, "-S", "-E", "-c"]
IDLE = [*PYTHON, "import time; time.sleep(1000)"]
DEADLINE = 20.0  # seconds for what takes milliseconds, on a machine that is busy


def until(condition: Callable[[], object], timeout: float = DEADLINE) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.005)


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class Watch:
    """Receives from a group as a master does, by polling its descriptor."""

    def __init__(self, group: Workers) -> None:
        self.group = group
        self.events: list[Spawned | Reaped | GroupFailed] = []
        self._seen = 0

    def until(self, condition: Callable[[], object], timeout: float = DEADLINE) -> None:
        deadline = time.monotonic() + timeout
        poll = select.poll()
        poll.register(self.group.fileno(), select.POLLIN)
        while True:
            self.events += self.group.receive()
            if condition():
                return
            assert not self.group.closed, f"supervisor ended; {self.events}"
            left = deadline - time.monotonic()
            assert left > 0, f"not within {timeout} s; {self.events}"
            poll.poll(left * 1000)

    def next(self, kind: type[T], pid: int | None = None) -> T:
        """The next event of this kind (about this process), after the last one given."""
        found: list[T] = []

        def look() -> bool:
            for index in range(self._seen, len(self.events)):
                event = self.events[index]
                if isinstance(event, kind) and pid in (None, getattr(event, "pid", None)):
                    self._seen = index + 1
                    found.append(event)
                    return True
            return False

        self.until(look)
        return found[0]

    def alive(self, number: int) -> frozenset[int]:
        self.until(lambda: len(self.group.pids) == number)
        return self.group.pids

    def heard(self) -> None:
        """Until the supervisor has read all that it was sent, and so acts on it next."""
        fd = self.group.fileno()
        until(lambda: fcntl.ioctl(fd, termios.TIOCOUTQ, b"\0" * 4) == b"\0" * 4)

    def count(self, kind: type[object]) -> int:
        return sum(isinstance(event, kind) for event in self.events)


@pytest.fixture
def start() -> Iterator[Callable[..., Watch]]:
    watches: list[Watch] = []

    def start(cmd: str | Sequence[str] = IDLE, numprocesses: int = 2, **options: object) -> Watch:
        group = Workers(cmd, numprocesses, **options)  # type: ignore[arg-type]
        group.start()
        watches.append(Watch(group))
        return watches[-1]

    yield start
    for watch in watches:
        pids = [watch.group.supervisor_pid, *watch.group.pids]
        watch.group.stop(timeout=0.5)
        until(lambda: all(pid is None or gone(pid) for pid in pids))  # noqa: B023


Start = Callable[..., Watch]


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("cmd", "number", "error", "message"),
    [
        ("", 1, ValueError, "empty"),
        ([], 1, ValueError, "empty"),
        ("a 'b", 1, ValueError, "split"),
        (["a", 1], 1, TypeError, "text"),
        (b"sleep 1", 1, TypeError, "text"),
        (3, 1, TypeError, "sequence"),
        (["a\0b"], 1, ValueError, "null"),
        ("a", -1, ValueError, "0 or more"),
        ("a", 1.5, TypeError, "int"),
        ("a", True, TypeError, "int"),
    ],
)
def test_impossible_arguments_are_refused(
    cmd: object, number: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Workers(cmd, number)  # type: ignore[arg-type]


def test_text_is_split_like_a_shell_does() -> None:
    assert Workers("prog 'a b' $WID").cmd == ["prog", "a b", "$WID"]
    assert Workers("prog").numprocesses == 5


def test_text_that_is_not_unicode_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    group = Workers(["a\udcff"], 1, directory=str(tmp_path))
    with pytest.raises(ValueError, match="valid text"):
        group.start()
    assert group.supervisor_pid is None


# ---------------------------------------------------------------- life


def test_a_group_is_started_stopped_and_leaves_nothing() -> None:
    group = Workers(IDLE, 2)
    group.stop()  # safe before the start
    group.start()
    with pytest.raises(RuntimeError, match="started already"):
        group.start()
    watch = Watch(group)
    pids = watch.alive(2)
    supervisor, directory = group.supervisor_pid, group.directory
    assert supervisor is not None
    assert directory is not None
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    assert psutil.Process(supervisor).children()
    group.stop()
    assert not os.path.exists(directory)
    assert not any(psutil.pid_exists(pid) for pid in [supervisor, *pids])
    assert group.closed
    group.stop()
    with pytest.raises(RuntimeError, match="not running"):
        group.fileno()
    with group:  # and once more
        Watch(group).alive(2)


def test_a_given_directory_is_kept_but_emptied_of_sockets(tmp_path: Path) -> None:
    directory = tmp_path / "private"
    directory.mkdir(mode=0o700)
    with Workers(IDLE, 1, directory=str(directory)) as group:
        Watch(group).alive(1)
        until(lambda: os.listdir(directory))
    assert os.listdir(directory) == []


@pytest.mark.parametrize("given", [False, True])
def test_the_supervisor_removes_the_directory_that_stop_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    """So that nothing is left if this program ends before it does so itself."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    monkeypatch.setattr(Workers, "_remove_directory", lambda _: None)
    options = {"directory": str(private), "remove_directory": True} if given else {}
    group = Workers(IDLE, 1, **options)  # type: ignore[arg-type]
    group.start()
    Watch(group).alive(1)
    directory = group.directory
    assert directory is not None
    assert os.path.isdir(directory)
    group.stop()
    assert not os.path.exists(directory)


def test_a_killed_process_is_reported_and_replaced(start: Start) -> None:
    watch = start()
    pids = watch.alive(2)
    victim = min(pids)
    os.kill(victim, signal.SIGKILL)
    assert watch.next(Reaped, victim).exitcode == -signal.SIGKILL
    watch.next(Spawned)
    assert len(watch.alive(2) & pids) == 1


def test_all_killed_at_once_are_each_reported_once(start: Start) -> None:
    watch = start(numprocesses=6)
    for round_ in range(1, 4):
        pids = watch.alive(6)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        watch.until(lambda: watch.count(Spawned) == 6 + 6 * round_)  # noqa: B023
        for pid in pids:
            assert [e.exitcode for e in watch.events if isinstance(e, Reaped) and e.pid == pid] == [
                -signal.SIGKILL
            ]
    order = [(type(event).__name__, getattr(event, "pid", 0)) for event in watch.events]
    for pid in {pid for _, pid in order}:
        assert (
            order.index(("Spawned", pid)) < order.index(("Reaped", pid))
            if (
                "Reaped",
                pid,
            )
            in order
            else True
        )


def test_exit_code_and_last_words_are_reported(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import os, sys\n"
        "for n in range(5000): print('line', n, file=sys.stderr)\n"
        "sys.stderr.flush(); os._exit(7)"
    )
    watch = start([*PYTHON, code], 1)
    reaped = watch.next(Reaped)
    assert reaped.exitcode == 7
    lines = reaped.stderr.splitlines()
    assert lines[-1] == "line 4999"
    assert len(lines) == 20
    watch.group.stop()
    assert "".join(f"line {n}\n" for n in range(5000)) in capfd.readouterr().err


def test_a_grandchild_that_holds_stderr_does_not_delay_the_report(start: Start) -> None:
    code = (
        "import os, sys, time\n"
        "if os.fork() == 0: time.sleep(1000)\n"
        "print('bye', file=sys.stderr, flush=True); time.sleep(1.2); os._exit(3)"
    )
    watch = start([*PYTHON, code], 1)
    pid = watch.next(Spawned).pid
    children: list[psutil.Process] = []

    def found() -> bool:
        children[:] = psutil.Process(pid).children()
        return bool(children)

    until(found)
    try:
        assert watch.next(Reaped, pid).stderr == "bye\n"
    finally:
        watch.group.stop()
        for child in children:
            child.kill()


def test_nothing_is_printed_when_all_is_well(capfd: pytest.CaptureFixture[str]) -> None:
    with Workers(IDLE, 2) as group:
        watch = Watch(group)
        watch.alive(2)
        group.scale(0)
        watch.alive(0)
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- size


def test_scaling_up_down_and_to_nothing(start: Start) -> None:
    watch = start(numprocesses=0)
    watch.group.scale(3)
    first = watch.alive(3)
    watch.group.scale(5)
    assert watch.alive(5) > first
    watch.group.scale(3)
    assert watch.alive(3) == first  # the youngest go
    watch.group.scale(0)
    watch.alive(0)
    watch.group.scale(1)
    watch.alive(1)
    with pytest.raises(ValueError, match="0 or more"):
        watch.group.scale(-1)


def test_quick_successive_commands_do_not_conflict(start: Start) -> None:
    watch = start()
    for number in (5, 0, 3, 1, 4, 0, 2):
        watch.group.scale(number)
    watch.alive(2)
    watch.group.scale(0)
    watch.group.stop()  # at once
    assert not watch.group.alive


SLOW_START = """
import asyncio, zmqexecutor.supervision.group as group
start = group.SupervisedGroup._start
async def slow(self):
    await asyncio.sleep(0.5)
    await start(self)
group.SupervisedGroup._start = slow
"""


def test_a_size_that_is_asked_for_while_circus_starts_holds_for_those_that_die_then(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_supervisors(monkeypatch, SLOW_START)
    watch = start(numprocesses=3)
    pids = sorted(watch.alive(3))
    watch.group.scale(1, spare=True)
    watch.heard()
    for pid in pids[:2]:
        os.kill(pid, signal.SIGTERM)
        watch.next(Reaped, pid)
    os.kill(pids[2], signal.SIGTERM)
    watch.next(Reaped, pids[2])
    watch.next(Spawned)
    assert watch.count(Spawned) == 4


def test_spare_processes_end_by_themselves(start: Start) -> None:
    watch = start(numprocesses=3)
    pids = sorted(watch.alive(3))
    watch.group.scale(1, spare=True)
    watch.heard()
    os.kill(pids[0], signal.SIGTERM)
    watch.next(Reaped, pids[0])
    os.kill(pids[1], signal.SIGTERM)
    watch.next(Reaped, pids[1])
    assert watch.group.pids == {pids[2]}
    os.kill(pids[2], signal.SIGTERM)  # the first to be missed
    watch.next(Reaped, pids[2])
    watch.next(Spawned)
    assert watch.count(Spawned) == 4


def test_a_process_is_replaced_while_another_is_slow_to_stop(start: Start, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    stubborn = f"""
import pathlib, signal, time
signal.signal(signal.SIGTERM, lambda *_: pathlib.Path({str(asked)!r}).touch())
while True:
    time.sleep(1000)
"""
    watch = start([*PYTHON, stubborn], 2, graceful_timeout=30.0)
    pids = watch.alive(2)
    until(lambda: all(catches_sigterm(pid) for pid in pids))
    watch.group.scale(1)
    watch.heard()
    until(asked.exists)  # else the death might come first, and leave as many as are wanted
    oldest = next(event.pid for event in watch.events if isinstance(event, Spawned))
    os.kill(oldest, signal.SIGKILL)
    watch.next(Reaped, oldest)
    watch.next(Spawned)
    watch.alive(2)


def ignores_sigterm(pid: int) -> bool:
    return treats_sigterm("SigIgn:", pid)


def catches_sigterm(pid: int) -> bool:
    return treats_sigterm("SigCgt:", pid)


def treats_sigterm(how: str, pid: int) -> bool:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(how):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def test_what_ignores_sigterm_is_killed_after_the_grace(start: Start) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(1000)"
    watch = start([*PYTHON, code], 2, graceful_timeout=0.3)
    pids = watch.alive(2)
    until(lambda: all(ignores_sigterm(pid) for pid in pids))
    began = time.monotonic()
    watch.group.stop()
    assert time.monotonic() - began >= 0.3
    assert all(gone(pid) for pid in pids)
    assert {e.exitcode for e in watch.group.receive() if isinstance(e, Reaped)} <= {-9}


@pytest.mark.parametrize("with_children", [False, True])
def test_what_a_process_has_started(start: Start, tmp_path: Path, with_children: bool) -> None:
    """It goes on if the process has ended in time, unless it is to end too."""
    note = tmp_path / "note"
    code = (
        "import os, signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(0))\n"
        "child = subprocess.Popen(['sleep', '1000'], stderr=subprocess.DEVNULL)\n"
        "open('new', 'w').write(str(child.pid)); os.rename('new', 'note')\n"
        "while True: signal.pause()"
    )
    watch = start([*PYTHON, code], 1, working_dir=str(tmp_path))
    until(note.exists)
    child = int(note.read_text())
    watch.group.stop(with_children=with_children)
    try:
        if with_children:
            until(lambda: gone(child))
        assert gone(child) is with_children
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_a_stopped_process_can_be_stopped(start: Start) -> None:
    watch = start(numprocesses=1, graceful_timeout=30.0)
    (pid,) = watch.alive(1)
    os.kill(pid, signal.SIGSTOP)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    watch.group.stop()
    assert gone(pid)


@pytest.mark.parametrize("command", ["reload", "kill"])
def test_circusctl_replaces_all(start: Start, command: str) -> None:
    watch = start(graceful_timeout=30.0)
    pids = watch.alive(2)
    endpoint = f"ipc://{watch.group.directory}/circus"
    circusctl = [sys.executable, "-c", "from circus.circusctl import main; main()"]
    subprocess.run(
        [*circusctl, "--endpoint", endpoint, command, "group"][: None if command == "kill" else -1],
        check=True,
        capture_output=True,
        timeout=DEADLINE,
    )
    watch.until(lambda: watch.count(Spawned) == 4 and len(watch.group.pids) == 2)
    assert not watch.group.pids & pids


# ---------------------------------------------------------------- what runs


def dump(target: Path) -> str:
    """Code that writes how it was started to a new file, then waits."""
    return (
        "import json, os, signal, sys, time\n"
        "handlers = {s: signal.getsignal(s) is signal.SIG_DFL for s in (1, 2, 15, 17)}\n"
        "fds = {fd: os.readlink('/proc/self/fd/' + fd) for fd in os.listdir('/proc/self/fd')\n"
        "       if os.path.exists('/proc/self/fd/' + fd)}\n"
        "told = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ), fds, handlers,\n"
        "                   list(signal.pthread_sigmask(signal.SIG_BLOCK, []))])\n"
        f"name = os.path.join({str(target)!r}, str(os.getpid()))\n"
        "with open(name + '.new', 'w') as file: file.write(told)\n"
        "os.rename(name + '.new', name); time.sleep(1000)"
    )


def told(target: Path, pid: int) -> list[object]:
    file = target / str(pid)
    until(file.exists)
    result: list[object] = json.loads(file.read_text())
    return result


def test_arguments_are_exact_and_wid_is_unique(start: Start, tmp_path: Path) -> None:
    odd = ["$HOME", "a  b", "((x))", "$(circus.env.home)", "'\"", "", "é", "x$WID-$(circus.wid)"]
    watch = start([*PYTHON, dump(tmp_path), *odd], 3)
    wids: dict[int, object] = {}
    for pid in watch.alive(3):
        args = told(tmp_path, pid)[0]
        assert isinstance(args, list)
        assert args[:-1] == odd[:-1]
        wids[pid] = args[-1]
    assert set(wids.values()) == {"x1-1", "x2-2", "x3-3"}
    victim, wid = wids.popitem()
    os.kill(victim, signal.SIGKILL)
    watch.next(Reaped, victim)
    (new,) = watch.alive(3) - set(wids)
    args = told(tmp_path, new)[0]
    assert isinstance(args, list)
    assert args[-1] == wid


def test_directory_environment_files_and_signals(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "where"
    where.mkdir()
    monkeypatch.setenv("INHERITED", "yes")
    old = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGCHLD])
    try:
        watch = start(
            [*PYTHON, dump(tmp_path)], 1, working_dir=str(where), env={"EXTRA": "a $b((c))"}
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    (pid,) = watch.alive(1)
    _, cwd, env, fds, defaults, blocked = told(tmp_path, pid)
    assert cwd == str(where)
    assert isinstance(env, dict)
    assert env["EXTRA"] == "a $b((c))"
    assert env["INHERITED"] == "yes"
    assert isinstance(fds, dict)
    assert fds["0"] == "/dev/null"
    assert set(fds) <= {"0", "1", "2", "3"}  # 3: the listing itself
    assert "socket" not in fds.get("3", "")
    assert isinstance(defaults, dict)
    assert defaults["1"]
    assert defaults["15"]
    assert defaults["17"]
    assert blocked == []


@pytest.mark.parametrize(
    ("cmd", "options", "reason"),
    [
        (["/no/such/program"], {}, "names an executable program"),
        (IDLE, {"working_dir": "/no/such/dir"}, "working directory '/no/such/dir'"),
        (IDLE, {"directory": "/no/such/dir"}, "cannot run Circus's arbiter"),
    ],
)
def test_what_cannot_be_started_is_told(
    start: Start, cmd: list[str], options: dict[str, str], reason: str
) -> None:
    watch = start(cmd, 2, **options)
    assert reason in watch.next(GroupFailed).reason
    assert watch.group.alive


def test_after_a_failure_scale_tries_again(start: Start, tmp_path: Path) -> None:
    program = tmp_path / "program"
    watch = start([str(program)], 1)
    watch.next(GroupFailed)
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o700)
    watch.group.scale(2)
    watch.alive(2)


def test_a_crash_loop_is_slowed_down_and_scale_forgives_it(start: Start) -> None:
    watch = start([*PYTHON, "raise SystemExit(3)"], 1)
    began = time.monotonic()
    watch.until(lambda: watch.count(Reaped) == 9)
    assert time.monotonic() - began >= 0.1 + 0.2 + 0.4  # after the sixth to the eighth
    watch.group.scale(1)
    began = time.monotonic()
    watch.until(lambda: watch.count(Reaped) == 14)
    watch.until(lambda: watch.count(Reaped) == 17)
    assert time.monotonic() - began >= 0.1 + 0.2
    assert watch.group.alive


# ---------------------------------------------------------------- run


def test_run_returns_when_stopped_elsewhere() -> None:
    group = Workers(IDLE, 1)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            group.run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: group.pids)
    group.stop()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    assert errors == []


def test_run_raises_when_nothing_can_be_started() -> None:
    group = Workers("/no/such/program", 1)
    with pytest.raises(RuntimeError, match="cannot start '/no/such/program'"):
        group.run()
    group.stop()


def test_run_replaces_the_supervisor_but_not_for_ever() -> None:
    group = Workers(IDLE, 1)
    seen: list[int] = []
    failed = threading.Event()

    def killer() -> None:
        while not failed.is_set():
            pid = group.supervisor_pid
            if pid is not None and pid not in seen and group.pids:
                seen.append(pid)
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="ended 4 times within 60 seconds"):
            group.run()
    finally:
        failed.set()
        thread.join()
        group.stop()
    assert len(seen) == 4


def test_restarts_are_counted_within_a_minute() -> None:
    restarts = Restarts()
    refused = [now for now in (0.0, 10.0, 20.0, 59.0, 60.0, 69.0, 70.0) if not restarts.add(now)]
    assert refused == [59.0, 69.0]


SEED = """
import signal, sys
from zmqexecutor.supervision.workers import Workers
workers = Workers(sys.argv[1], 2)
try:
    print("running", flush=True)
    workers.run()
except KeyboardInterrupt:
    workers.stop()
    print("stopped", "circus" in sys.modules, "tornado" in sys.modules, flush=True)
"""


def test_ctrl_c_ends_the_seeds_program_cleanly(tmp_path: Path) -> None:
    command = shlex.join([*PYTHON, dump(tmp_path)])
    with subprocess.Popen(
        [sys.executable, "-c", SEED, command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as parent:
        until(lambda: len(dumped(tmp_path)) == 2)
        parent.send_signal(signal.SIGINT)
        out, err = parent.communicate(timeout=DEADLINE)
    assert out == b"running\nstopped False False\n"
    assert err == b""
    assert parent.returncode == 0
    assert all(gone(pid) for pid in dumped(tmp_path))


def dumped(target: Path) -> list[int]:
    return [int(name) for name in os.listdir(target) if name.isdigit()]


# ---------------------------------------------------------------- deaths above


PARENT = """
import os, sys, time
from zmqexecutor.supervision.workers import Workers
workers = Workers(sys.argv[2:], 2, graceful_timeout=60.0)
workers.start()
while len(workers.pids) < 2:
    workers.receive(); time.sleep(0.01)
child = 0
if "fork" in sys.argv[1]:
    child = os.fork()
    if child == 0:
        os.setsid(); time.sleep(1000)
print(workers.supervisor_pid, workers.directory, child, *workers.pids, flush=True)
if "exit" in sys.argv[1]:
    sys.exit()
if "drop" in sys.argv[1]:
    del workers
if "quit" in sys.argv[1]:
    workers.stop()
time.sleep(1000)
"""


@contextlib.contextmanager
def parent(mode: str, cmd: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], list[int], str]]:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, mode, *cmd],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        supervisor, directory, child, *pids = process.stdout.readline().decode().split()
        try:
            yield process, [int(supervisor), *map(int, pids)], directory
        finally:
            process.kill()
            if int(child):
                os.kill(int(child), signal.SIGKILL)


STUBBORN = [*PYTHON, "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(1000)"]


@pytest.mark.parametrize("cmd", [IDLE, STUBBORN], ids=["obedient", "stubborn"])
@pytest.mark.parametrize("mode", ["kill", "kill fork", "exit", "drop fork", "quit"])
def test_all_ends_with_the_parent(mode: str, cmd: list[str]) -> None:
    with parent(mode, cmd) as (process, pids, directory):
        if "kill" in mode:
            process.kill()
        elif mode == "quit" and cmd is STUBBORN:
            process.kill()  # else it would wait for a minute
        began = time.monotonic()
        until(lambda: all(gone(pid) for pid in pids) and not os.path.exists(directory))
        assert time.monotonic() - began < 2.0 + SLACK


def test_a_parent_that_ends_before_its_supervisor_has_listened_leaves_no_directory(
    tmp_path: Path,
) -> None:
    """With a fork that holds its end of the link open."""
    program = """
import os, signal, sys, time
from zmqexecutor.supervision import supervisor_process, workers
late = "import os, time\\nwhile os.getppid() == {parent}: time.sleep(0.005)\\n"
supervisor_process._BOOT = late + supervisor_process._BOOT
group = workers.Workers(["sleep", "1000"], 1, directory=sys.argv[1])
group.start()
if child := os.fork():
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
os.close(1)
time.sleep(1000)
"""
    directory = tmp_path / "private"
    directory.mkdir(mode=0o700)
    command = [sys.executable, "-c", program, str(directory)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    try:
        until(lambda: not directory.exists())
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


SLACK = float(os.environ.get("ZMQEXECUTOR_TEST_SLACK", "0"))
"""Seconds more for a promised time, on a machine that is busy with other things."""


def test_a_forked_child_exits_and_disturbs_nothing(start: Start) -> None:
    watch = start()
    pids = watch.alive(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # we may have threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            watch.group.stop()
            watch.group.kill()
            with contextlib.suppress(ForkedExecutorError):
                watch.group.scale(0)
            del watch
            gc.collect()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert watch.group.alive
    victim = min(pids)
    os.kill(victim, signal.SIGKILL)
    watch.next(Reaped, victim)
    watch.alive(2)


def test_a_killed_supervisor_is_told_and_its_processes_end(start: Start) -> None:
    watch = start()
    pids = watch.alive(2)
    supervisor = watch.group.supervisor_pid
    assert supervisor is not None
    os.kill(supervisor, signal.SIGKILL)
    watch.until(lambda: watch.group.closed)
    until(lambda: all(gone(pid) for pid in pids))
    with pytest.raises(RuntimeError, match="has ended"):
        watch.group.scale(3)
    watch.group.restart()
    new = watch.alive(3)
    assert not new & pids
    with pytest.raises(RuntimeError, match="has ended can be restarted"):
        watch.group.restart()


def test_sigterm_ends_a_supervisor_orderly_and_the_rest_leaves_it_alone(start: Start) -> None:
    watch = start()
    watch.alive(2)
    supervisor = watch.group.supervisor_pid
    assert supervisor is not None
    os.kill(supervisor, signal.SIGINT)
    os.kill(supervisor, signal.SIGHUP)
    watch.group.scale(3)
    watch.alive(3)
    os.kill(supervisor, signal.SIGTERM)
    watch.until(lambda: watch.group.closed)
    assert watch.count(Reaped) == 3
    assert watch.group.directory is not None
    assert os.path.isdir(watch.group.directory)


def test_when_this_process_exits_the_supervisor_is_not_taken_for_dead(start: Start) -> None:
    """A daemon thread sees the end of the connection, and must not stop who cleans up."""
    watch = start()
    pids = watch.alive(2)
    group = watch.group
    supervisor = group.supervisor_pid
    assert supervisor is not None
    fleet = Fleet(group)
    before = group.hung_up, fleet.supervisor_died()
    assert before == (False, False)
    assert group._link is not None
    group._link._supervisor.hang_up()  # as at exit
    until(lambda: group.receive() or group.closed)
    assert group.hung_up
    assert not fleet.supervisor_died()
    until(lambda: all(gone(pid) for pid in [*pids, supervisor]))


def test_a_hung_supervisor_is_killed_by_stop(start: Start) -> None:
    watch = start(graceful_timeout=0.1)
    pids = watch.alive(2)
    supervisor = watch.group.supervisor_pid
    assert supervisor is not None
    os.kill(supervisor, signal.SIGSTOP)
    watch.group.stop()
    until(lambda: all(gone(pid) for pid in [*pids, supervisor]))


def test_kill_ends_all_at_once(start: Start) -> None:
    watch = start()
    pids = watch.alive(2)
    watch.group.kill()
    watch.until(lambda: watch.group.closed)
    until(lambda: all(gone(pid) for pid in pids))


# ---------------------------------------------------------------- the host is unharmed


def test_the_users_process_is_untouched(start: Start) -> None:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    threads = threading.active_count()
    other = subprocess.Popen([*PYTHON, "raise SystemExit(5)"])
    watch = start()
    watch.alive(2)
    assert other.wait(DEADLINE) == 5
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    assert threading.active_count() == threads
    loaded = (
        "import sys, zmqexecutor.supervision.workers; "
        "print({'circus', 'tornado'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", loaded]) == b"set()\n"


def test_no_port_is_open(start: Start) -> None:
    watch = start()
    watch.alive(2)
    assert watch.group.supervisor_pid is not None
    processes = [psutil.Process(pid) for pid in (watch.group.supervisor_pid, *watch.group.pids)]
    for process in processes:
        connections = getattr(process, "net_connections", None) or process.connections
        assert connections(kind="inet") == []


def test_a_terminal_that_takes_nothing_stops_nobody(start: Start) -> None:
    """The user's stderr is a pipe that is full: processes wait, the supervisor does not."""
    script = (
        "import sys, time; from zmqexecutor.supervision.workers import Workers\n"
        "w = Workers(sys.argv[1:], 1)\n"
        "w.start()\n"
        "while not w.pids: w.receive(); time.sleep(0.01)\n"
        "print(*w.pids, w.supervisor_pid, flush=True); sys.stdin.readline()\n"
        "t = time.monotonic(); w.scale(2)\n"
        "while len(w.pids) < 2: w.receive(); time.sleep(0.01)\n"
        "w.stop(); print('done', flush=True)"
    )
    noisy = [*PYTHON, "import os\nwhile True: os.write(2, b'x' * 4000)"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *noisy],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        pid = int(process.stdout.readline().split()[0])
        until(lambda: asleep(pid))
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"done\n"


def asleep(pid: int) -> bool:
    """Whether it waits for room in its pipe."""
    return "pipe_w" in Path(f"/proc/{pid}/wchan").read_text() or (
        Path(f"/proc/{pid}/stat").read_text().split()[2] == "S"
    )


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "2>&-", "<&- 2>&-"])
def test_closed_standard_files_do_no_harm(tmp_path: Path, closed: str) -> None:
    script = (
        "import sys, time; from zmqexecutor.supervision.workers import Workers\n"
        "w = Workers(sys.argv[2:], 2)\n"
        "w.start()\n"
        "while len(w.pids) < 2: w.receive(); time.sleep(0.01)\n"
        "w.stop(); open(sys.argv[1], 'w').close()"
    )
    command = shlex.join([sys.executable, "-c", script, str(tmp_path / "done"), *IDLE])
    assert subprocess.call(["/bin/sh", "-c", f"exec {command} {closed}"]) == 0
    assert (tmp_path / "done").exists()


def test_warnings_as_errors_and_foreign_modules_do_not_stop_it(tmp_path: Path) -> None:
    for name in ("queue", "asyncio", "circus", "logging"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')")
    (tmp_path / "script.py").write_text(
        "import sys; path = sys.path.pop(0)\n"
        "from zmqexecutor.supervision.workers import Workers\n"
        "sys.path.insert(0, path)\n"
        "import time\n"
        "with Workers(sys.argv[1:], 1) as w:\n"
        "    while not w.pids and not w.closed: w.receive(); time.sleep(0.01)\n"
        "    print(len(w.pids))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "script.py", *IDLE],
        cwd=tmp_path,
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.stderr == b""
    assert done.stdout == b"1\n"


def test_many_processes_that_nobody_hears_of_for_a_while() -> None:
    """The reports of their starts fill the link; Circus is there all the same."""
    with Workers(["sleep", "1000"], 300) as group:
        assert group.directory is not None
        circus = Path(group.directory, "circus")
        until(circus.exists)
        Watch(group).alive(300)


def test_a_supervisor_that_fails_early_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the processes that it has started, nor what these have."""
    pids = tmp_path / "pids"
    (tmp_path / "circus").mkdir()
    (tmp_path / "circus" / "__init__.py").write_text(
        "import os, time\n"
        "end = time.monotonic() + 60\n"
        f"while not os.path.exists({str(pids)!r}) and time.monotonic() < end:\n"
        "    time.sleep(0.005)\n"
        "raise ImportError('broken')\n"
    )
    run_in_supervisors(monkeypatch, f"import sys; sys.path.insert(0, {str(tmp_path)!r})")
    command = f"sleep 1000 & echo $! > {pids}.new; mv {pids}.new {pids}; wait"
    with Workers(["sh", "-c", command], 1) as group:
        until(lambda: group.receive() is not None and group.closed)
        until(pids.exists)
        until(lambda: gone(int(pids.read_text())))
