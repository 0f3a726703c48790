"""The first steps of a supervisor process: it starts its processes, then imports Circus.

To import Circus takes longer than most programs take to start. So the first
processes of the group start beside it, and are handed over when it is there. If what
they do is known, they are forked from a `template`, which is made before.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import select
import signal
import socket
import subprocess
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence

import msgspec

from ..wire.protocol import Configure, Scale, Spawned, ToSupervisor
from .launch import Launcher, end_now
from .template import make_template

__all__ = ["main"]

_PEEK = 65536


def main(fd: int, parent: int, preload: str = "") -> Callable[[], object]:
    """Be the supervisor, which never returns.

    Args:
        fd: our end of the socket pair.
        parent: the process id of the user's process.
        preload: a module that the template is going to need: imported while the parent makes
            up its mind.

    Returns:
        In the processes that are forked from its template: what they have to do.
    """
    code = 1
    launcher: Launcher | None = None
    try:
        # A thread that blocks signals, and a program that ignores them, pass that on
        # to the processes they start. What is caught is back to default after an exec.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        terminated: list[int] = []

        def on_sigterm(signum: int, _: object) -> None:
            terminated.append(signum)
            if launcher is not None and launcher.is_over():
                os._exit(0)  # nobody needs Circus any more

        signal.signal(signal.SIGTERM, on_sigterm)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for ignored in (signal.SIGINT, signal.SIGHUP):
            signal.signal(ignored, lambda *_: None)
        link = _claim_link(fd)
        if preload:
            with contextlib.suppress(Exception):  # each process will tell, when it needs it
                importlib.import_module(preload)
        if line := _read_line(link, parent):
            config = msgspec.json.decode(line, type=Configure)
            template = make_template(config.preloaded, link) if config.preloaded else None
            if callable(template):
                return template
            warnings.simplefilter("ignore")
            launcher = Launcher(_as_asked_by_now(config, link), template)
            unsent = _start_first(link, launcher, terminated)

            with _docstrings():
                from .supervisor import supervise
            supervise(link, parent, launcher, unsent, terminated)
        code = 0
    except BaseException:
        traceback.print_exc()
    if launcher is not None:
        for popen in launcher.first:
            end_now(popen)
        launcher.close()
    # Nothing of the interpreter's own end is needed, and some of it could wait.
    os._exit(code)


@contextlib.contextmanager
def _docstrings() -> Iterator[None]:
    """Let Circus be imported without any, as under `python -OO`: it takes those of its commands."""
    import textwrap  # as Circus does, but not before the first processes are started

    dedent = textwrap.dedent
    textwrap.dedent = lambda text: dedent(text or "-")
    try:
        yield
    finally:
        textwrap.dedent = dedent


def _as_asked_by_now(config: Configure, link: socket.socket) -> Configure:
    """The configuration with as many processes as the parent has asked for since.

    What it has sent stays to be read.
    """
    with contextlib.suppress(BlockingIOError):
        for line in link.recv(_PEEK, socket.MSG_PEEK | socket.MSG_DONTWAIT).split(b"\n")[:-1]:
            message = msgspec.json.decode(line, type=ToSupervisor)
            if isinstance(message, Scale):
                config = msgspec.structs.replace(config, numprocesses=message.numprocesses)
    return config


def _start_first(
    link: socket.socket,
    launcher: Launcher,
    terminated: Sequence[int],
) -> bytes:
    """Start the processes of the group, but for those that cannot be started.

    That is for the group to find out again, and to tell.

    Returns:
        The end of the reports, which the parent has not read so far.
    """
    unsent = b""
    try:
        for wid in range(1, launcher.config.numprocesses + 1):
            if terminated:
                break
            launcher.first.append(launcher.start(wid))
            unsent += msgspec.json.encode(Spawned(launcher.first[-1].pid)) + b"\n"
            with contextlib.suppress(BlockingIOError):
                unsent = unsent[link.send(unsent, socket.MSG_DONTWAIT) :]
    except (OSError, ValueError, subprocess.SubprocessError):
        pass
    return unsent


def _read_line(link: socket.socket, parent: int) -> bytes:
    """The first line, and nothing of what follows it; empty if the parent is gone.

    What it has left is removed then.
    """
    poll = select.poll()
    poll.register(link, select.POLLIN)
    with contextlib.ExitStack() as stack:
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                parents = os.pidfd_open(parent)
                stack.callback(os.close, parents)
                poll.register(parents, select.POLLIN)
        line = bytearray()
        if os.getppid() != parent:  # it has gone before; its forks keep our link open
            _clean_up(link, line)
            return b""
        while not line.endswith(b"\n"):
            if link.fileno() not in dict(poll.poll()):
                _clean_up(link, line)
                return b""
            seen = link.recv(_PEEK, socket.MSG_PEEK)
            if not seen:
                return b""
            line += link.recv(seen.find(b"\n") + 1 or len(seen))
        return bytes(line)


def _clean_up(link: socket.socket, line: bytearray) -> None:
    """Remove the directory of a parent that is gone, if it has come to telling us of it."""
    import shutil  # no other supervisor needs it so early

    with contextlib.suppress(BlockingIOError, ConnectionError):
        while b"\n" not in line and (more := link.recv(_PEEK, socket.MSG_DONTWAIT)):
            line += more
    first, complete, _ = line.partition(b"\n")
    if complete:
        config = msgspec.json.decode(first, type=Configure)
        shutil.rmtree(config.directory, ignore_errors=True)


def _claim_link(fd: int) -> socket.socket:
    """The link, on a descriptor that is not one of the three that processes inherit."""
    if fd < 3:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        os.close(fd)
        fd = moved
    os.set_inheritable(fd, False)
    for standard in range(3):
        try:
            os.fstat(standard)
        except OSError:  # closed by the user: what is opened next must not land there
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(standard, True)
    return socket.socket(fileno=fd)
