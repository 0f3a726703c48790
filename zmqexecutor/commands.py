"""What the commands of the command line do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from argparse import Namespace
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from . import references
from .interpreter import python_command
from .protocol import DEFAULT_SERVICE
from .worker_errors import RegistrationError

if TYPE_CHECKING:
    from .client import Client
    from .worker import Worker

__all__ = ["Problem", "call", "status", "worker", "workers"]

FAILED: Final = 1
USAGE: Final = 2
NO_MASTER: Final = 3
NO_WORKER: Final = 4
TIMEOUT: Final = 5
WORKER_LOST: Final = 6

_TOP_LEFT_AND_CLEAR: Final = "\x1b[H\x1b[J"


class Problem(Exception):
    """Ends the command with a message and this exit code."""

    def __init__(self, message: object, code: int) -> None:
        super().__init__(str(message))
        self.code = code


# ------------------------------------------------------------------ one worker


def worker(arguments: Namespace) -> int:
    """Run one worker until it is asked to end."""
    _go_to(arguments.directory)
    if arguments.calls:
        return _serve_calls(arguments)
    guard = _UserCode()
    made = _make_worker(arguments, guard)
    if arguments.check:
        return 0
    _end_gently(made.stop, signal.SIGINT, signal.SIGTERM)
    try:
        made.run()
    except Exception as error:
        if error is guard.error:
            print(references.users_traceback(error), end="", file=sys.stderr)
            raise Problem(f"{guard.what} raised {type(error).__name__}", FAILED) from None
        if isinstance(error, RegistrationError):
            raise Problem(error, NO_MASTER) from None
        if isinstance(error, OSError):
            raise Problem(error, FAILED) from None
        raise
    return 0


def _go_to(directory: str | None) -> None:
    """Look for modules in the current directory first, as `python -m` does."""
    if directory is not None:
        try:
            os.chdir(directory)
        except OSError as error:
            raise Problem(f"--directory {directory!r}: {error.strerror}", USAGE) from None
    if directory is not None or not getattr(sys.flags, "safe_path", False):
        try:
            references.add_to_path(os.getcwd())
        except FileNotFoundError:
            raise Problem("the current directory has been removed", USAGE) from None


def _make_worker(arguments: Namespace, guard: _UserCode) -> Worker:
    if len(arguments.service) > 1:
        raise Problem("several services: name each target's, SERVICE=MODULE:FUNCTION", USAGE)
    targets = _load_targets(arguments.targets, *arguments.service)
    initializer = _load(arguments.initializer, "--initializer")
    teardown = _load(arguments.teardown, "--teardown")
    from .worker import Worker

    try:
        return Worker(
            arguments.endpoint,
            arguments.workpoint,
            targets=targets,
            initializer=initializer and guard.watch(initializer, "the initializer"),
            teardown=teardown and guard.watch(teardown, "the teardown"),
            allow_pickle=arguments.allow_pickle,
            patience=arguments.patience,
        )
    except (TypeError, ValueError) as error:
        raise Problem(error, USAGE) from None


def _load_targets(written: list[str], service: str = "") -> dict[str, Any]:
    if not written:
        raise Problem("name a target, MODULE:FUNCTION, or give --calls", USAGE)
    targets: dict[str, Any] = {}
    for text in written:
        name, named, reference = text.rpartition("=")
        if named and service:
            raise Problem(f"{text!r} names a service, and so does --service", USAGE)
        if not named and len(written) > 1:
            raise Problem(f"several targets: name the service of {text!r} (NAME={text})", USAGE)
        name = name if named else service or DEFAULT_SERVICE
        if name in targets:
            raise Problem(f"there are two targets for the service {name!r}", USAGE)
        targets[name] = _load(reference, "target")
    return targets


def _load(reference: str | None, what: str) -> Any:
    """The function that is referred to; the traceback of its module, if that is broken."""
    if reference is None:
        return None
    try:
        found = references.load(reference)
    except references.ReferenceProblem as error:
        raise Problem(f"{what} {error}", USAGE) from None
    except references.UserCodeError as error:
        assert error.__cause__ is not None
        print(references.users_traceback(error.__cause__), end="", file=sys.stderr)
        raise Problem(error, FAILED) from None
    if not callable(found):
        raise Problem(f"{what} {reference!r} is not callable: {found!r}", USAGE)
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


def _end_gently(stop: Callable[[], object], *signals: signal.Signals) -> None:
    """Have these signals let the job at hand finish; a second Ctrl-C interrupts it.

    What the user's modules have decided about a signal stays as it is.
    """
    asked = threading.Event()

    def on_signal(signum: int, _frame: FrameType | None) -> None:
        if asked.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()
        stop()

    for signum in signals:
        if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(signum, on_signal)


def _serve_calls(arguments: Namespace) -> int:
    """Be a worker of an executor, and of the next one at the same endpoint."""
    for option in ("targets", "initializer", "teardown", "workpoint", "allow_pickle"):
        if getattr(arguments, option):
            name = "a target" if option == "targets" else f"--{option.replace('_', '-')}"
            raise Problem(f"--calls and {name} contradict each other", USAGE)
    from . import calls, security

    try:
        security.check_address(arguments.endpoint, "endpoint")
        for service in arguments.service:
            calls.call_service(service)
    except (TypeError, ValueError) as error:
        raise Problem(error, USAGE) from None
    if arguments.check:
        return 0
    # The worker has its own handler of SIGTERM.
    _end_gently(lambda: signal.raise_signal(signal.SIGTERM), signal.SIGINT)
    try:
        lost = calls.serve(arguments.endpoint, arguments.service, patience=arguments.patience)
    except calls.InitializerError as error:
        raise Problem(error, FAILED) from None
    except RegistrationError as error:
        raise Problem(error, NO_MASTER) from None
    if lost:
        # Tasks have left their modules and globals here: the next executor gets a fresh
        # process, with the same id.
        sys.stdout.flush()
        sys.stderr.flush()
        command = python_command("-m", "zmqexecutor", *_worker_arguments(arguments))
        os.execv(command[0], command)
    return 0


# -------------------------------------------------------------------- a group


def workers(arguments: Namespace) -> int:
    """Keep a group of workers alive, or print how circusd can do that."""
    point = arguments.workpoint
    if point and arguments.numprocesses > 1 and not _numbered(point):
        raise Problem(
            f"--workpoint {point!r}: each worker needs one of its own; put $WID into it, "
            "and single quotes around it",
            USAGE,
        )
    command = python_command("-m", "zmqexecutor", *_worker_arguments(arguments))
    # A mistake is told once, not by each worker again and again.
    trial = [part.replace("$(circus.wid)", "1").replace("$WID", "1") for part in command]
    if code := subprocess.run([*trial, "--check"], check=False).returncode:
        return code if code > 0 else FAILED
    if arguments.circus_ini:
        print(_circus_ini(arguments, command), end="")
        return 0
    return _supervise(arguments, command)


def _numbered(address: str) -> bool:
    return "$WID" in address or "$(circus.wid)" in address


def _worker_arguments(arguments: Namespace) -> list[str]:
    """What `python -m zmqexecutor` must be told to be such a worker."""
    told = ["worker", *arguments.targets]
    for option in ("endpoint", "workpoint", "initializer", "teardown", "patience"):
        if (value := getattr(arguments, option)) is not None:
            told.append(f"--{option}={value:g}" if option == "patience" else f"--{option}={value}")
    told += [f"--service={name}" for name in arguments.service]
    if arguments.directory is not None:
        told.append(f"--directory={os.path.abspath(arguments.directory)}")
    told += ["--calls"] if arguments.calls else []
    told += ["--allow-pickle"] if arguments.allow_pickle else []
    return told


def _circus_ini(arguments: Namespace, command: list[str]) -> str:
    from .circus_ini import circus_ini

    module = "calls" if arguments.calls else arguments.targets[0].partition(":")[0]
    path = os.environ.get("PYTHONPATH", "")
    absolute = os.pathsep.join(os.path.abspath(entry) for entry in path.split(os.pathsep) if entry)
    try:
        return circus_ini(
            module.rpartition("=")[2],
            command,
            arguments.numprocesses,
            working_dir=os.getcwd(),
            graceful_timeout=arguments.graceful_timeout,
            environment={"PYTHONPATH": absolute} if absolute else {},
        )
    except ValueError as error:
        raise Problem(error, USAGE) from None


def _supervise(arguments: Namespace, command: list[str]) -> int:
    from .workers import Workers

    group = Workers(
        command, arguments.numprocesses, graceful_timeout=arguments.graceful_timeout
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        group.run()
    except KeyboardInterrupt:
        return 0
    except (OSError, RuntimeError) as error:
        raise Problem(error, FAILED) from None
    finally:
        group.stop()  # a second Ctrl-C kills them
    return 0


# --------------------------------------------------------------------- clients


def status(arguments: Namespace) -> int:
    """Print what a master reports, once or again and again."""
    from .errors import NoMasterError, ProtocolError

    watching = arguments.watch is not None
    with _connect(arguments) as client:
        view = _View(arguments)
        try:
            view.show(client.status())
        except (NoMasterError, ProtocolError) as error:
            raise Problem(error, NO_MASTER) from None
        while watching:
            try:
                time.sleep(arguments.watch)
                view.show(client.status())
            except (NoMasterError, ProtocolError) as error:
                view.miss(error)
            except KeyboardInterrupt:
                break
    return 0


class _View:
    """Reports on standard output: a redrawn screen, lines, or JSON."""

    def __init__(self, arguments: Namespace) -> None:
        self._endpoint: str = arguments.endpoint
        self._json: bool = arguments.json
        self._watching = arguments.watch is not None
        self._redraws = self._watching and not self._json and sys.stdout.isatty()
        self._previous: Any = None

    def show(self, report: Any) -> None:
        from . import status

        previous, self._previous = self._previous, report
        if self._json:
            text = status.as_json(report, previous)
        elif self._redraws:
            height = shutil.get_terminal_size().lines - 1
            text = "\n".join(status.as_table(report, previous, self._endpoint, height))
            text = _TOP_LEFT_AND_CLEAR + text
        elif self._watching:
            text = f"{time.strftime('%H:%M:%S')}  {status.as_line(report, previous)}"
        else:
            text = "\n".join(status.as_table(report, previous, self._endpoint))
        print(text, flush=True)

    def miss(self, error: Exception) -> None:
        """There is no report; the next master will give some."""
        self._previous = None
        text = f"{time.strftime('%H:%M:%S')}  {error}"
        if self._redraws:
            print(_TOP_LEFT_AND_CLEAR + text, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def call(arguments: Namespace) -> int:
    """Have a job done, and write its result to standard output."""
    from . import errors

    codes: list[tuple[type[Exception], int]] = [
        (errors.NoMasterError, NO_MASTER),
        (errors.NoWorkerError, NO_WORKER),
        (errors.TaskTimeoutError, TIMEOUT),
        (errors.WorkerLostError, WORKER_LOST),
        (errors.ZmqExecutorError, FAILED),
        (ValueError, USAGE),
    ]
    data = _job_data(arguments)
    job_id = arguments.id if arguments.id is not None else uuid.uuid4().hex[:8]
    codec = "json" if arguments.codec == "json" else None
    with _connect(arguments) as client:
        try:
            result = client.call(
                job_id, data, arguments.timeout, service=arguments.service, codec=codec
            )
        except (errors.ZmqExecutorError, ValueError) as error:
            code = next(code for kind, code in codes if isinstance(error, kind))
            raise Problem(error, code) from None
    _print_result(result, codec)
    return 0


def _job_data(arguments: Namespace) -> Any:
    data: str = arguments.data
    raw = sys.stdin.buffer.read() if data == "-" else os.fsencode(data)
    try:
        if arguments.codec == "bytes":
            return raw
        text = raw.decode()
        if arguments.codec == "text":
            return text
        import msgspec

        return msgspec.json.decode(text)
    except ValueError as error:  # of both decoders
        raise Problem(f"DATA is not {arguments.codec}: {error}", USAGE) from None


def _print_result(result: Any, codec: str | None) -> None:
    if codec == "json":
        import msgspec

        result = msgspec.json.encode(result).decode()
    if isinstance(result, str):
        result = (result if result.endswith("\n") else result + "\n").encode()
    sys.stdout.buffer.write(result)
    sys.stdout.buffer.flush()


def _connect(arguments: Namespace) -> Client:
    from .client import Client

    try:
        return Client(arguments.endpoint, patience=arguments.patience)
    except ValueError as error:
        raise Problem(error, USAGE) from None
    except OSError as error:
        raise Problem(error, FAILED) from None
