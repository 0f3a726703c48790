"""Memory that tasks use and free, and use again."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zmqexecutor import JobRunner, ZmqExecutor

MEBIBYTE = 1 << 20
BLOCKS = 5
"""So many that what is freed is more than glibc would keep by itself, twice the largest."""

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc"
    or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ),
    reason="it is a matter of glibc, if it is not told otherwise",
)


def faults_of_using(mebibytes: float) -> int:
    """Use some blocks of memory, twice; the page faults of the second time."""
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [b"x" * int(mebibytes * MEBIBYTE) for _ in range(BLOCKS)]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        del blocks
    return faults


def pid_after_using(mebibytes: float) -> int:
    faults_of_using(mebibytes)
    return os.getpid()


@needs_glibc
@pytest.mark.parametrize("mebibytes", [0.2, 1, 8])
def test_a_worker_uses_freed_memory_again(mebibytes: float) -> None:
    pages = BLOCKS * mebibytes * MEBIBYTE / resource.getpagesize()
    with ZmqExecutor(1) as executor:
        assert executor.submit(faults_of_using, mebibytes).result() < pages / 10


@needs_glibc
def test_what_a_worker_keeps_does_not_wear_it_out() -> None:
    with ZmqExecutor(1, max_worker_memory=60 * MEBIBYTE) as executor:
        # 70 MiB at a time, of which next to nothing stays.
        used = {executor.submit(pid_after_using, 14).result() for _ in range(6)}
    assert len(used) == 1


@needs_glibc
def test_a_worker_of_the_command_line_does_too(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_memory import faults_of_using\n"
        "def faults(job): return str(faults_of_using(4))\n"
    )
    endpoint = f"ipc://{tmp_path}/master"
    command = [sys.executable, "-m", "zmqexecutor", "worker", "work:faults", "--endpoint", endpoint]
    with JobRunner(endpoint) as runner, subprocess.Popen(command, cwd=tmp_path) as worker:
        try:
            faults = int(runner.submit("1", "").result(timeout=60))
        finally:
            worker.kill()
    assert faults < BLOCKS * 4 * MEBIBYTE / resource.getpagesize() / 10


@needs_glibc
def test_a_fresh_process_does_not_and_a_variable_has_its_way(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_memory import faults_of_using\n"
        "from zmqexecutor.system.memory import keep_freed_memory\n"
        "if 'keep' in sys.argv: keep_freed_memory()\n"
        "print(faults_of_using(4))\n"
    )
    pages = BLOCKS * 4 * MEBIBYTE // resource.getpagesize()

    def run(argument: str, **env: str) -> int:
        command = [sys.executable, str(script), argument]
        return int(subprocess.check_output(command, env=os.environ | env, timeout=60))

    assert run("leave") > pages / 2
    assert run("keep") < pages / 10
    assert run("keep", MALLOC_TRIM_THRESHOLD_="131072") > pages / 2


@needs_glibc
def test_a_program_that_sends_arrays_does_too(
    run_script: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Or each copy of an argument has to be given pages by the system."""
    done = run_script(
        """
        import resource
        from zmqexecutor import ZmqExecutor

        arrays = [bytearray(150 * 1024) for _ in range(100)]

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            assert list(executor.map(len, arrays)) == [150 * 1024] * 100
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        with ZmqExecutor(1) as executor:
            print(faults(), min(faults() for _ in range(5)))
        """
    )
    first, later = map(int, done.stdout.split())
    assert later < first / 4
