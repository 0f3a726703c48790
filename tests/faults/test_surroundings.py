"""Places that are full, missing, forbidden or few: a clear error, or it works without."""

from __future__ import annotations

import concurrent.futures
import os
import re
import resource
import shlex
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import zmqexecutor
from zmqexecutor import ZmqExecutor

Run = Callable[..., "subprocess.CompletedProcess[str]"]

PROGRAM = """
    import os, sys, tempfile
    from zmqexecutor import ZmqExecutor, WorkerLostError
    def work(i): return i * i
    def big(n): return bytes(n)
    def die(): os._exit(3)
    if __name__ == "__main__":
        with ZmqExecutor(2) as pool:
            assert list(pool.map(work, range(300))) == [i * i for i in range(300)]
            assert len(pool.submit(big, 5_000_000).result()) == 5_000_000
            assert pool.submit(len, bytes(5_000_000)).result() == 5_000_000
            assert isinstance(pool.submit(die).exception(), WorkerLostError)
            assert list(pool.map(work, range(300))) == [i * i for i in range(300)]
        print("done")
"""
"""Small and big data, and a death, whose other tasks need a journal or do without."""


def _can_mount() -> bool:
    probe = "mount -t tmpfs none /dev/shm"
    try:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", probe], capture_output=True, check=False
        )
    except OSError:
        return False
    return done.returncode == 0


mounts = pytest.mark.skipif(not _can_mount(), reason="mount namespaces are not permitted here")


@pytest.fixture
def in_namespace(tmp_path: Path) -> Run:
    """Run the program after shell commands in a mount namespace of its own."""
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))

    def run(commands: str, **environment: str) -> subprocess.CompletedProcess[str]:
        program = shlex.join([sys.executable, str(script)])
        return subprocess.run(
            ["unshare", "-m", "sh", "-ec", f"{commands}\n{program}"],
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, **environment},
            check=False,
        )

    return run


FULL = "dd if=/dev/zero of={0}/filler bs=64k 2>/dev/null || true"


@mounts
@pytest.mark.parametrize(
    "commands",
    {
        "a full /dev/shm": f"mount -t tmpfs -o size=1m none /dev/shm; {FULL.format('/dev/shm')}",
        **{
            f"{files} files in /dev/shm": f"mount -t tmpfs -o nr_inodes={files} none /dev/shm"
            for files in (1, 2, 3, 4, 5, 7, 9, 17, 19, 24)
        },
        "a read-only /dev/shm": "mount -t tmpfs -o ro none /dev/shm",
        "room for one journal": "mount -t tmpfs -o size=400k none /dev/shm",
        "64 MiB, as in a container": "mount -t tmpfs -o size=64m none /dev/shm",
    }.items(),
    ids=lambda named: named[0],
)
def test_shared_memory_that_is_short(in_namespace: Run, commands: tuple[str, str]) -> None:
    """It goes on in another place, or without journals and segments."""
    done = in_namespace(commands[1])
    assert (done.stdout, done.stderr) == ("done\n", "")


@mounts
def test_everything_is_full(in_namespace: Run, tmp_path: Path) -> None:
    if any(
        path.startswith(("/tmp/", "/var/tmp/")) for path in (sys.executable, zmqexecutor.__file__)
    ):
        pytest.skip("Python or this package lies in a directory that has to be full")
    empty = [f"mount -t tmpfs -o nr_inodes=1 none {d};" for d in ("/dev/shm", "/var/tmp", "/tmp")]
    done = in_namespace(
        f"exec 3< {tmp_path}/program.py; cd /proc; {' '.join(empty)} "
        f"exec {sys.executable} /dev/fd/3",
        TMPDIR="/proc",
        XDG_RUNTIME_DIR="",
    )
    assert done.returncode == 1
    # Either tempfile finds no directory at all, or there is none for us.
    messages = ("no place for a private directory; set TMPDIR", "No usable temporary directory")
    assert any(message in done.stderr for message in messages), done.stderr


@mounts
def test_a_full_disk_for_the_temporary_directory(in_namespace: Run, tmp_path: Path) -> None:
    disk = tmp_path / "d"
    disk.mkdir()
    done = in_namespace(
        f"mount -t tmpfs -o ro none /dev/shm; mount -t tmpfs -o size=64k none {disk}; "
        + FULL.format(disk),
        TMPDIR=str(disk),
        XDG_RUNTIME_DIR="",
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.parametrize(
    "environment",
    [
        {"HOME": "/nowhere/at/all", "XDG_RUNTIME_DIR": "/nowhere"},
        {"HOME": "/proc"},
        {"TMPDIR": "/nowhere"},
        {"TMPDIR": "/tmp/" + "long/" * 60},
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"},
    ],
    ids=lambda environment: " ".join(environment),
)
def test_odd_environments(
    run_script: Run, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = run_script(PROGRAM)
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.parametrize("umask", [0o000, 0o277])
def test_whatever_the_umask(umask: int) -> None:
    before = os.umask(umask)
    try:
        with ZmqExecutor(1) as executor:
            assert executor.submit(os.umask, 0o022).result(60) == umask
            directory = executor._engine.master._loop._options.entrances[0].endpoint.removeprefix(
                "ipc://"
            )
            mode = stat.S_IMODE(os.stat(os.path.dirname(directory)).st_mode)
            assert executor.submit(pow, 2, 2).result(60) == 4
    finally:
        os.umask(before)
    assert mode == 0o700


def test_a_clock_that_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that waits, waits by the clock on the wall."""
    start = time.time()
    jumps = iter(range(1, 1_000_000))

    def jumping() -> float:
        number = next(jumps)
        return start + (number * 86_400 if number % 2 else -number * 86_400)

    monkeypatch.setattr(time, "time", jumping)
    with ZmqExecutor(2) as executor:
        assert list(executor.map(abs, range(-200, 0))) == list(range(200, 0, -1))
        assert executor.submit(os._exit, 1).exception(60) is not None
        assert len(executor.submit(bytes, 5_000_000).result(60)) == 5_000_000
        late = executor.options(timeout=0.2).submit(time.sleep, 60)
        assert isinstance(late.exception(60), zmqexecutor.TaskTimeoutError)


def test_the_clock_on_the_wall_is_for_people_and_files() -> None:
    """Where the package reads it at all."""
    package = Path(zmqexecutor.__file__).parent
    readers = {
        str(path.relative_to(package)): len(
            re.findall(r"\btime\.time\(|\bdatetime\.now|\blocaltime\(", path.read_text())
        )
        for path in package.rglob("*.py")
    }
    assert {name: number for name, number in readers.items() if number} == {
        "master/coordinator.py": 1,  # since when a worker is there, for people
        "master/peers.py": 2,  # the same, and for how long
        "wire/buffers.py": 1,  # how long a free segment has been one
        "supervision/process.py": 1,  # since when a process is there, which Circus shows
    }


FEW = """
    import os, resource, sys, time
    from zmqexecutor import ZmqExecutor, WorkerLostError
    import zmqexecutor.pool
    def die(): os._exit(3)
    if __name__ == "__main__":
        highest = max(map(int, os.listdir("/proc/self/fd")))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + int(sys.argv[1]), hard))
        try:
            with ZmqExecutor(2) as pool:
                assert pool.submit(pow, 2, 2).result(60) == 4
            print("done")
        except OSError as error:
            print(error)
"""


@pytest.mark.parametrize("spare", [4, 12, 31])
def test_few_descriptors_from_the_start(run_script: Run, spare: int) -> None:
    done = run_script(FEW, str(spare))
    assert done.returncode == 0, done.stderr
    assert "Too many open files" in done.stdout
    assert "ulimit -n" in done.stdout


def test_descriptors_that_just_suffice(run_script: Run) -> None:
    done = run_script(FEW, "40")
    assert (done.stdout, done.stderr) == ("done\n", "")


NONE_LEFT = """
    import logging, os, resource, sys, time
    from concurrent.futures import TimeoutError  # another one before Python 3.11
    from zmqexecutor import ZmqExecutor, WorkerLostError
    logging.basicConfig(format="%(levelname)s", stream=sys.stdout)
    def take():
        while True:
            try:
                taken.append(os.dup(0))
            except OSError:
                return
    taken = []
    if __name__ == "__main__":
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with ZmqExecutor(1) as pool:
            pid = pool.submit(os.getpid).result(60)
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
            taken = []
            take()
            assert isinstance(pool.submit(os._exit, 3).exception(60), WorkerLostError)
            take()  # also those of the worker that has died
            queued = pool.submit(os.getpid)
            deadline = time.monotonic() + 60
            while pool._engine.master._coordinator.fleet._look_at is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            try:
                queued.result(2)  # its successor has tried to connect by then
            except TimeoutError:
                print("waits")
            for descriptor in taken:
                os.close(descriptor)
            assert queued.result(60) != pid
        print("done")
"""


def test_a_program_whose_descriptors_are_all_taken_goes_on(run_script: Run) -> None:
    """ZeroMQ would end it when the next worker connects."""
    done = run_script(NONE_LEFT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["WARNING", "waits", "done"]


FOR_SOME = """
    import os, resource, sys, time
    from zmqexecutor import ZmqExecutor
    if __name__ == "__main__":
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with ZmqExecutor(4) as pool:
            pool.submit(pow, 2, 2).result(60)
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
            taken = []
            while True:
                try:
                    taken.append(os.dup(0))
                except OSError:
                    break
            for _ in range(int(sys.argv[1])):
                os.close(taken.pop())
            futures = [pool.submit(time.sleep, 0.05) for _ in range(60)]
            for future in futures:
                future.result(60)
            for descriptor in taken:
                os.close(descriptor)
            pool.wait_for_workers(4, timeout=60)
        print("done")
"""


@pytest.mark.parametrize("left", [13, 15, 18])
def test_descriptors_for_some_of_the_workers_that_are_started(run_script: Run, left: int) -> None:
    """Three come at once, and ZeroMQ would end the program at the one it cannot accept."""
    done = run_script(FOR_SOME, str(left))
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_no_descriptor_left_while_it_runs() -> None:
    """What is there goes on; a new worker comes in when there are descriptors again."""
    taken: list[int] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ZmqExecutor(1) as executor:
        pid = executor.submit(os.getpid).result(60)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
            while True:
                try:
                    taken.append(os.dup(0))
                except OSError:
                    break
            assert executor.submit(pow, 2, 10).result(60) == 1024
            assert executor.submit(os._exit, 3).exception(60) is not None
            queued = executor.submit(os.getpid)
            queued.result(0.5)
        except concurrent.futures.TimeoutError:  # before Python 3.11 not the built-in one
            pass  # no worker can connect, which is no reason to fail
        finally:
            for descriptor in taken:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert queued.result(60) != pid
