"""Permitted addresses, and the only factory of sockets.

Pickles travel on these sockets, so whoever can write to one can run code as the
user. Local sockets live in directories that only the user can enter (`directories`);
TCP is protected by keys, or confined to the loopback interface.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import socket as stdlib_socket
import stat
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import msgspec
import zmq

from ..system.directories import IPC_PATH_LIMIT
from .liveness import LOST_AFTER

if TYPE_CHECKING:
    from ..keys import Keys

__all__ = [
    "Access",
    "bind",
    "check_address",
    "close",
    "has_message",
    "reachable",
    "socket",
]

BACKLOG = 1024
"""Connections that may wait to be accepted: many workers may start at once."""
INCOMING = 1000
"""Messages of one peer that wait to be read by a master."""
UNBIND_WAIT = 1000
"""Milliseconds within which ZeroMQ closes a port."""

Tcp: TypeAlias = Literal["nowhere", "loopback", "anywhere"]

_HOST: Final = re.compile(r"[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?\]")
_ANY: Final = ("0.0.0.0", "[::]")  # noqa: S104  (no address to bind: what is compared with)
_POLLIN: Final = int(zmq.POLLIN)  # `&` of pyzmq's enum takes longer than the call


class Access(msgspec.Struct, frozen=True):
    """Who may connect to the sockets of a master or worker, as its user has decided.

    Attributes:
        keys: who has the right keys, on any host; None: there are no keys.
        anyone: whoever can reach the address, on any host, in plain text.
        loopback: whoever is on this host, in plain text on the loopback interface.
    """

    keys: Keys | None = None
    anyone: bool = False
    loopback: bool = True

    @classmethod
    def decide(
        cls,
        endpoint: str,
        role: Literal["master", "worker"],
        keys: Keys | str | os.PathLike[str] | None,
        *,
        allow_plaintext_tcp_from_anyone: bool = False,
        allow_plaintext_loopback: bool = True,
    ) -> Access:
        """Check an endpoint and what the user says about keys.

        Args:
            endpoint: where the master listens. Only for tcp:// keys are looked for.
            role: whose side this is.
            keys: keys, or their directory, or None for those in the default directory,
                if there are any.
            allow_plaintext_tcp_from_anyone: do without keys, on any host.
            allow_plaintext_loopback: do without keys on the loopback interface, if
                there are none.

        Raises:
            TypeError: the endpoint or the keys have the wrong type.
            ValueError: the endpoint cannot be used, or not without keys; keys are
                malformed, or were given and refused at the same time.
            OSError: keys are missing, or open to other users.
        """
        check_address(endpoint, "endpoint", tcp="anywhere")
        if not endpoint.startswith("tcp://"):
            return cls(loopback=allow_plaintext_loopback)
        if allow_plaintext_tcp_from_anyone:
            if keys is not None:
                raise ValueError(
                    "keys= and allow_plaintext_tcp_from_anyone=True contradict each other"
                )
            return cls(anyone=True)
        from ..keys import Keys  # of no use to the executor's workers

        if keys is None:
            keys = Keys.load_default()
        elif not isinstance(keys, Keys):
            keys = Keys.load(keys)
        if keys is None:
            access = cls(loopback=allow_plaintext_loopback)
            access.check(endpoint, "endpoint")
            return access
        return cls(keys.for_master() if role == "master" else keys.for_worker())

    def check(self, address: str, what: str) -> str:
        """Return the address if it may be used, as `check_address` does.

        Raises:
            TypeError: it is not text.
            ValueError: it cannot be used, or not without keys.
        """
        tcp: Tcp = "loopback" if self.loopback else "nowhere"
        if self.keys is not None or self.anyone:
            tcp = "anywhere"
        return check_address(address, what, tcp=tcp)

    def check_workpoint(self, address: str) -> str:
        """Return the address at which a worker gets its jobs, if it may be used.

        Raises:
            TypeError: it is not text.
            ValueError: it cannot be used, or not without keys.
        """
        self.check(address, "workpoint")
        if address.startswith("tcp://") and _host(address) in _ANY:
            raise ValueError(
                f"workpoint {address!r}: name the address at which the master reaches this "
                "worker, or leave the workpoint out"
            )
        return address


def check_address(address: str, what: str, *, tcp: Tcp = "loopback") -> str:
    """Return the address if it may be used.

    Args:
        address: where to listen, or to connect to.
        what: what to call it in messages.
        tcp: which addresses of TCP may be used.

    Raises:
        TypeError: it is not text.
        ValueError: it is malformed, too long, or TCP that may not be used.
    """
    if not isinstance(address, str):
        raise TypeError(f"{what} must be text such as 'ipc:///run/user/1000/master.ipc'")
    scheme, _, rest = address.partition("://")
    if scheme == "ipc" and rest:
        if rest[0] in "@*":
            raise ValueError(f"{what} {address!r}: expected the path of a file after ipc://")
        if len(os.fsencode(rest)) > IPC_PATH_LIMIT:
            raise ValueError(
                f"{what} {address!r}: the path has more than {IPC_PATH_LIMIT} bytes, "
                "the system's limit for local sockets; use a shorter directory"
            )
        return address
    if scheme == "tcp":
        host, _, port = rest.rpartition(":")
        if not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
            raise ValueError(f"{what} {address!r}: expected tcp://host:port with a port number")
        if host == "*":
            raise ValueError(
                f"{what} {address!r} would be open to other hosts on all interfaces; "
                f"if that is meant, write tcp://0.0.0.0:{port}"
            )
        if not _HOST.fullmatch(host):
            raise ValueError(f"{what} {address!r}: expected tcp://host:port with one host")
        if tcp == "nowhere" or (tcp == "loopback" and not _is_loopback(host.strip("[]"))):
            raise ValueError(
                f"{what} {address!r} would be open to other "
                + ("hosts" if tcp == "loopback" else "users and hosts")
                + " without authentication: make keys with `zmqexecutor keygen` and pass keys=; "
                "or, if whoever can reach the address may read, forge and run everything, "
                "pass allow_plaintext_tcp_from_anyone=True"
            )
        return address
    raise ValueError(f"{what} {address!r}: expected ipc://PATH or tcp://HOST:PORT")


def reachable(address: str, endpoint: str) -> str:
    """Where a worker finds what a master calls by `address`, for all its interfaces.

    That is at the host where it has found the endpoint.
    """
    if not address.startswith("tcp://") or _host(address) not in _ANY:
        return address
    if not endpoint.startswith("tcp://"):
        return address
    return f"tcp://{_host(endpoint)}:{address.rpartition(':')[2]}"


def _host(address: str) -> str:
    return address.removeprefix("tcp://").rpartition(":")[0]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    import ipaddress  # of no use to the executor's workers

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(made: zmq.Socket[bytes], address: str) -> str:
    """Bind a socket so that only this user can connect, whatever the umask is.

    Returns:
        The address to connect to; it has the port that `tcp://HOST:*` got.

    Raises:
        OSError: the address is taken, or cannot be used.
    """
    path = address.removeprefix("ipc://") if address.startswith("ipc://") else None
    if path is not None and _has_listener(path):
        # ZeroMQ would take the place of whoever listens there.
        raise OSError(errno.EADDRINUSE, f"{address} is in use by another process")
    if path is not None and os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OSError(errno.EEXIST, f"cannot bind {address}: there is a file that is no socket")
    if "[" not in address:
        made.ipv6 = False  # else the address below would be one that IPv4 sockets cannot use
    try:
        if path is None:
            made.bind(address)
            return made.getsockopt_string(zmq.LAST_ENDPOINT)
        _bind_path(made, address, path)
    except (OSError, zmq.ZMQError) as error:
        raise OSError(error.errno, f"cannot bind {address}: {error.strerror}") from None
    return address


def _bind_path(made: zmq.Socket[bytes], address: str, path: str) -> None:
    """Bind to the path of a file that nobody else can connect to at any time.

    ZeroMQ would listen before the file's mode could be changed; so we do it, and
    give it the listening descriptor.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # nobody listens there
    with stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM) as listener:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        made.setsockopt(zmq.USE_FD, listener.fileno())
        try:
            made.bind(address)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            made.setsockopt(zmq.USE_FD, -1)  # not for what is bound or connected later
        listener.detach()  # it is ZeroMQ's now


def close(bound: zmq.Socket[bytes], address: str | None) -> None:
    """Close a socket, so that nobody comes to the address that it was bound to any more."""
    if address is not None and address.startswith("ipc://"):
        # Before the close, while the file is ours for certain; libzmq leaves it there.
        with contextlib.suppress(OSError):
            os.unlink(address.removeprefix("ipc://"))
    elif address is not None:
        _unbind(bound, address)
    bound.close()


def _unbind(bound: zmq.Socket[bytes], address: str) -> None:
    """Have a socket stop to listen; `close` alone leaves that to ZeroMQ's threads, for later."""
    try:
        monitor = bound.get_monitor_socket(zmq.Event.CLOSED)
    except zmq.ZMQError:
        return  # no descriptors are left to wait with
    try:
        bound.unbind(address)
        monitor.poll(UNBIND_WAIT)
    except zmq.ZMQError:
        pass  # it was not bound
    finally:
        bound.disable_monitor()
        monitor.close()


def _has_listener(path: str) -> bool:
    with stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def socket(
    context: zmq.Context[zmq.Socket[bytes]],
    kind: int,
    address: str,
    keys: Keys | None = None,
    *,
    lost_after: float = LOST_AFTER,
    bulk: bool = False,
) -> zmq.Socket[bytes]:
    """Make a socket with the options that all our sockets share.

    Args:
        context: a context of our own, never the process-wide one.
        kind: `zmq.ROUTER` or `zmq.DEALER`.
        address: what it will be bound or connected to.
        keys: what protects it, if it is not for this user of this host only.
        lost_after: seconds without a sign of life after which the master takes a worker
            on another host for lost.
        bulk: whether messages may be so large that one takes longer than that.
    """
    made = context.socket(kind)
    made.linger = 0
    # The scheduler bounds what is in flight; ZeroMQ must not drop any of it.
    made.sndhwm = 0
    made.rcvhwm = 0
    made.setsockopt(zmq.IPV6, 1)
    remote = not address.startswith("ipc://")
    # On this machine the kernel tells of a lost connection, and a process that is stopped
    # for a while (Ctrl-Z, a debugger) is not dead.
    if remote and bulk:
        _have_kernel_watch(made, lost_after)
    elif remote and kind == zmq.ROUTER:
        # The I/O threads beat and answer, even while an interpreter is busy. The worker,
        # whose socket has no heartbeat of its own, gives up when it has not felt the
        # master's for as long as that says.
        made.setsockopt(zmq.HEARTBEAT_IVL, int(lost_after * 150))
        made.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(lost_after * 550))
        made.setsockopt(zmq.HEARTBEAT_TTL, int(lost_after * 700))
    if remote and kind == zmq.DEALER:
        made.setsockopt(zmq.CONNECT_TIMEOUT, int(lost_after * 500))
    if kind == zmq.ROUTER:
        # What a peer sends without end must wait with the peer; nothing is dropped.
        made.rcvhwm = INCOMING
        made.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an error, not silence, if a peer is gone
        # A peer takes its place back before its lost connection is known to be so;
        # where the kernel tells at once, nobody may take the place of another.
        made.setsockopt(zmq.ROUTER_HANDOVER, remote)
    else:
        made.setsockopt(zmq.RECONNECT_IVL, 50)
        made.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    if keys is not None:
        keys.protect(made)
    return made


def _have_kernel_watch(made: zmq.Socket[bytes], lost_after: float) -> None:
    """Have TCP itself find out that a connection is dead.

    ZeroMQ's heartbeats wait their turn behind the message that is being sent, and a large
    one on a slow link would pass for silence. TCP counts what arrives of it.
    """
    made.setsockopt(zmq.TCP_MAXRT, int(lost_after * 1000))  # what was sent, and not received
    made.setsockopt(zmq.TCP_KEEPALIVE, 1)  # when nothing is sent; in whole seconds
    made.setsockopt(zmq.TCP_KEEPALIVE_IDLE, math.ceil(lost_after / 2))
    made.setsockopt(zmq.TCP_KEEPALIVE_INTVL, math.ceil(lost_after / 6))
    made.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)


def has_message(made: zmq.Socket[bytes]) -> bool:
    """Whether a message can be received at once."""
    return bool(int(made.getsockopt(zmq.EVENTS)) & _POLLIN)
