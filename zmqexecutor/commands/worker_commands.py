"""The commands `worker` and `workers`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from ..system.interpreter import python_command
from ..system.memory import keep_freed_memory
from ..wire.protocol import DEFAULT_SERVICE
from ..worker_errors import RegistrationError
from . import references
from .exits import CommandError, Exit

if TYPE_CHECKING:
    from ..worker.worker import Worker

__all__ = ["worker", "workers"]

# ------------------------------------------------------------------ one worker


def worker(arguments: Namespace) -> int:
    """Run one worker until it is asked to end."""
    _make_absolute(arguments)
    if arguments.calls:
        return _serve_calls(arguments)
    _go_to(arguments.directory)
    guard = _UserCode()
    made = _make_worker(arguments, guard)
    if arguments.check:
        return 0
    _end_gently(made.stop, signal.SIGINT, signal.SIGTERM)
    keep_freed_memory()
    try:
        made.run()
    except Exception as error:
        if error is guard.error:
            print(references.users_traceback(error), end="", file=sys.stderr)
            raise CommandError(f"{guard.what} raised {type(error).__name__}", Exit.FAILED) from None
        if isinstance(error, RegistrationError):
            raise CommandError(error, Exit.NO_MASTER) from None
        if isinstance(error, OSError):
            raise CommandError(error, Exit.FAILED) from None
        raise
    return 0


def _make_absolute(arguments: Namespace) -> None:
    """Have folders mean the same after a change of the working directory."""
    for option in ("directory", "keys"):
        if (path := getattr(arguments, option)) is not None:
            setattr(arguments, option, os.path.abspath(path))


def _go_to(directory: str | None) -> None:
    """Look for modules in the current directory first, as `python -m` does."""
    if directory is not None:
        try:
            os.chdir(directory)
        except OSError as error:
            raise CommandError(f"--directory {directory!r}: {error.strerror}", Exit.USAGE) from None
    if directory is not None or not getattr(sys.flags, "safe_path", False):
        try:
            references.add_to_path(os.getcwd())
        except FileNotFoundError:
            raise CommandError("the current directory has been removed", Exit.USAGE) from None


def _make_worker(arguments: Namespace, guard: _UserCode) -> Worker:
    if len(arguments.service) > 1:
        raise CommandError(
            "several services: name that of each target, NAME=MODULE:FUNCTION", Exit.USAGE
        )
    targets = _load_targets(arguments.targets, *arguments.service)
    initializer = _load(arguments.initializer, "--initializer")
    teardown = _load(arguments.teardown, "--teardown")
    from ..worker.worker import Worker

    try:
        return Worker(
            arguments.endpoint,
            arguments.workpoint,
            targets=targets,
            initializer=initializer and guard.watch(initializer, "the initializer"),
            teardown=teardown and guard.watch(teardown, "the teardown"),
            allow_pickle=arguments.allow_pickle,
            patience=arguments.patience,
            keys=arguments.keys,
            allow_plaintext_tcp_from_anyone=arguments.allow_plaintext_tcp_from_anyone,
        )
    except (TypeError, ValueError) as error:
        raise CommandError(error, Exit.USAGE) from None
    except OSError as error:  # of keys
        raise CommandError(error, Exit.FAILED) from None


def _load_targets(written: list[str], service: str = "") -> dict[str, Any]:
    if not written:
        raise CommandError("name a target, MODULE:FUNCTION, or give --calls", Exit.USAGE)
    targets: dict[str, Any] = {}
    for text in written:
        name, named, reference = text.rpartition("=")
        if named and service:
            raise CommandError(f"{text!r} names a service, and so does --service", Exit.USAGE)
        if not named and len(written) > 1:
            raise CommandError(
                f"several targets: name the service of {text!r} (NAME={text})", Exit.USAGE
            )
        name = name if named else service or DEFAULT_SERVICE
        if name in targets:
            raise CommandError(f"there are two targets for the service {name!r}", Exit.USAGE)
        targets[name] = _load(reference, "target")
    return targets


def _load(reference: str | None, what: str) -> Any:
    """The function that is referred to; the traceback of its module, if that is broken."""
    if reference is None:
        return None
    try:
        found = references.load(reference)
    except references.ReferenceNameError as error:
        raise CommandError(f"{what} {error}", Exit.USAGE) from None
    except references.UserCodeError as error:
        print(error.traceback, end="", file=sys.stderr)
        raise CommandError(error, Exit.FAILED) from None
    if not callable(found):
        raise CommandError(f"{what} {reference!r} is not callable: {found!r}", Exit.USAGE)
    return found


class _UserCode:
    """Tells what functions of the user's raise from what is our own."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.what = ""

    def watch(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            try:
                return function(*args)
            except BaseException as error:
                self.error, self.what = error, what
                raise

        return watched


_ENDING: Final = b"zmqexecutor worker: ending after the job at hand; Ctrl-C again interrupts it\n"


def _end_gently(stop: Callable[[], object], *signals: signal.Signals) -> None:
    """Have these signals let the job at hand finish; a second Ctrl-C interrupts it.

    What the user's modules have decided about a signal stays as it is.
    """
    asked = False  # no lock: a handler may interrupt itself

    def on_signal(signum: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        if signum == signal.SIGINT:
            os.write(2, _ENDING)  # `print` could be what was interrupted
        stop()

    for signum in signals:
        if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(signum, on_signal)


def _serve_calls(arguments: Namespace) -> int:
    """Be a worker of an executor, and of the next one at the same endpoint."""
    for option in ("targets", "initializer", "teardown", "workpoint", "allow_pickle"):
        if getattr(arguments, option):
            name = "a target" if option == "targets" else f"--{option.replace('_', '-')}"
            raise CommandError(f"--calls and {name} contradict each other", Exit.USAGE)
    from ..payload import setups
    from ..wire import security
    from ..worker import calls

    try:
        security.Access.decide(
            arguments.endpoint,
            "worker",
            arguments.keys,
            allow_plaintext_tcp_from_anyone=arguments.allow_plaintext_tcp_from_anyone,
            allow_plaintext_loopback=False,
        )
        for service in arguments.service:
            setups.call_service(service)
    except (TypeError, ValueError) as error:
        raise CommandError(error, Exit.USAGE) from None
    except OSError as error:  # of keys
        raise CommandError(error, Exit.FAILED) from None
    if arguments.check:
        return 0
    start = os.getcwd()
    environment = dict(os.environ)
    _go_to(arguments.directory)
    # The worker has its own handler of SIGTERM.
    _end_gently(lambda: signal.raise_signal(signal.SIGTERM), signal.SIGINT)
    try:
        lost = calls.serve(
            arguments.endpoint,
            arguments.service,
            patience=arguments.patience,
            keys=arguments.keys,
            allow_plaintext_tcp_from_anyone=arguments.allow_plaintext_tcp_from_anyone,
        )
    except calls.InitializerError as error:
        raise CommandError(error, Exit.FAILED) from None
    except RegistrationError as error:
        raise CommandError(error, Exit.NO_MASTER) from None
    if lost:
        # Tasks have left their modules and globals here: the next executor gets a fresh
        # process, with the same id.
        sys.stdout.flush()
        sys.stderr.flush()
        command = python_command("-m", "zmqexecutor", *_worker_arguments(arguments))
        os.chdir(start)
        os.execve(command[0], command, environment)  # noqa: S606  (no shell is meant)
    return 0


# -------------------------------------------------------------------- a group


def workers(arguments: Namespace) -> int:
    """Keep a group of workers alive, or print how circusd can do that."""
    from ..supervision.launch import with_number  # of no use to a worker

    _make_absolute(arguments)
    point = arguments.workpoint
    if point and arguments.numprocesses > 1 and with_number(point, 1) == with_number(point, 2):
        raise CommandError(
            f"--workpoint {point!r}: each worker needs one of its own; put $WID into it, "
            "and single quotes around it",
            Exit.USAGE,
        )
    command = python_command("-m", "zmqexecutor", *_worker_arguments(arguments))
    # A mistake is told once, not by each worker again and again.
    trial = [with_number(part, 1) for part in command]
    if code := subprocess.run([*trial, "--check"], check=False).returncode:
        return code if code > 0 else Exit.FAILED
    if arguments.circus_ini:
        print(_circus_ini(arguments, command), end="")
        return 0
    return _supervise(arguments, command)


def _worker_arguments(arguments: Namespace) -> list[str]:
    """What `python -m zmqexecutor` must be told to be such a worker."""
    told = ["worker", *arguments.targets, f"--patience={arguments.patience:g}"]
    told += [
        f"--{option}={value}"
        for option in ("endpoint", "workpoint", "initializer", "teardown", "directory", "keys")
        if (value := getattr(arguments, option)) is not None
    ]
    told += [f"--service={name}" for name in arguments.service]
    told += [
        f"--{flag}"
        for flag in ("calls", "allow-pickle", "allow-plaintext-tcp-from-anyone")
        if getattr(arguments, flag.replace("-", "_"))
    ]
    return told


def _circus_ini(arguments: Namespace, command: list[str]) -> str:
    from .circus_ini import circus_ini

    module = "calls" if arguments.calls else arguments.targets[0].partition(":")[0]
    environment = {}
    if entries := [os.path.abspath(e) for e in os.environ.get("PYTHONPATH", "").split(":") if e]:
        environment["PYTHONPATH"] = ":".join(entries)
    if keys := os.environ.get("ZMQEXECUTOR_KEYS"):
        environment["ZMQEXECUTOR_KEYS"] = os.path.abspath(keys)
    try:
        return circus_ini(
            module.rpartition("=")[2],
            command,
            arguments.numprocesses,
            working_dir=os.getcwd(),
            graceful_timeout=arguments.graceful_timeout,
            environment=environment,
        )
    except ValueError as error:
        raise CommandError(error, Exit.USAGE) from None


def _supervise(arguments: Namespace, command: list[str]) -> int:
    from ..supervision.workers import Workers

    group = Workers(command, arguments.numprocesses, graceful_timeout=arguments.graceful_timeout)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        group.run()
    except KeyboardInterrupt:
        return 0
    except (OSError, RuntimeError) as error:
        raise CommandError(error, Exit.FAILED) from None
    finally:
        group.stop()  # a second Ctrl-C kills them
    return 0
