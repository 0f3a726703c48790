"""The command line: what can be written.

What a command does is imported after the line has been parsed, so that a worker loads
nothing of the master's.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Final

import zmqexecutor

from ..wire.liveness import CLIENT_PATIENCE, WORKER_PATIENCE
from .exits import EXIT_CODES, CommandError, Exit

__all__ = ["main"]

PROGRAM: Final = "zmqexecutor"

WORKER_EXAMPLES: Final = """\
A target is a function of a module: called with [JOB_ID, DATA] for each job, it returns
str or bytes. The module is looked for in the current directory first, then on
PYTHONPATH and among what is installed.

examples:
  zmqexecutor worker shapes:square --endpoint ipc://$HOME/master.ipc
  zmqexecutor worker square=shapes:square cube=shapes:cube --endpoint tcp://127.0.0.1:5570
  zmqexecutor worker model:predict --initializer model:load --endpoint ipc://$HOME/master.ipc
  zmqexecutor worker --calls --endpoint tcp://127.0.0.1:5570

SIGTERM and Ctrl-C let the job at hand finish; a second Ctrl-C does not. A worker that
loses its master looks for the next one for --patience seconds.

"""
WORKERS_EXAMPLES: Final = """\
Circus keeps the workers alive: one that ends is replaced. Options and targets are those of
`zmqexecutor worker`. In the workpoint, $WID becomes a number that is the worker's own: put
it in single quotes, so that it gets past the shell.

examples:
  zmqexecutor workers shapes:square -n 5 --endpoint ipc://$HOME/master.ipc
  zmqexecutor workers shapes:square -n 3 --endpoint ipc://$HOME/master.ipc \\
      --workpoint 'ipc:///run/user/1000/square-$WID.ipc'
  zmqexecutor workers --calls -n 8 --endpoint tcp://127.0.0.1:5570
  zmqexecutor workers shapes:square --endpoint ipc://$HOME/master.ipc --circus-ini >square.ini
  circusd square.ini

"""
STATUS_EXAMPLES: Final = """\
The rate is that of the time between two reports; the first report shows the average since
the master's start.

examples:
  zmqexecutor status --endpoint ipc://$HOME/master.ipc
  zmqexecutor status --endpoint ipc://$HOME/master.ipc --watch
  zmqexecutor status --endpoint ipc://$HOME/master.ipc --watch 10 --json >>status.jsonl

"""
CALL_EXAMPLES: Final = """\
Text and JSON are written to standard output with a line end, bytes as they are.

examples:
  zmqexecutor call --endpoint ipc://$HOME/master.ipc 12
  zmqexecutor call --endpoint ipc://$HOME/master.ipc --service total --codec json '[1, 2.5]'
  zmqexecutor call --endpoint ipc://$HOME/master.ipc --codec bytes - <photo.jpg >small.jpg

"""
KEYGEN_EXAMPLES: Final = """\
DIRECTORY is by default $ZMQEXECUTOR_KEYS, else ~/.config/zmqexecutor/keys, where all commands
look for keys when the endpoint is on tcp://. What is there is never overwritten.

examples:
  zmqexecutor keygen
  zmqexecutor keygen --worker alpha
  zmqexecutor keygen /srv/pool/keys

"""

_HOMES: Final = {
    "worker": ".worker_commands",
    "workers": ".worker_commands",
    "status": ".client_commands",
    "call": ".client_commands",
    "keygen": ".keygen_command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out a command line, by default this process's; return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        commands = importlib.import_module(_HOMES[arguments.command], __package__)
        code = int(getattr(commands, arguments.command)(arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # Whoever read it has seen enough. What is left must not be flushed at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return Exit.FAILED
    except CommandError as error:
        print(f"{PROGRAM} {arguments.command}: {error}", file=sys.stderr)
        return error.code
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Workers for a master (ZmqExecutor or JobRunner), and a look at it.",
        epilog=f"`{PROGRAM} COMMAND --help` has the options, and examples.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"{PROGRAM} {zmqexecutor.__version__}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)

    def add(name: str, summary: str, examples: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=examples + EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    _add_worker(add("worker", "run one worker", WORKER_EXAMPLES))
    _add_workers(add("workers", "run a supervised group of workers", WORKERS_EXAMPLES))
    _add_status(add("status", "ask a master for its workers and its queue", STATUS_EXAMPLES))
    _add_call(add("call", "have a job done, and print its result", CALL_EXAMPLES))
    _add_keygen(add("keygen", "make keys, for a master and its workers on tcp://", KEYGEN_EXAMPLES))
    return parser


def _add_worker(parser: argparse.ArgumentParser) -> None:
    _add_worker_options(parser)
    parser.add_argument(
        "--check",
        action="store_true",
        help="import what is named, check the options, and end without connecting",
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    _add_worker_options(parser)
    parser.add_argument(
        "-n",
        "--numprocesses",
        metavar="N",
        type=_whole,
        default=5,
        help="how many workers to keep alive (default: %(default)s)",
    )
    parser.add_argument(
        "--graceful-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=30.0,
        help="how long the jobs at hand may take at the end, before the workers are killed "
        "(default: %(default)g)",
    )
    parser.add_argument(
        "--circus-ini",
        action="store_true",
        help="print the file with which circusd runs the same group, and end",
    )


def _add_worker_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "targets",
        metavar="[SERVICE=]MODULE:FUNCTION",
        nargs="*",
        help="what does the jobs; several, if each is named by its service",
    )
    parser.add_argument(
        "--calls",
        action="store_true",
        help="be a worker of a ZmqExecutor, and make its calls, instead of a target",
    )
    _add_endpoint(parser, "where the master listens: ipc://PATH or tcp://HOST:PORT")
    parser.add_argument(
        "--workpoint",
        metavar="ADDRESS",
        help="where the worker listens for its jobs (default: it connects to the master)",
    )
    parser.add_argument(
        "--service",
        metavar="NAME",
        action="append",
        default=[],
        help="the service of a single target; with --calls, what the worker is special for, "
        "which may be given several times",
    )
    parser.add_argument(
        "--initializer",
        metavar="MODULE:FUNCTION",
        help="called once, before the first job; what it returns is the target's second argument",
    )
    parser.add_argument(
        "--teardown",
        metavar="MODULE:FUNCTION",
        help="called at the end with what the initializer returned",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="take jobs that are pickled; who can send such a job can run any code here",
    )
    parser.add_argument(
        "--directory",
        metavar="DIRECTORY",
        help="run there, and look for modules there first",
    )
    parser.add_argument(
        "--patience",
        metavar="SECONDS",
        type=_positive,
        default=WORKER_PATIENCE,
        help="how long to look for a master (default: %(default)g)",
    )


def _add_status(parser: argparse.ArgumentParser) -> None:
    _add_endpoint(parser, "where the master listens")
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        nargs="?",
        type=_positive,
        const=1.0,
        help="again and again, after so many seconds (default: %(const)g), until Ctrl-C",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object, in one line, for each report"
    )
    _add_connect_patience(parser)


def _add_call(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="the job; - reads it from standard input")
    _add_endpoint(parser, "where the master listens")
    parser.add_argument(
        "--service", metavar="NAME", default="default", help="what is asked for (default: default)"
    )
    parser.add_argument(
        "--codec",
        choices=["text", "bytes", "json"],
        default="text",
        help="what DATA is (default: %(default)s)",
    )
    parser.add_argument(
        "--id", metavar="NAME", help="a name for the job, for messages (default: some number)"
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_positive,
        help="how long to wait for the result (default: for as long as it takes)",
    )
    _add_connect_patience(parser)


def _add_keygen(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", metavar="DIRECTORY", nargs="?", help="made for the keys of a master"
    )
    parser.add_argument(
        "--worker",
        metavar="NAME",
        help="make the keys of another worker, or client, that the master there will admit",
    )


def _add_endpoint(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--endpoint", metavar="ADDRESS", required=True, help=text)
    parser.add_argument(
        "--keys",
        metavar="DIRECTORY",
        help="where the keys for tcp:// are (default: $ZMQEXECUTOR_KEYS, else "
        "~/.config/zmqexecutor/keys, if it is there)",
    )
    parser.add_argument(
        "--allow-plaintext-tcp-from-anyone",
        action="store_true",
        help="use tcp:// without keys at any address: whoever is on the way can pose as the master",
    )


def _add_connect_patience(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--patience",
        metavar="SECONDS",
        type=_positive,
        default=CLIENT_PATIENCE,
        help="how long to look for the master (default: %(default)g)",
    )


def _number(check: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and check(number)):
            raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")
        return number

    return parse


_positive = _number(lambda number: 0 < number <= 1e6, "seconds, more than 0 and at most 1000000")
_seconds = _number(lambda number: 0 <= number <= 1e6, "seconds, 0 to 1000000")


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a number, 0 or more, not {text!r}")
    return int(text)
