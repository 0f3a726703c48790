"""The command line, by real processes: workers, groups, circusd, and programs that ask."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import zmqexecutor
from zmqexecutor import JobRunner, WorkerLostError, ZmqExecutor
from zmqexecutor.commands import cli, reports
from zmqexecutor.wire.protocol import Report, WorkerReport

from .conftest import DEADLINE, alive, eventually

SHAPES = """\
import os, sys, time
from pathlib import Path

def square(job):
    return str(int(job[1]) ** 2)

def total(job):
    return {"sum": sum(job[1])}

def mirror(job):
    return job[1][::-1]

def pid(job):
    return str(os.getpid())

def hold(job):
    "Until the file is there, or for a while."
    Path(job[1] + ".begun").touch()
    for _ in range(4000):
        if os.path.exists(job[1]):
            break
        time.sleep(0.005)
    return "held"

def die(job):
    os.kill(os.getpid(), 9)

def load():
    return ["loaded"]

def use(job, state):
    state.append(job[1])
    return ",".join(state)

def unload(state):
    Path("unloaded").write_text(",".join(state))

def fail(*args):
    raise OSError("no such model")
"""


class Shell:
    """Runs the command line in a directory with the module `shapes`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.endpoint = f"ipc://{directory}/m"
        self.started: list[subprocess.Popen[str]] = []
        home = str(Path(zmqexecutor.__file__).parent.parent)
        self.environment = dict(os.environ, PYTHONPATH=home, HOME=str(directory))
        self.command = [sys.executable, "-m", "zmqexecutor"]

    def start(self, *arguments: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
        return self.start_program([*self.command, *arguments], stdout)

    def start_program(
        self, command: list[str], stdout: int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(
        self, *arguments: str, data: bytes = b"", cwd: Path | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*self.command, *arguments],
            cwd=cwd or self.directory,
            env=self.environment,
            input=data,
            capture_output=True,
            timeout=60,
            check=False,
        )

    def worker(self, *arguments: str) -> subprocess.Popen[str]:
        return self.start("worker", *arguments, "--endpoint", self.endpoint)

    def call(self, *arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return self.run("call", "--endpoint", self.endpoint, *arguments, data=data)


def end(process: subprocess.Popen[str], signum: int = signal.SIGTERM) -> tuple[int, str]:
    """Signal it; its exit code, and what it wrote to its standard error."""
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    (tmp_path / "shapes.py").write_text(SHAPES)
    made = Shell(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.terminate()  # a group ends its workers
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=20)


@contextmanager
def master(shell: Shell, workers: int = 0, patience: float = 30) -> Iterator[JobRunner]:
    with JobRunner(shell.endpoint, patience=patience) as runner:
        runner.wait_for_workers(workers, 30)
        yield runner


# ------------------------------------------------------------------- worker


def test_a_worker_does_jobs_and_leaves_when_asked(shell: Shell) -> None:
    process = shell.worker("shapes:square")
    with master(shell, 1) as runner:
        assert runner.execute("1", "12", 20) == "144"
        assert end(process) == (0, "")
        assert eventually(lambda: not runner.workers)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_job_at_hand_is_finished(shell: Shell, signum: int) -> None:
    process = shell.worker("shapes:hold")
    gate = shell.directory / "gate"
    with master(shell, 1) as runner:
        future = runner.submit("1", str(gate))
        assert eventually(Path(f"{gate}.begun").exists)
        process.send_signal(signum)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        gate.touch()
        assert future.result(20) == "held"
        assert process.wait(20) == 0


def test_a_second_interrupt_does_not_wait(shell: Shell) -> None:
    process = shell.worker("shapes:hold")
    gate = shell.directory / "gate"
    with master(shell, 1) as runner:
        future = runner.submit("1", str(gate))
        assert eventually(Path(f"{gate}.begun").exists)

        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "Ctrl-C again" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        with pytest.raises(WorkerLostError):
            future.result(20)
        assert process.stderr.read() == ""


def test_a_worker_that_waits_for_a_master_can_be_interrupted(shell: Shell) -> None:
    process = shell.worker("shapes:square", "--initializer", "shapes:load")
    with master(shell, 1):
        pass
    code, stderr = end(process, signal.SIGINT)
    assert code == 0
    assert stderr.startswith("zmqexecutor worker: ending after the job at hand")


def test_services_state_pickles_and_a_workpoint(shell: Shell) -> None:
    process = shell.worker(
        *["square=shapes:square", "use=shapes:use", "--initializer=shapes:load"],
        *["--teardown=shapes:unload", "--allow-pickle", f"--workpoint={shell.endpoint}.w"],
    )
    # `square` takes no state: its jobs fail, and the worker goes on.
    with master(shell, 1) as runner:
        assert runner.workers[0].services == ("square", "use")
        assert runner.execute("1", "a", 20, service="use") == "loaded,a"
        assert runner.execute("2", "b", 20, service="use", codec="pickle") == "loaded,a,b"
        assert Path(f"{shell.endpoint}.w".removeprefix("ipc://")).is_socket()
    assert end(process) == (0, "")
    assert (shell.directory / "unloaded").read_text() == "loaded,a,b"


def test_one_target_under_the_name_of_a_service(shell: Shell) -> None:
    shell.worker("shapes:square", "--service", "square")
    with master(shell, 1) as runner:
        assert runner.execute("1", "3", 20, service="square") == "9"
        with pytest.raises(zmqexecutor.JobFailedError, match="allow_pickle"):
            runner.execute("1", "3", 20, service="square", codec="pickle")


def test_modules_are_found_where_one_would_think(shell: Shell, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    check = ["worker", "shapes:square", "--endpoint", shell.endpoint, "--check"]
    assert shell.run(*check).returncode == 0
    missing = shell.run(*check, cwd=elsewhere)
    assert missing.returncode == 2
    assert f"no module 'shapes' in {elsewhere}".encode() in missing.stderr
    assert shell.run(*check, "--directory", str(tmp_path), cwd=elsewhere).returncode == 0
    assert shell.run(*check, "--directory", "..", cwd=elsewhere).returncode == 0
    # As pip makes a script of an entry point: its own directory is on the path, no other.
    script = elsewhere / "zmqexecutor"
    script.write_text("import sys\nfrom zmqexecutor.commands.cli import main\nsys.exit(main())\n")
    shell.command = [sys.executable, str(script)]
    assert shell.run(*check).returncode == 0
    assert shell.run(*check, cwd=elsewhere).returncode == 2
    shell.environment["PYTHONPATH"] += f":{tmp_path}"
    assert shell.run(*check, cwd=elsewhere).returncode == 0


def test_no_master_is_there(shell: Shell) -> None:
    for kind in ("shapes:square", "--calls"):
        done = shell.run("worker", kind, "--endpoint", shell.endpoint, "--patience", "0.2")
        assert done.returncode == 3
        assert b"zmqexecutor worker: no master answered at" in done.stderr
        assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("dance", "invalid choice: 'dance'"),
        ("worker shapes:square", "required: --endpoint"),
        ("worker --endpoint E", "name a target, MODULE:FUNCTION, or give --calls"),
        ("worker shapes --endpoint E", "'shapes': expected MODULE:FUNCTION"),
        ("worker shapes: --endpoint E", "'shapes:': expected MODULE:FUNCTION"),
        ("worker :square --endpoint E", "':square': expected MODULE:FUNCTION"),
        ("worker ../shapes.py:square --endpoint E", "expected MODULE:FUNCTION"),
        ("worker shapes:sqare --endpoint E", "no 'sqare' in it; do you mean 'square'?"),
        ("worker shapes:os --endpoint E", "target 'shapes:os' is not callable"),
        ("worker shpes:square --endpoint E", "no module 'shpes' in"),
        ("worker shapes.round:square --endpoint E", "no module 'shapes.round' in"),
        ("worker shapes:load --initializer shapes:lod --endpoint E", "do you mean 'load'?"),
        ("worker shapes:load --teardown shapes:load --endpoint E", "give both"),
        ("worker shapes:load shapes:use --endpoint E", "name the service of 'shapes:load'"),
        ("worker a=shapes:load a=shapes:use --endpoint E", "two targets for the service 'a'"),
        ("worker a=shapes:load --service b --endpoint E", "and so does --service"),
        ("worker shapes:load --service a --service b --endpoint E", "name that of each target"),
        ("worker shapes:load --endpoint nowhere", "expected ipc://PATH or tcp://HOST:PORT"),
        ("worker --calls --endpoint nowhere", "expected ipc://PATH or tcp://HOST:PORT"),
        ("worker --calls shapes:load --endpoint E", "--calls and a target contradict"),
        ("worker --calls --allow-pickle --endpoint E", "--calls and --allow-pickle contradict"),
        ("worker shapes:load --patience 0 --endpoint E", "--patience: expected seconds"),
        ("worker shapes:load --directory nowhere --endpoint E", "No such file or directory"),
        ("workers shapes:load -n -1 --endpoint E", "expected"),
        ("workers shapes:sqare --endpoint E", "do you mean 'square'?"),
        ("workers shapes:load --workpoint ipc:///tmp/w --endpoint E", "put $WID into it"),
        ("status --endpoint nowhere", "expected ipc://PATH or tcp://HOST:PORT"),
        ("status --endpoint E --watch soon", "expected seconds"),
        ("worker --calls --endpoint tcp://127.0.0.1:5570", "without authentication"),
        ("worker shapes:load --endpoint tcp://10.0.0.1:5570", "without authentication"),
        ("status --endpoint tcp://10.0.0.1:5570", "without authentication"),
        ("keygen --worker ../alpha", "expected at most 64 letters"),
        ("call --endpoint E", "required: DATA"),
        ("call --endpoint E --codec json {", "DATA is not json"),
        ("call --endpoint E --codec pickle x", "invalid choice: 'pickle'"),
        ("call --endpoint E --timeout nan x", "expected seconds"),
        ("call --endpoint E --service= x", "1 to 255 characters"),
    ],
)
def test_mistakes_are_explained(shell: Shell, arguments: str, message: str) -> None:
    words = [shell.endpoint if word == "E" else word for word in arguments.split()]
    done = shell.run(*words)
    assert done.returncode == 2
    assert done.stdout == b""
    text = done.stderr.decode()
    assert message in text
    assert "Traceback" not in text
    assert text.count("error:") + text.count("zmqexecutor ") >= 1


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("def f(:\n    pass\n", "SyntaxError"),
        ("import not_there\n", "ModuleNotFoundError: No module named 'not_there'"),
        ("def f():\n    return 1 / 0\nf()\n", "ZeroDivisionError"),
        ("import sys\nsys.exit('no')\n", "SystemExit: no"),
    ],
)
def test_a_module_that_is_broken_shows_its_own_traceback(
    shell: Shell, source: str, error: str
) -> None:
    (shell.directory / "broken.py").write_text(source)
    for command in ("worker", "workers"):
        done = shell.run(command, "broken:f", "--endpoint", shell.endpoint)
        assert done.returncode == 1
        text = done.stderr.decode()
        assert text.count(error) == 1
        assert "broken.py" in text
        assert str(Path(zmqexecutor.__file__).parent) not in text, "frames of ours"
        assert "importlib" not in text
        assert text.endswith("zmqexecutor worker: the module 'broken' cannot be imported\n")


def test_an_initializer_that_raises_shows_its_traceback(shell: Shell) -> None:
    process = shell.worker("shapes:use", "--initializer", "shapes:fail")
    with master(shell):
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "in fail\n" in stderr
    assert "OSError: no such model\n" in stderr
    assert str(Path(zmqexecutor.__file__).parent) not in stderr
    assert stderr.endswith("zmqexecutor worker: the initializer raised OSError\n")


def test_a_workpoint_that_is_taken(shell: Shell) -> None:
    (shell.directory / "file").touch()
    process = shell.worker("shapes:use", f"--workpoint=ipc://{shell.directory}/file")
    with master(shell):
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "a file that is no socket" in stderr
    assert "Traceback" not in stderr


# -------------------------------------------------------------- workers of calls


def test_a_worker_of_executors_begins_afresh_for_each(shell: Shell) -> None:
    process = shell.worker("--calls")
    for _ in range(2):
        with ZmqExecutor(0, endpoint=shell.endpoint) as executor:
            assert executor.submit(os.getpid).result(60) == process.pid
            assert executor.submit(hasattr, sys, "left_behind").result(60) is False
            executor.submit(setattr, sys, "left_behind", 1).result(60)
            seen = shell.run("status", "--endpoint", shell.endpoint, "--json")
            assert json.loads(seen.stdout)["workers"][0]["pid"] == process.pid
    assert process.poll() is None


def test_an_executor_takes_no_jobs_from_clients(shell: Shell) -> None:
    with ZmqExecutor(0, endpoint=shell.endpoint):
        refused = shell.call("12")
    assert refused.returncode == 1
    assert b"takes no jobs from clients" in refused.stderr


def test_a_worker_of_an_executor_can_be_interrupted(shell: Shell) -> None:
    process = shell.worker("--calls")
    gate = shell.directory / "gate"
    with ZmqExecutor(0, endpoint=shell.endpoint) as executor:
        future = executor.submit(_hold, str(gate))
        assert eventually(Path(f"{gate}.begun").exists, 60)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        gate.touch()
        assert future.result(20) == "held"
        assert process.wait(20) == 0


def _hold(path: str) -> str:
    Path(path + ".begun").touch()
    assert eventually(Path(path).exists)
    return "held"


def test_a_fresh_process_takes_the_place_of_one_whose_executor_died(shell: Shell) -> None:
    program = shell.directory / "program.py"
    program.write_text(
        textwrap.dedent("""\
            import os, sys
            from zmqexecutor import ZmqExecutor
            executor = ZmqExecutor(0, endpoint=sys.argv[1]).options(service="big")
            executor.submit(setattr, sys, "left_behind", 1).result(60)
            executor.submit(os.chdir, "/").result(60)
            os.kill(os.getpid(), 9)
            """)
    )
    (shell.directory / "sub").mkdir()
    process = shell.worker("--calls", "--service", "big", "--directory", "sub")
    assert shell.start_program([sys.executable, str(program), shell.endpoint]).wait(60) == -9
    with ZmqExecutor(0, endpoint=shell.endpoint) as executor:
        view = executor.options(service="big")
        assert view.submit(hasattr, sys, "left_behind").result(60) is False
        assert view.submit(os.getpid).result(60) == process.pid
        assert view.submit(os.getcwd).result(60) == str(shell.directory / "sub")


# -------------------------------------------------------------------- workers


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_group_replaces_the_dead_and_ends_cleanly(shell: Shell, signum: int) -> None:
    process = shell.start(
        *["workers", "shapes:square", "-n", "3", "--endpoint", shell.endpoint],
        *["--workpoint", f"ipc://{shell.directory}/w-$WID"],
    )
    with master(shell, 3) as runner:
        before = {worker.pid for worker in runner.workers}
        assert {f"w-{number}" for number in (1, 2, 3)} <= set(os.listdir(shell.directory))
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        assert eventually(lambda: victim not in {worker.pid for worker in runner.workers})
        runner.wait_for_workers(3, 30)
        after = {worker.pid for worker in runner.workers}
        assert len(after - before) == 1
        assert [runner.execute("1", str(n), 20) for n in range(9)] == [str(n * n) for n in range(9)]
        code, stderr = end(process, signum)
        assert code == 0
        assert "Traceback" not in stderr
        assert not any(alive(pid) for pid in after)


def test_a_group_lets_jobs_finish(shell: Shell) -> None:
    process = shell.start("workers", "shapes:hold", "-n", "1", "--endpoint", shell.endpoint)
    gate = shell.directory / "gate"
    with master(shell, 1) as runner:
        future = runner.submit("1", str(gate))
        assert eventually(Path(f"{gate}.begun").exists)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        gate.touch()
        assert future.result(20) == "held"
        assert process.wait(20) == 0


def test_circusd_runs_the_same_group(shell: Shell) -> None:
    (shell.directory / "a ;b").mkdir()
    printed = shell.run(
        *["workers", "square=shapes:square", "total=shapes:total", "-n", "2", "--circus-ini"],
        *["--endpoint", shell.endpoint, "--workpoint", f"ipc://{shell.directory}/a ;b/w-$WID"],
    )
    assert printed.returncode == 0, printed.stderr
    (shell.directory / "shapes.ini").write_bytes(printed.stdout)
    circusd = shell.start_program(
        [sys.executable, "-m", "circus.circusd", "shapes.ini"], stdout=subprocess.DEVNULL
    )
    with master(shell, 2) as runner:
        assert runner.execute("1", "12", 20, service="square") == "144"
        assert runner.execute("2", [1, 2], 20, service="total", codec="json") == {"sum": 3}
        assert sorted(os.listdir(shell.directory / "a ;b")) == ["w-1", "w-2"]
        victim = runner.workers[0].pid
        os.kill(victim, signal.SIGKILL)
        assert eventually(lambda: victim not in {worker.pid for worker in runner.workers})
        runner.wait_for_workers(2, 30)
        left = [worker.pid for worker in runner.workers]
        code, stderr = end(circusd, signal.SIGINT)
        assert code == 0, stderr
        assert not any(alive(pid) for pid in left)


def test_what_a_circus_ini_cannot_hold(shell: Shell) -> None:
    (shell.directory / "x").mkdir()
    shell.environment["PYTHONPATH"] += f":{shell.directory}/x ;y"
    done = shell.run("workers", "shapes:square", "--endpoint", shell.endpoint, "--circus-ini")
    assert done.returncode == 2
    assert b"cannot be written into a circus.ini" in done.stderr


# --------------------------------------------------------------------- status


def test_status_as_a_table_and_as_json(shell: Shell) -> None:
    shell.worker("square=shapes:square", "die=shapes:die")
    with master(shell, 1) as runner:
        for number in range(5):
            runner.execute("1", str(number), 20, service="square")
        with pytest.raises(zmqexecutor.JobFailedError):
            runner.execute("1", "x", 20, service="square")
        table = shell.run("status", "--endpoint", shell.endpoint).stdout.decode()
        document = json.loads(shell.run("status", "--endpoint", shell.endpoint, "--json").stdout)
        (worker,) = runner.workers
    assert re.search(r"queued 0  running 0  done 6 \(\d+\.\d/s\)  failed 1  lost 0", table)
    assert re.search(rf"{worker.id[:12]} .* {worker.pid}  idle +6 .* square, die", table)
    assert document["jobs"] == {"queued": 0, "running": 0, "done": 6, "failed": 1, "lost": 0}
    assert document["workers"][0]["id"] == worker.id
    assert document["workers"][0]["services"] == ["square", "die"]
    assert document["rates"]["done"] > 0


def read_lines(process: subprocess.Popen[str], wanted: Callable[[str], object]) -> str:
    """The next line of its output that is wanted."""
    assert process.stdout is not None
    deadline = time.monotonic() + DEADLINE
    for line in process.stdout:  # there is one every tenth of a second
        if wanted(line):
            return line
        assert time.monotonic() < deadline, f"not seen; the last line was {line!r}"
    pytest.fail("it has ended")


def test_status_watches_workers_come_and_go(shell: Shell) -> None:
    watch = ["status", "--endpoint", shell.endpoint, "--watch", "0.1"]
    with master(shell) as runner:
        lines, documents = shell.start(*watch), shell.start(*watch, "--json")
        read_lines(lines, lambda line: "workers 0 (0 busy)" in line)
        first, second = shell.worker("shapes:hold"), shell.worker("shapes:hold")
        read_lines(lines, lambda line: "workers 2 (0 busy)" in line)
        gate = shell.directory / "gate"
        jobs = [runner.submit("1", str(gate)) for _ in range(3)]
        read_lines(lines, lambda line: "workers 2 (2 busy)  queued 1  running 2" in line)
        read_lines(documents, lambda line: json.loads(line)["jobs"]["queued"] == 1)
        gate.touch()
        for job in jobs:
            job.result(20)
        read_lines(lines, lambda line: "workers 2 (0 busy)  queued 0  running 0  done 3" in line)
        read_lines(documents, lambda line: json.loads(line)["rates"]["done"] > 0)
        read_lines(documents, lambda line: json.loads(line)["rates"]["done"] == 0)
        end(first)
        read_lines(lines, lambda line: "workers 1 (0 busy)" in line)
    assert lines.stderr is not None
    assert re.search(r"\d\d  .*(lost before|no master at)", lines.stderr.readline())
    with master(shell, 1):
        read_lines(lines, lambda line: "workers 1 (0 busy)" in line)  # all by itself
        read_lines(documents, lambda line: len(json.loads(line)["workers"]) == 1)
    for process in (lines, documents):
        assert end(process, signal.SIGINT)[0] == 0
    assert end(second)[0] == 0


def test_status_redraws_a_terminal(shell: Shell) -> None:
    ours, theirs = pty.openpty()
    try:
        with master(shell):
            command = ["status", "--endpoint", shell.endpoint, "--watch", "0.1"]
            process = shell.start(*command, stdout=theirs)
            shell.worker("shapes:square")
            seen = ""

            def shows_the_worker() -> bool:
                nonlocal seen
                seen += os.read(ours, 65536).decode()
                return bool(re.search(r"\x1b\[H\x1b\[J[^\x1b]* idle [^\x1b]*\x1b", seen))

            assert eventually(shows_the_worker)
            assert end(process, signal.SIGINT) == (0, "")
    finally:
        os.close(ours)
        os.close(theirs)


def test_no_master_to_ask(shell: Shell) -> None:
    for more in ([], ["--watch"]):
        done = shell.run("status", "--endpoint", shell.endpoint, "--patience", "0.2", *more)
        assert done.returncode == 3
        assert done.stderr.startswith(b"zmqexecutor status: no master at")


def test_a_reader_that_has_seen_enough(shell: Shell) -> None:
    with master(shell):
        process = shell.start("status", "--endpoint", shell.endpoint, "--watch", "0.05", "--json")
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 1
        assert process.stderr is not None
        assert process.stderr.read() == ""


def report(**fields: object) -> Report:
    numbers = {"queued": 0, "running": 0, "done": 0, "failed": 0, "lost": 0}
    known: dict[str, object] = {"uptime": 10.0, "jobs": numbers, "services": [], "workers": []}
    return Report(1, "host", 1, **{**known, **fields})  # type: ignore[arg-type]


def test_rates_are_those_of_one_master() -> None:
    before = report(uptime=10.0, jobs={"done": 100})
    after = report(uptime=12.0, jobs={"done": 150})
    assert reports.rates(before, None)["done"] == 10
    assert reports.rates(after, before)["done"] == 25
    assert reports.rates(report(uptime=1.0, jobs={"done": 3}), after)["done"] == 3


def test_what_a_worker_says_cannot_command_the_terminal() -> None:
    worker = WorkerReport("\x1b[2Jme", "a\nb", 1, ["\x07"], "idle", 0, 100_000.0)
    lines = reports.as_table(report(workers=[worker] * 50), None, "ipc:///m", height=20)
    assert len(lines) == 20
    assert lines[-1] == "... 37 more"
    assert all(line.isprintable() for line in lines)
    assert "1 d 3 h" in lines[-2]


# ----------------------------------------------------------------------- call


def test_calls_and_their_exit_codes(shell: Shell) -> None:
    shell.worker(
        *["default=shapes:square", "total=shapes:total", "mirror=shapes:mirror"],
        *["die=shapes:die", "hold=shapes:hold"],
    )
    other = shell.worker("default=shapes:square", "mirror=shapes:mirror")
    with master(shell, 2, patience=1) as runner:
        assert shell.call("12").stdout == b"144\n"
        assert shell.call("-", data=b"12").stdout == b"144\n"
        mirrored = shell.call("--service=mirror", "--codec=bytes", "-", data=b"a\xff\0\n")
        assert mirrored.stdout == b"\n\0\xffa"
        assert shell.call("--service=mirror", "ab\u00e9").stdout.decode() == "\u00e9ba\n"
        total = shell.call("--service=total", "--codec", "json", "[1, 2.5]")
        assert (total.returncode, total.stdout) == (0, b'{"sum":3.5}\n')

        failed = shell.call("--id", "mine", "x")
        assert (failed.returncode, failed.stdout) == (1, b"")
        assert b"zmqexecutor call: job 'mine' failed:\nTraceback" in failed.stderr
        assert b"invalid literal for int()" in failed.stderr

        late = shell.call("--service=hold", "--timeout=0.3", str(shell.directory / "gate"))
        assert late.returncode == 5
        assert b"no result after 0.3 s" in late.stderr
        (shell.directory / "gate").touch()

        nobody = shell.call("--service=cube", "2")
        assert nobody.returncode == 4
        assert b"'cube'" in nobody.stderr

        lost = shell.call("--service=die", "x")
        assert lost.returncode == 6
        assert b"zmqexecutor call: the worker" in lost.stderr

        assert eventually(lambda: len(runner.workers) == 1)
        too_large = shell.call("-", data=b"1" * 1024 * 1024)
        assert too_large.returncode == 2
        assert b"takes calls of up to" in too_large.stderr

        end(other)
        assert eventually(lambda: not runner.workers)
        assert shell.call("12").returncode == 4
    nowhere = shell.call("--patience", "0.2", "12")
    assert nowhere.returncode == 3
    assert b"no master at" in nowhere.stderr


def test_a_master_that_goes_away_ends_the_wait(shell: Shell) -> None:
    shell.worker("shapes:hold")
    gate = shell.directory / "gate"
    with master(shell, 1):
        process = shell.start("call", "--endpoint", shell.endpoint, str(gate))
        assert eventually(Path(f"{gate}.begun").exists)
    _, stderr = process.communicate(timeout=20)
    # Either it could still say so, or the connection was lost.
    assert process.returncode in (1, 3), stderr
    gate.touch()


def test_a_call_can_be_interrupted(shell: Shell) -> None:
    shell.worker("shapes:hold")
    gate = shell.directory / "gate"
    with master(shell, 1):
        process = shell.start("call", "--endpoint", shell.endpoint, str(gate))
        assert eventually(Path(f"{gate}.begun").exists)
        assert end(process, signal.SIGINT) == (130, "")
        gate.touch()


# ----------------------------------------------------------------------- keys


def test_keys_for_all_commands(shell: Shell) -> None:
    keys = shell.directory / "keys"
    assert shell.run("keygen", "keys").returncode == 0
    again = shell.run("keygen", "keys")
    assert again.returncode == 1
    assert b"never overwritten" in again.stderr
    alpha = shell.run("keygen", "keys", "--worker", "alpha")
    assert alpha.stdout.startswith(f"{keys}/workers/alpha: the keys of alpha;".encode())

    port = free_port()
    shell.endpoint = f"tcp://127.0.0.1:{port}"
    at = ["--endpoint", shell.endpoint]
    group = shell.start("workers", "shapes:square", "-n", "2", "--keys", "keys", *at)
    with JobRunner(shell.endpoint, keys=keys) as runner:
        runner.wait_for_workers(2, 30)
        shell.worker("shapes:square", "--keys", "keys/workers/alpha", "--directory", ".")
        runner.wait_for_workers(3, 30)
        assert shell.call("--keys", str(keys), "12").stdout == b"144\n"
        seen = shell.run("status", *at, "--keys", "keys/workers/alpha", "--json")
        assert len(json.loads(seen.stdout)["workers"]) == 3

        without = shell.run("status", *at, "--patience", "5")
        assert without.returncode == 3
        assert b"keys" in without.stderr
        assert shell.run("keygen", "others").returncode == 0
        wrong = shell.run("status", *at, "--keys", "others", "--patience", "1")
        assert wrong.returncode == 3
        assert b"is not the master whose key" in wrong.stderr
        (keys / "authorized" / "alpha.public").unlink()
        revoked = shell.call("--keys", "keys/workers/alpha", "12")
        assert revoked.returncode == 3
        assert b"refused this worker's key" in revoked.stderr
        assert end(group)[0] == 0


def test_keys_that_are_not_there_or_open_to_others(shell: Shell) -> None:
    at = ["--endpoint", "tcp://127.0.0.1:5570", "--keys", "keys"]
    for command in (["status"], ["call", "12"], ["worker", "shapes:square"], ["worker", "--calls"]):
        done = shell.run(*command, *at)
        assert done.returncode == 1
        assert b"zmqexecutor keygen" in done.stderr
    assert shell.run("keygen", "keys").returncode == 0
    (shell.directory / "keys").chmod(0o755)
    done = shell.run("status", *at)
    assert done.returncode == 1
    assert b"chmod 700" in done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# ----------------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["worker", "workers", "status", "call", "keygen"])
def test_the_examples_in_the_help_can_be_meant(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "exit codes:" in text
    examples = re.findall(rf"^  zmqexecutor ({command}\b.*)", text.replace("\\\n", ""), re.M)
    assert len(examples) >= 3
    for example in examples:
        words = [word for word in shlex.split(example) if word[0] not in "<>"]
        assert cli._parser().parse_args(words).command == command
