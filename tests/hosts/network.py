"""Several hosts on one machine: Linux namespaces, joined by a router that can lose packets.

    the tests (10.77.0.2)      alpha (10.77.1.2)      beta (10.77.2.2)
            └───────────┬──────────────┴──────────────────┘
                      router

Each host has a network, process ids, a name and mounts of its own, and the files of the
machine. All of it hangs on processes that end when their standard input does, so that
nothing is left when the tests are killed: namespaces without processes are removed by
the kernel.

A cut is a rule of the router to throw packets away. No side is told of it, unlike when
an interface goes down.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from ..conftest import alive, eventually

__all__ = ["Cut", "Host", "Network", "Program", "free_port", "why_not"]

ROOT = Path(__file__).parents[2]
CLONE_NEWNET = 0x40000000
_TOOLS = ("unshare", "nsenter", "ip")


def why_not() -> str:
    """Why there can be no such hosts here, or nothing."""
    if sys.platform != "linux":
        return "namespaces are Linux's"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found (util-linux and iproute2 have them)"
    if os.geteuid() != 0:
        return "needs root, or: unshare --map-root-user --net python -m pytest tests/hosts"
    trial = (
        "ip link add name trial type veth peer name other && ip rule add from 10.0.0.1 blackhole"
    )
    command = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "sh", "-c", trial]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else ""


class Program(subprocess.Popen[str]):
    """A process on a host, which this one waits for.

    Attributes:
        inside: its process id, as this machine counts.
    """

    inside: int

    def end(self, signum: int = signal.SIGKILL) -> None:
        """Send it a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.inside, signum)


class Host:
    """A network with one address, process ids, a name and mounts of its own."""

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.address = f"10.77.{number}.2"
        self._keeper = _keep(
            *("--net", "--uts", "--mount", "--pid", "--mount-proc"),
            script=f"hostname {name} && ip link set lo up",
        )
        self.pid = _only_child(self._keeper)
        self._programs: list[Program] = []

    def tcp(self, port: int) -> str:
        """The address of this port."""
        return f"tcp://{self.address}:{port}"

    def start(self, *arguments: str, **options: Any) -> Program:
        """Start a program here, in a session of its own."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
        program = Program(
            [*self._enter(), *arguments],
            text=True,
            env=environment,
            start_new_session=True,
            **options,
        )
        self._programs.append(program)
        try:
            program.inside = _only_child(program)
        except AssertionError:
            program.inside = program.pid  # it has ended already
        return program

    def python(
        self, source: str, *arguments: str, python: str = sys.executable, **options: Any
    ) -> Program:
        """Start a program here, given as source."""
        return self.start(python, "-c", textwrap.dedent(source), *arguments, **options)

    def run(self, *command: str) -> str:
        """Run a command here, and return what it prints."""
        return _run(*self._enter(), *command)

    def processes(self) -> list[int]:
        """Those that run here, but for the first, which holds it all."""
        namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError):
                if pid != self.pid and os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                    found.append(pid)
        return found

    def traffic(self) -> tuple[int, int]:
        """Bytes that have come, and that were sent."""
        with open(f"/proc/{self.pid}/net/dev") as file:
            numbers = next(line for line in file if "eth0:" in line).partition(":")[2].split()
        return int(numbers[0]), int(numbers[8])

    def kill_all(self) -> None:
        """SIGKILL for every process, as when memory runs out; the host goes on."""
        while pids := [pid for pid in self.processes() if alive(pid)]:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Have this thread, and what it starts, use the network of this host."""
        with open("/proc/thread-self/ns/net") as before:
            with open(f"/proc/{self.pid}/ns/net") as there:
                _set_namespace(there.fileno())
            try:
                yield
            finally:
                _set_namespace(before.fileno())

    def close(self) -> None:
        """Kill it, and all that runs there."""
        _release(self._keeper)
        for program in self._programs:
            with program:
                program.wait(30)

    def _enter(self) -> list[str]:
        namespaces = ["--net", "--uts", "--mount", "--pid"]
        return ["nsenter", "--target", str(self.pid), *namespaces, f"--wdns={os.getcwd()}", "--"]


class Cut:
    """Packets that the router throws away; may be restored, and made again."""

    def __init__(self, rules: Sequence[str], router: int) -> None:
        self._rules = rules
        self._router = router
        self.made = False

    def make(self) -> None:
        self._change("add")
        self.made = True

    def restore(self) -> None:
        if self.made:
            self.made = False
            self._change("del")

    def _change(self, verb: str) -> None:
        lines = "".join(f"rule {verb} pref 100 {rule} blackhole\n" for rule in self._rules)
        _run(*_in_network(self._router), "ip", "-batch", "-", standard_input=lines)

    def __enter__(self) -> Cut:
        self.make()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


class Network:
    """A router with hosts around it."""

    def __init__(self) -> None:
        self._router = _keep("--net", script="echo 1 > /proc/sys/net/ipv4/ip_forward")
        self._router_pid = _only_child(self._router)
        self.hosts: list[Host] = []

    def host(self, name: str) -> Host:
        """Another host."""
        number = len(self.hosts)
        made = Host(name, number)
        self.hosts.append(made)
        commands = f"""
            ip link add name h{number} type veth peer name eth0 netns {made.pid}
            ip address add 10.77.{number}.1/24 dev h{number}
            ip link set h{number} up
        """
        self._on_router(commands)
        made.run(
            *("sh", "-ec"),
            f"""
            ip address add {made.address}/24 dev eth0
            ip link set eth0 up
            ip route add default via 10.77.{number}.1
            """,
        )
        return made

    def cut(self, host: Host, port: int | None = None) -> Cut:
        """A cut between this host and all others, or of one port wherever that is."""
        what = [f"from {host.address}", f"to {host.address}"]
        if port is not None:
            what = [
                f"{direction} ipproto tcp {side} {port}"
                for direction in what
                for side in ("sport", "dport")
            ]
        return Cut(what, self._router_pid)

    def slow_down(self, host: Host, bits: int) -> None:
        """Limit what may go from and to this host, to so many bits a second.

        Raises:
            OSError: the kernel has no such queue.
        """
        limit = f"root tbf rate {bits}bit burst 32kb latency 200ms"
        try:
            self._on_router(f"tc qdisc replace dev h{self.hosts.index(host)} {limit}")
            host.run("sh", "-c", f"tc qdisc replace dev eth0 {limit}")
        except AssertionError as error:
            raise OSError(f"tc qdisc tbf: {error}") from None

    def delay(self, host: Host, options: str) -> None:
        """Delay or lose what goes to and from this host: options of netem.

        Raises:
            OSError: the kernel has no netem.
        """
        try:
            self._on_router(f"tc qdisc replace dev h{self.hosts.index(host)} root netem {options}")
            host.run("sh", "-c", f"tc qdisc replace dev eth0 root netem {options}")
        except AssertionError as error:
            raise OSError(f"tc qdisc netem: {error}") from None

    def close(self) -> None:
        """End all."""
        for host in self.hosts:
            host.close()
        _release(self._router)

    def _on_router(self, script: str) -> None:
        _run(*_in_network(self._router_pid), "sh", "-ec", script)


def free_port(host: Host) -> int:
    """A port of this host that nobody uses."""
    with host.inside(), socket.socket() as probe:
        probe.bind((host.address, 0))
        return int(probe.getsockname()[1])


def _keep(*namespaces: str, script: str) -> subprocess.Popen[str]:
    """A process that holds new namespaces for as long as this process lives."""
    keeper = subprocess.Popen(
        [
            *("unshare", *namespaces, "--fork", "--kill-child", "--"),
            *("sh", "-ec", f"{script}; echo ready; exec cat"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C is for the tests
    )
    assert keeper.stdout
    assert keeper.stdout.readline() == "ready\n"
    return keeper


def _release(keeper: subprocess.Popen[str]) -> None:
    with keeper:
        assert keeper.stdin
        keeper.stdin.close()
        keeper.wait(30)


def _only_child(process: subprocess.Popen[str]) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    assert eventually(lambda: process.poll() is not None or children.read_text())
    return int(children.read_text())


def _in_network(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--net", "--"]


def _run(*command: str, standard_input: str | None = None) -> str:
    done = subprocess.run(command, input=standard_input, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def _set_namespace(descriptor: int) -> None:
    # os.setns is there from Python 3.12 on.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
