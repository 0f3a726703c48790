"""Resource limits of workers: what they stop, and what is said of it."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import sys
import time
from pathlib import Path

import pytest

from zmqexecutor import BrokenPoolError, WorkerLostError, Workers, ZmqExecutor
from zmqexecutor.system.limits import check_rlimits, teller

MIB = 2**20


def burn(seconds: float) -> None:
    """Use so much processor time."""
    while time.process_time() < seconds:
        pass


def open_many() -> int:
    files = []
    while True:
        files.append(open("/dev/null"))  # noqa: SIM115  (the limit ends it)


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ({"memory": 1}, ValueError, "no resource limit 'memory' here; there are .*data"),
        ({"DATA": 1}, ValueError, "no resource limit 'DATA'"),
        ({7: 1}, ValueError, "no resource limit 7"),
        ({"data": -1}, ValueError, "'data' must be 0 to"),
        ({"data": 2**63}, ValueError, "'data' must be 0 to"),
        ({"data": 1.5}, TypeError, "'data' must be an int"),
        ({"data": True}, TypeError, "'data' must be an int"),
        ({"data": None}, TypeError, "'data' must be an int"),
    ],
)
def test_impossible_limits_are_refused(
    limits: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Workers("true", rlimits=limits)
    with pytest.raises(error, match=message):
        ZmqExecutor(1, worker_rlimits=limits)


def test_no_limits_are_none() -> None:
    assert check_rlimits(None) is None
    assert check_rlimits({}) is None


def test_only_what_a_limit_can_have_caused_is_noted() -> None:
    tell = teller({"data": 5, "nofile": 6})
    assert "data=5" in tell(MemoryError())
    assert "nofile=6" in tell(OSError(errno.EMFILE, "x"))
    assert tell(OSError(errno.ENOENT, "x")) == tell(ValueError()) == tell(OSError()) == ""
    assert teller({"cpu": 1})(MemoryError()) == ""


def test_the_limits_are_those_of_the_process() -> None:
    with ZmqExecutor(1, worker_rlimits={"nofile": 100, "core": 0}) as executor:
        assert executor.submit(resource.getrlimit, resource.RLIMIT_NOFILE).result(30) == (100, 100)
        assert executor.submit(resource.getrlimit, resource.RLIMIT_CORE).result(30) == (0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere these limits have no effect")
@pytest.mark.parametrize("name", ["data", "as"])
def test_memory_is_refused_to_its_task_only(name: str) -> None:
    with ZmqExecutor(1, worker_rlimits={name: 500 * MIB}) as executor:
        pid = executor.submit(os.getpid).result(30)
        error = executor.submit(bytearray, 600 * MIB).exception(30)
        assert isinstance(error, MemoryError)
        assert f"resource limits may be the cause: {name}={500 * MIB}" in str(error.__cause__)
        assert executor.submit(len, bytes(MIB)).result(30) == MIB
        assert executor.submit(os.getpid).result(30) == pid


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere these limits have no effect")
def test_a_map_that_is_refused_is_explained_too() -> None:
    with ZmqExecutor(1, worker_rlimits={"as": 500 * MIB}) as executor:
        error = executor.submit(lambda: mmap.mmap(-1, 600 * MIB)).exception(30)
        assert isinstance(error, OSError)
        assert "as=" in str(error.__cause__)


def test_open_files_are_refused_to_their_task_only() -> None:
    with ZmqExecutor(1, worker_rlimits={"nofile": 100}) as executor:
        error = executor.submit(open_many).exception(30)
        assert isinstance(error, OSError)
        assert error.errno == errno.EMFILE
        assert "resource limits may be the cause: nofile=100" in str(error.__cause__)
        assert executor.submit(pow, 2, 2).result(30) == 4


def test_processor_time_costs_the_task_and_a_new_worker_comes() -> None:
    with ZmqExecutor(1, worker_rlimits={"cpu": 2}) as executor:
        error = executor.submit(burn, 60).exception(60)
        assert isinstance(error, WorkerLostError)
        assert error.signal in ("SIGXCPU", "SIGKILL")
        assert "cpu=2" in error.cause
        assert error.cause in str(error)
        assert executor.submit(pow, 2, 2).result(30) == 4


def impossible() -> int:
    """More open files than even a privileged process may have."""
    limit = int(Path("/proc/sys/fs/nr_open").read_text())
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(limit, hard if hard != resource.RLIM_INFINITY else 0) + 1


@pytest.mark.skipif(sys.platform != "linux", reason="it takes a limit that all are refused")
def test_a_limit_that_the_system_refuses_is_told() -> None:
    with ZmqExecutor(1, worker_rlimits={"nofile": impossible(), "core": 0}) as executor:
        error = executor.submit(pow, 2, 2).exception(30)
    assert isinstance(error, BrokenPoolError)
    assert f"refuses the resource limits nofile={impossible()} (at most" in str(error)
    assert "core" not in str(error)
