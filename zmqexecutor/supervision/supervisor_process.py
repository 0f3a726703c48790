"""A supervisor process and the socket pair to it, before anything else is known of it.

It needs nothing but the standard library, so that a supervisor can start, and import what
it needs, while this process still imports what it needs itself.
"""

from __future__ import annotations

import os
import socket
import subprocess
import weakref

from ..system.interpreter import python_command, start_path

__all__ = ["SupervisorProcess", "signal_leader"]

_BOOT = (
    "import sys; sys.path[:] = {path}; "
    "from zmqexecutor.system import interpreter; interpreter.depth = interpreter.DEEPEST; "
    "from zmqexecutor.supervision.supervisor_boot import main; main({fd}, {parent}, {preload!r})()"
)


class SupervisorProcess:
    """Started, and waiting for its configuration. It ends when nobody holds this any more.

    Attributes:
        socket: our end of the socket pair, which does not block.
        popen: the process.
        configured: whether it has been told what to do, and is looked after by who has told it.
        hang_up: ends the connection; may be called more than once.
    """

    def __init__(self, preload: str = "") -> None:
        """Start it.

        Args:
            preload: a module that it is going to need.

        Raises:
            OSError: the system cannot make one.
            RuntimeError: it is not known where the interpreter is.
        """
        self.configured = False
        self._owner = os.getpid()
        self.socket, theirs = socket.socketpair()
        # When it is dropped, or the interpreter ends, the supervisor sees the end of file
        # and cleans up by itself.
        self.hang_up = weakref.finalize(self, _hang_up, self.socket, self._owner)
        try:
            self.socket.setblocking(False)
            self.popen = _spawn(theirs, preload)
        except BaseException:
            self.hang_up()
            raise
        finally:
            theirs.close()

    def discard(self) -> None:
        """End it, unless it is in use, or another process's."""
        if not self.configured and os.getpid() == self._owner:
            self.hang_up()
            self.popen.kill()
            self.popen.wait()


def signal_leader(pid: int, signum: int, *, group: bool = False) -> None:
    """Signal a process that leads its session, as all of ours do.

    A process that meanwhile got the id of one that has ended hardly does.

    Args:
        pid: its id.
        signum: the signal.
        group: whether what it has started in its process group gets it too.
    """
    try:
        if os.getsid(pid) == pid:
            send = os.killpg if group else os.kill
            send(pid, signum)
    except (ProcessLookupError, PermissionError):
        pass


def _hang_up(link: socket.socket, owner: int) -> None:
    """End the connection, though forked children may hold copies of the descriptor."""
    if os.getpid() == owner:
        try:
            link.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the supervisor has ended
    link.close()


def _spawn(theirs: socket.socket, preload: str) -> subprocess.Popen[bytes]:
    """Start the supervisor with its end of the link."""
    boot = _BOOT.format(
        path=ascii(start_path()), fd=theirs.fileno(), parent=os.getpid(), preload=preload
    )
    return subprocess.Popen(
        python_command("-c", boot),
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        # A terminal's Ctrl-C and hang-up are for this program, which decides.
        start_new_session=True,
    )
