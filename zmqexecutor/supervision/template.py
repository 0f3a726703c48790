"""A process that others are forked from: it has imported what they need, once.

    supervisor                       template                      a process of the group
    Template.start ─── two pipes ──► forks a process that forks ─► waits to be the supervisor's
                   ◄── its id ─────────────────────────────────── says so, and begins

A fresh interpreter takes some 90 ms of processor time to be a worker; a fork takes three,
and shares most of its memory. It is safe because the template does nothing else:
it has one thread, no sockets of ZeroMQ, and of the user's code it has run only what
starts with every interpreter (`sitecustomize`, `.pth` files).

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
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from ..wire.protocol import Preloaded
from . import prctl

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
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(0.001)  # as Popen does; it has been killed
        return code


class Template:
    """The supervisor's handle on it."""

    def __init__(self, pid: int, link: socket.socket) -> None:
        self.pid = pid
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
        answer, theirs = os.pipe()
        prctl.adopt_orphans(True)
        try:
            try:
                socket.send_fds(self._link, [b"!"], [stderr, theirs])
            finally:
                os.close(theirs)  # the end of file tells if nobody is left to answer
            poll = select.poll()
            poll.register(answer, select.POLLIN)
            if not poll.poll(PATIENCE * 1000):
                raise TimeoutError
            pid, error = _ANSWER.unpack(os.read(answer, _ANSWER.size))
        except (OSError, struct.error) as problem:
            raise TemplateLostError from problem
        finally:
            prctl.adopt_orphans(False)
            os.close(answer)
        return pid, error

    def close(self) -> None:
        """End it."""
        self._link.close()
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
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
    supervisor = os.getpid()
    try:
        # Before and after: an import may start a thread, and should not run twice in vain.
        if not _may_fork():
            return None
        function = getattr(importlib.import_module(preloaded.module), preloaded.function)
        if not _may_fork():
            return None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except Exception:  # each process will tell, when it starts by itself
        return None
    name = prctl.rename(NAME)  # so that it never has another
    try:
        pid = os.fork()
    except Exception:  # the system's, or that of an audit hook
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
    if not _has_one_thread():  # others may have been started by the fork
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # a collection in a fork would copy what it shares
    try:
        _serve(theirs, supervisor)
    except BaseException:  # the supervisor sees that nobody answers, and goes another way
        os._exit(1)
    prctl.rename(name)
    return partial(function, *preloaded.arguments)


def _may_fork() -> bool:
    """Whether a fork of this process is as good as a fresh one."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        return False  # a fresh one would have them
    if not (prctl.adopt_orphans(True) and prctl.adopt_orphans(False)):
        return False
    return _has_one_thread()


def _has_one_thread() -> bool:
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def _serve(link: socket.socket, supervisor: int) -> None:
    """Fork whenever the supervisor asks for it; returns in each new process.

    Whoever ends in between has closed the pipe for the answer, which is an answer too.
    """
    while True:
        asked, descriptors, _, _ = socket.recv_fds(link, 1, 2)
        if not asked:
            os._exit(0)  # there is no supervisor any more
        stderr, answer = descriptors
        ready, go = os.pipe()
        try:
            middle = os.fork()
        except OSError as error:
            _tell(answer, 0, error.errno)
        else:
            if middle == 0:
                os.close(go)
                _fork_again(answer)
                link.close()
                _begin(supervisor, ready, stderr, answer)
                return
            os.waitpid(middle, 0)  # from here on its child is the supervisor's
        for descriptor in (ready, go, stderr, answer):
            os.close(descriptor)


def _fork_again(answer: int) -> None:
    """Returns in the child only."""
    try:
        if os.fork() == 0:
            return
    except OSError as error:
        _tell(answer, 0, error.errno)
    os._exit(0)


def _begin(supervisor: int, ready: int, stderr: int, answer: int) -> None:
    """Be a process like a fresh one."""
    os.read(ready, 1)  # the end of file: the template has closed its end
    os.close(ready)
    prctl.die_with_parent(supervisor)
    os.setsid()
    os.dup2(stderr, 2)
    os.close(stderr)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # As multiprocessing does it: a fork leaves the number of the one that it was made from.
    threading.main_thread()._set_native_id()  # type: ignore[attr-defined]
    _tell(answer, os.getpid(), 0)
    os.close(answer)


def _tell(answer: int, pid: int, error: int | None) -> None:
    try:
        os.write(answer, _ANSWER.pack(pid, error or 0))
    except OSError:
        os._exit(1)  # nobody waits for it any more
