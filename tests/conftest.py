"""Every test ends with the threads, processes, descriptors and files it began with."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

from zmqexecutor import Workers, ZmqExecutor
from zmqexecutor.supervision import supervisor_process
from zmqexecutor.system import directories

DEADLINE = 15.0

# A shell ignores them for what it runs in the background, and nohup one of them; what is
# started by tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for _signum in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(_signum, signal.SIG_DFL)

# Not the keys of whoever runs the tests, also not in the programs that they start.
os.environ["ZMQEXECUTOR_KEYS"] = ""


@contextlib.contextmanager
def sent_by_value(name: str, source: str, folder: Path) -> Iterator[Any]:
    """A module whose code travels by value, as the script's does.

    Args:
        name: its name.
        source: its code.
        folder: where it is, and perhaps modules that it imports; workers can import from there.
    """
    (folder / f"{name}.py").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        module = importlib.import_module(name)
        cloudpickle.register_pickle_by_value(module)
        try:
            yield module
        finally:
            cloudpickle.unregister_pickle_by_value(module)
            del sys.modules[name]


def eventually(condition: Callable[[], object], timeout: float = DEADLINE) -> bool:
    """Poll until the condition holds; False if it does not within the timeout (seconds)."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def run_in_supervisors(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have every supervisor run this before anything of ours but the module search path."""
    head, ours, tail = supervisor_process._BOOT.partition("from zmqexecutor.")
    escaped = repr(code).replace("{", "{{").replace("}", "}}")
    monkeypatch.setattr(supervisor_process, "_BOOT", f"{head}exec({escaped}); {ours}{tail}")


def start_without_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every worker started by its command, as where it cannot be forked."""
    monkeypatch.setattr(Workers, "preloaded", property(lambda _: None, lambda *_: None))


def alive(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _children() -> set[tuple[int, str]]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add((process.pid, " ".join(process.cmdline())[:200]))
        except psutil.NoSuchProcess:
            pass
    return found


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.is_alive()}


def _descriptors() -> dict[str, str]:
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[entry] = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            pass
    return found


def _private_directories() -> set[str]:
    """Those made by this process, not those of tests that run beside this one."""
    found = set()
    for base in directories._bases():
        root = Path(base, f"zmqexecutor-{os.geteuid()}")
        found |= {str(path) for path in root.glob(f"{os.getpid()}-*")}
    return found


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves anything behind, and say what."""
    before = (_children(), _threads(), _descriptors(), _private_directories())
    yield
    gc.collect()

    def left() -> dict[str, object]:
        now = (_children(), _threads(), _descriptors(), _private_directories())
        return {
            "processes": now[0] - before[0],
            "threads": now[1] - before[1],
            "descriptors": {k: v for k, v in now[2].items() if k not in before[2]},
            "private directories": now[3] - before[3],
        }

    eventually(lambda: not any(left().values()), 5)
    leaked = {what: which for what, which in left().items() if which}
    assert not leaked, f"left behind: {leaked}"


@pytest.fixture
def executor() -> Iterator[ZmqExecutor]:
    """An executor of two workers, shut down after the test."""
    with ZmqExecutor(2) as made:
        yield made


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program of its own, given as indented source."""

    def run(source: str, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(source))
        return subprocess.run(
            [sys.executable, str(script), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
