"""Private directories."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterator

from .descriptors import check_descriptors

__all__ = ["IPC_PATH_LIMIT", "PrivateDirectory"]

IPC_PATH_LIMIT = 107
"""Bytes in the path of a local socket (Linux: 108 with the final zero byte)."""
FILES = 16
"""Files that a private directory must have room for; journals and segments can do without."""
UNLOCKED_FOR = 60.0
"""Seconds after which a private directory without a lock has been left behind."""

_ROOM_FOR_NAMES = 40  # what is appended to a directory: our own part, file names
_own: set[str] = set()  # directories this process made: its own locks do not stop it


class PrivateDirectory:
    """A directory that only this user can enter, made for this process.

    It is removed by `close`, at the latest when this process exits, by the
    supervisor when this process dies, or, when both were killed, by whoever makes
    the next one: a lock that the kernel drops with its owner tells a living
    directory from one left behind.

    Attributes:
        path: the directory, short enough for local sockets in it.
    """

    def __init__(self) -> None:
        """Make it in memory (/dev/shm) if possible, else in the usual places.

        Raises:
            OSError: none of these places can be used; the message names them.
        """
        check_descriptors()
        tried = []
        for base in _bases():
            try:
                root = _root(base)
                _sweep(root)
                _check_room(root)
                self._make(root)
                break
            except OSError as error:
                tried.append(str(error))
        else:
            raise OSError(
                "no place for a private directory; set TMPDIR to a short, writable one. "
                "Tried: " + "; ".join(tried)
            )

    def _make(self, root: str) -> None:
        self.path = tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root)
        _own.add(self.path)
        try:
            os.chmod(self.path, 0o700)  # whatever the umask
            # Locked before it gets the name that others look for. A POSIX lock belongs
            # to the process, so a forked child does not keep it alive.
            fresh = os.path.join(self.path, "lock.new")
            self._lock = os.open(fresh, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except BaseException:
            os.rmdir(self.path)
            _own.discard(self.path)
            raise
        # Also at exit, for when an interrupt has kept its owner from the call of `close`.
        self._remove = weakref.finalize(self, _remove, self.path, self._lock, os.getpid())
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        os.rename(fresh, os.path.join(self.path, "lock"))

    def close(self) -> None:
        """Remove the directory and what is in it. A forked child does not."""
        self._remove()


def _remove(path: str, lock: int, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
        _own.discard(path)


def _bases() -> Iterator[str]:
    yield "/dev/shm"  # noqa: S108  (verified below: ours alone, or not used)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield runtime
    yield tempfile.gettempdir()
    yield "/tmp"  # noqa: S108  (for when TMPDIR is too long for a socket's path)


def _root(base: str) -> str:
    """The folder for all private directories of this user below `base`."""
    root = os.path.join(base, f"zmqexecutor-{os.geteuid()}")
    if len(os.fsencode(root)) + _ROOM_FOR_NAMES > IPC_PATH_LIMIT:
        raise OSError(f"{base} is too long for the path of a local socket")
    with contextlib.suppress(FileExistsError):
        os.mkdir(root, 0o700)
        os.chmod(root, 0o700)  # whatever the umask
    status = os.lstat(root)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(f"{root} is not a directory of this user")
    if status.st_mode & 0o077:
        raise PermissionError(f"{root} is open to others; remove it or set its mode to 0700")
    return root


def _check_room(root: str) -> None:
    """Make sure that a few files can be made there: nothing can take the place of sockets."""
    status = os.statvfs(root)
    if status.f_files > 0 and status.f_favail < FILES:  # else there is no such limit
        raise OSError(errno.ENOSPC, f"fewer than {FILES} more files can be made", root)


def _sweep(root: str) -> None:
    """Remove the directories whose owners are gone."""
    for name in os.listdir(root):
        path = os.path.join(root, name)
        if path in _own:
            continue
        try:
            lock = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            _sweep_unlocked(path)
            continue
        except OSError:
            continue  # too few descriptors, say: that tells nothing of its owner
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its owner lives
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _sweep_unlocked(path: str) -> None:
    """Remove a directory whose maker was killed before it could lock it.

    One that is just being made, or removed by another process, is young.
    """
    with contextlib.suppress(OSError):
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode):
            return
        # Both by the clock of the kernel: the directory above is changed now.
        root = os.path.dirname(path)
        os.utime(root)
        if os.stat(root).st_mtime - status.st_mtime > UNLOCKED_FOR:
            shutil.rmtree(path, ignore_errors=True)
