"""A process that others are forked from: it has imported what they need, once.

    supervisor                       template                      a process of the group
    Template.start ─── stderr ─────► forks a process that forks ─► waits to be the supervisor's
                   ◄── its id ─────────────────────────────────── says so, and begins

A fresh interpreter takes some 90 ms of processor time to be a worker; a fork takes three,
and shares most of its memory. It is safe because the template does nothing else:
it has one thread, no sockets of ZeroMQ, and nothing of the user's is ever run in it.

Circus needs the processes to be the supervisor's own children. So the template forks
a process that forks another and ends; the supervisor, which has asked the kernel for
orphans just for that moment, adopts that one.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Final, NoReturn

from . import prctl
from .protocol import Preloaded

__all__ = ["NAME", "Forked", "Template", "TemplateLostError", "make_template"]

NAME: Final = b"zmq-template"
"""Of the template, in lists of processes."""
PATIENCE: Final = 5.0
"""Seconds in which the template must have answered; it needs a few thousandths."""

_ANSWER: Final = struct.Struct("=ii")
"""The id of the new process, or the error number of a fork that failed."""


class TemplateLostError(Exception):
    """The template has gone, or does not answer."""


class Forked:
    """A process that was forked from the template: as much of a `Popen` as is needed."""

    def __init__(self, pid: int, stderr: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stderr = open(stderr, "rb")  # noqa: SIM115  (whoever reads it closes it)

    def poll(self) -> int | None:
        """Its exit status if it has ended."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has waited for it: as Popen has it
                self.returncode = 0
            else:
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Its exit status, when it has ended.

        Raises:
            TimeoutExpired: it has not, within so many seconds.
        """
        if self.poll() is None:
            descriptor = os.pidfd_open(self.pid)
            try:
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                poll.poll(timeout * 1000)
            finally:
                os.close(descriptor)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return code


class Template:
    """The supervisor's handle on it."""

    def __init__(self, pid: int, link: socket.socket) -> None:
        self._pid = pid
        self._link = link
        link.settimeout(PATIENCE)

    def start(self) -> Forked:
        """Start a process, as the leader of a session of its own.

        Raises:
            OSError: the system cannot make one.
            TemplateLostError: try another way.
        """
        stderr, theirs = os.pipe()
        try:
            pid, error = self._ask(theirs)
            if error:
                raise OSError(error, os.strerror(error))
            return Forked(pid, stderr)
        except BaseException:
            os.close(stderr)
            raise
        finally:
            os.close(theirs)

    def _ask(self, stderr: int) -> tuple[int, int]:
        prctl.adopt_orphans(True)
        try:
            socket.send_fds(self._link, [b"!"], [stderr])
            pid, error = _ANSWER.unpack(self._link.recv(_ANSWER.size))
        except (OSError, struct.error) as problem:
            raise TemplateLostError from problem
        finally:
            prctl.adopt_orphans(False)
        return pid, error

    def close(self) -> None:
        """End it."""
        self._link.close()
        try:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def make_template(
    preloaded: Preloaded, link: socket.socket
) -> Template | Callable[[], object] | None:
    """Fork the template from this process, which has one thread and is to be a supervisor.

    Args:
        preloaded: what its processes do.
        link: the supervisor's connection to its parent, of which they must hold no copy.

    Returns:
        Here: the template's handle, or None if there can be none. In each process that it
        is asked for: what that has to do, once all that is on the stack has returned.
    """
    if not _may_fork():
        return None
    try:
        function = getattr(importlib.import_module(preloaded.module), preloaded.function)
    except Exception:  # each process will tell, when it starts by itself
        return None
    supervisor = os.getpid()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    name = prctl.rename(NAME)  # so that it never has another
    try:
        pid = os.fork()
    except OSError:
        pid = -1
    if pid:
        prctl.rename(name)
        theirs.close()
        if pid > 0:
            return Template(pid, ours)
        ours.close()
        return None
    prctl.die_with_parent(supervisor)
    ours.close()
    link.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # a collection in a fork would copy what it shares
    _serve(theirs, supervisor)
    prctl.rename(name)
    return partial(function, *preloaded.arguments)


def _may_fork() -> bool:
    """Whether a fork of this process is as good as a fresh one."""
    if not (prctl.AVAILABLE and hasattr(os, "pidfd_open")):
        return False
    if None in (sys.stdin, sys.stdout, sys.stderr):
        return False  # a fresh one would have them
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def _serve(link: socket.socket, supervisor: int) -> None:
    """Fork whenever the supervisor asks for it; returns in each new process."""
    while True:
        asked, descriptors, _, _ = socket.recv_fds(link, 1, 1)
        if not asked:
            os._exit(0)  # there is no supervisor any more
        ready, go = os.pipe()
        try:
            middle = os.fork()
        except OSError as error:
            _answer(link, 0, error.errno)
        else:
            if middle == 0:
                os.close(go)
                _fork_again(link)
                _begin(link, supervisor, ready, descriptors)
                return
            os.waitpid(middle, 0)  # from here on its child is the supervisor's
        for descriptor in (ready, go, *descriptors):
            os.close(descriptor)


def _fork_again(link: socket.socket) -> None:
    """Returns in the child only."""
    try:
        if os.fork() == 0:
            return
    except OSError as error:
        _answer(link, 0, error.errno)
    os._exit(0)


def _begin(link: socket.socket, supervisor: int, ready: int, descriptors: list[int]) -> None:
    """Be a process like a fresh one."""
    os.read(ready, 1)  # the end of file: the template has closed its end
    os.close(ready)
    prctl.die_with_parent(supervisor)
    os.setsid()
    for stderr in descriptors:
        os.dup2(stderr, 2)
        os.close(stderr)
    for signum, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        signal.signal(signum, handler)
    _answer(link, os.getpid(), 0)
    link.close()


def _answer(link: socket.socket, pid: int, error: int | None) -> None:
    try:
        link.send(_ANSWER.pack(pid, error or 0))
    except OSError:
        _give_up()


def _give_up() -> NoReturn:
    """Nobody waits for this process."""
    os._exit(1)
