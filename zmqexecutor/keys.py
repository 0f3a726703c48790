"""A directory of keys for TCP: who the master is, and whom it admits.

    keys/                       0700
        master.secret           0600   masters only
        master.public                  by which a worker knows the master
        worker.secret           0600   workers only
        authorized/NAME.public         whom a master admits; masters only
        workers/NAME/                  made by `add_worker`, to be moved to that host

A key is one line of 40 characters (Z85, as ZeroMQ writes keys); lines that begin
with # are comments. Secrets are in no `repr`, message or pickle.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

import zmq
from zmq.utils import z85

__all__ = ["Keys", "add_worker", "default_directory"]

VARIABLE: Final = "ZMQEXECUTOR_KEYS"
"""The environment variable that names the default directory; empty for none."""
ZAP_DOMAIN: Final = b"zmqexecutor"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a master, of a worker, or of both.

    Example:
        Once, on the master's host::

            Keys.create("keys")
            add_worker("keys", "alpha")  # then move keys/workers/alpha to that host

    Attributes:
        directory: where they are.
        master_public: the master's public key.
        worker_public: the worker's public key, or None if these are a master's only.
    """

    directory: Path
    master_public: bytes
    worker_public: bytes | None
    _master_secret: bytes | None = field(repr=False)
    _worker_secret: bytes | None = field(repr=False)

    @classmethod
    def load(cls, directory: str | os.PathLike[str] | None = None) -> Keys:
        """Read the keys in a directory.

        Args:
            directory: where they are, or None for the default directory.

        Raises:
            FileNotFoundError: there is no such directory, or it has no keys.
            PermissionError: other users could read or change the keys.
            ValueError: a file is not a key, or keys do not belong together.
        """
        path = _named(directory)
        _check_directory(path)
        master_public = _read(path / "master.public")
        if master_public is None:
            raise FileNotFoundError(
                f"there is no {path / 'master.public'}: make keys with `zmqexecutor keygen`, "
                "or copy them from the master's host"
            )
        master_secret = _read(path / "master.secret", secret=True)
        worker_secret = _read(path / "worker.secret", secret=True)
        if master_secret is not None and zmq.curve_public(master_secret) != master_public:
            raise ValueError(
                f"{path / 'master.public'} does not belong to {path / 'master.secret'}"
            )
        worker_public = None if worker_secret is None else zmq.curve_public(worker_secret)
        return cls(path, master_public, worker_public, master_secret, worker_secret)

    @classmethod
    def load_default(cls) -> Keys | None:
        """Read the keys in the default directory; None if there is none.

        Raises:
            FileNotFoundError: the environment names a directory without keys.
            PermissionError: as for `load`.
            ValueError: as for `load`.
        """
        path = default_directory()
        if path is None or not (os.environ.get(VARIABLE) or os.path.lexists(path)):
            return None
        return cls.load(path)

    @classmethod
    def create(cls, directory: str | os.PathLike[str] | None = None) -> Keys:
        """Make the keys of a master and of a worker that it admits.

        Args:
            directory: made for them, with its parents; None for the default directory.

        Raises:
            FileExistsError: it has files, which are never overwritten.
            OSError: it cannot be written.
        """
        path = _named(directory)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        master_public, master_secret = zmq.curve_keypair()
        worker_public, worker_secret = zmq.curve_keypair()
        with _Folder(path) as folder:
            folder.write("master.secret", master_secret)
            folder.write("master.public", master_public)
            folder.write("worker.secret", worker_secret)
            folder.write("authorized/worker.public", worker_public)
        return cls.load(path)

    def for_master(self) -> Keys:
        """These keys, which are a master's.

        Raises:
            FileNotFoundError: something that a master needs is not there.
        """
        if self._master_secret is None:
            self._lacks("master.secret", "a master")
        if not (self.directory / "authorized").is_dir():
            self._lacks("authorized", "a master")
        return self

    def for_worker(self) -> Keys:
        """These keys, which are a worker's.

        Raises:
            FileNotFoundError: something that a worker needs is not there.
        """
        if self._worker_secret is None:
            self._lacks("worker.secret", "a worker")
        return self

    def _lacks(self, name: str, whose: str) -> NoReturn:
        raise FileNotFoundError(
            f"{whose} on tcp:// needs {self.directory / name}, which is not there; copy it from "
            f"where the keys were made. Without keys ({VARIABLE} set to nothing) tcp:// is plain "
            "text, on the loopback interface only"
        )

    def protect(self, socket: zmq.Socket[bytes]) -> None:
        """Have a socket speak CURVE only, whatever it is bound or connected to later.

        A master's ROUTER is the server of CURVE and a worker's DEALER its client, also
        where the worker binds and the master connects: each side proves its key.
        """
        if socket.type == zmq.ROUTER:
            assert self._master_secret is not None
            socket.curve_server = True
            socket.curve_secretkey = self._master_secret
            socket.zap_domain = ZAP_DOMAIN
            # Else everybody is admitted while no gatekeeper is there to be asked.
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        else:
            assert self._worker_secret is not None
            assert self.worker_public is not None
            socket.curve_serverkey = self.master_public
            socket.curve_publickey = self.worker_public
            socket.curve_secretkey = self._worker_secret

    def who(self, public: bytes) -> str | None:
        """The name under which a public key is authorized now, or None.

        The files are read each time: what is added or removed counts at once.

        Raises:
            OSError: the folder cannot be read.
        """
        for path in sorted((self.directory / "authorized").iterdir()):
            if path.suffix != ".public":
                continue
            try:
                known = _read(path)
            except (OSError, ValueError):
                continue  # one that is being written, perhaps; it admits nobody
            if known == public:
                return path.stem
        return None

    def __reduce__(self) -> Any:
        raise TypeError("keys cannot be pickled; pass the name of their directory")


def default_directory() -> Path | None:
    """`$ZMQEXECUTOR_KEYS`, or `zmqexecutor/keys` where the user's configuration is.

    None if the variable is set to nothing.
    """
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):  # the specification: a relative one is to be ignored
        base = os.path.join(os.path.expanduser("~"), ".config")
    return Path(base, "zmqexecutor", "keys")


def add_worker(directory: str | os.PathLike[str] | None, name: str) -> Path:
    """Make the keys of another worker, and have the master admit it, even one that runs.

    Args:
        directory: the master's keys, or None for the default directory.
        name: for the worker, such as that of its host; letters, digits and `._-`.

    Returns:
        The folder to be moved to the worker's host, as its directory of keys.

    Raises:
        ValueError: the name cannot be that of a file.
        FileExistsError: there is such a worker; its keys are never overwritten.
        FileNotFoundError: there are no keys of a master.
        PermissionError: other users could read or change the keys.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"the name {name!r} of a worker: expected at most 64 letters, digits and ._- "
            "that begin with a letter or digit"
        )
    keys = Keys.load(directory).for_master()
    authorized = keys.directory / "authorized" / f"{name}.public"
    if os.path.lexists(authorized):
        raise FileExistsError(f"{authorized} exists; remove it first if it is of no use any more")
    public, secret = zmq.curve_keypair()
    made = keys.directory / "workers" / name
    made.parent.mkdir(mode=0o700, exist_ok=True)
    with _Folder(made) as folder:
        folder.write("master.public", keys.master_public)
        folder.write("worker.secret", secret)
    _write(authorized, public)
    return made


class _Folder:
    """A folder that appears under its name with all its files, or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _Folder:
        if self._path.is_dir() and (there := sorted(self._path.iterdir())):
            raise FileExistsError(
                f"{there[0]} exists: keys are never overwritten; remove {self._path}, "
                "or choose another directory"
            )
        self._new = Path(tempfile.mkdtemp(prefix=".new-", dir=self._path.parent))
        os.chmod(self._new, 0o700)
        return self

    def write(self, name: str, key: bytes) -> None:
        path = self._new / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _write(path, key)

    def __exit__(self, failed: object, *_: object) -> None:
        try:
            if not failed:
                # An empty directory is replaced. One that was filled meanwhile is not.
                os.rename(self._new, self._path)
        finally:
            shutil.rmtree(self._new, ignore_errors=True)


def _named(directory: str | os.PathLike[str] | None) -> Path:
    path = default_directory() if directory is None else Path(os.fspath(directory))
    if path is None:
        raise ValueError(f"{VARIABLE} is set to nothing; name the directory of the keys")
    return Path(os.path.abspath(path))  # the working directory may change


def _write(path: Path, key: bytes) -> None:
    mode = 0o600 if path.suffix == ".secret" else 0o644
    made = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode)
    with open(made, "wb") as file:
        os.fchmod(made, mode)  # whatever the umask
        file.write(key + b"\n")


def _check_directory(path: Path) -> None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no directory {path} with keys: make them with `zmqexecutor keygen`, "
            "or copy them from the master's host"
        ) from None
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{path} is not a directory of keys")
    _check_owner(path, status, "700")


def _check_owner(path: Path, status: os.stat_result, mode: str) -> None:
    if status.st_uid != os.geteuid():
        raise PermissionError(
            f"{path} belongs to another user (uid {status.st_uid}, not {os.geteuid()}); "
            "copy the keys as the user who needs them"
        )
    if status.st_mode & 0o077:
        raise PermissionError(
            f"{path} is open to other users (mode {stat.S_IMODE(status.st_mode):04o}); "
            f"run: chmod {mode} {path}"
        )


def _read(path: Path, *, secret: bool = False) -> bytes | None:
    """The key in a file; None if there is no such file."""
    try:
        with open(path, "rb") as file:
            if secret:
                _check_owner(path, os.fstat(file.fileno()), "600")
            lines = file.read(10_000).split(b"\n")
    except FileNotFoundError:
        return None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith(b"#")]
    if len(keys) != 1 or not _is_key(keys[0]):
        # Without the contents: they may be a secret with a typing error.
        raise ValueError(f"{path} is not a key: expected one line of 40 characters (Z85)")
    return keys[0]


def _is_key(text: bytes) -> bool:
    if len(text) != 40:
        return False
    try:
        # What is beyond 32 bits is no encoding of anything.
        return z85.encode(z85.decode(text)) == text
    except Exception:  # of several kinds
        return False
