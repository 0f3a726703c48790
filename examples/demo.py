"""Read, tokenise and measure every source file of this interpreter's standard library.

The same work is done three times and must give the same answer each time: by
`ZmqExecutor.submit` with `as_completed`, by `ZmqExecutor.map`, and by a plain
loop in this process. With --crash one task kills its worker on the way.

    python examples/demo.py [--workers N] [--limit FILES] [--crash] [--no-serial]
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import os
import signal
import sys
import sysconfig
import time
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from keyword import iskeyword
from pathlib import Path
from typing import TypeVar

from zmqexecutor import WorkerLostError, ZmqExecutor

try:
    from rich import box
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ModuleNotFoundError:
    sys.exit(
        "The demo draws with rich, which is not installed: pip install rich, or use `make demo`."
    )

STDLIB = Path(sysconfig.get_paths()["stdlib"])
PACKAGES_SHOWN = 12
console = Console()
T = TypeVar("T")


# ---------------------------------------------------------------- one task


@dataclass(frozen=True)
class Measure:
    """What was found in one source file, and by which process."""

    path: str
    lines: int
    identifiers: int
    functions: int
    longest: int  # lines of the longest function
    longest_name: str
    digest: str
    fault: str  # why it could not be read as Python; some test files are wrong on purpose
    pid: int = field(compare=False)


def measure(path: str, kill_worker: bool = False) -> Measure:
    """Measure one file. The pool's tasks and the serial run all call this."""
    if kill_worker:
        os.kill(os.getpid(), signal.SIGKILL)
    source = (STDLIB / path).read_bytes()
    identifiers, functions, longest, longest_name, fault = 0, 0, 0, "", ""
    try:
        for token in tokenize.tokenize(io.BytesIO(source).readline):
            if token.type == tokenize.NAME and not iskeyword(token.string):
                identifiers += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the test files are full of doubtful escapes
            tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions += 1
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > longest:
                    longest, longest_name = length, node.name
    except (SyntaxError, ValueError, tokenize.TokenError) as error:
        fault = f"{type(error).__name__}: {error}"
    return Measure(
        path=path,
        lines=source.count(b"\n"),
        identifiers=identifiers,
        functions=functions,
        longest=longest,
        longest_name=longest_name,
        digest=hashlib.sha256(source).hexdigest(),
        fault=fault,
        pid=os.getpid(),
    )


# ---------------------------------------------------------------- three ways to run them all

Answer = dict[str, Measure]


@dataclass
class Loss:
    """A task whose worker died, and who was working before and after that."""

    path: str
    error: WorkerLostError
    pids_before: set[int]
    pids_after: set[int] = field(default_factory=set)


def by_submit(pool: ZmqExecutor, paths: list[str], victim: str) -> tuple[Answer, list[Loss]]:
    """One future per file, taken as they finish. The victim's task kills its worker."""
    futures = {pool.submit(measure, path, path == victim): path for path in paths}
    answer: Answer = {}
    losses: list[Loss] = []
    for future in progress(as_completed(futures), "submit", len(paths)):
        try:
            found = future.result()
        except WorkerLostError as error:
            losses.append(Loss(futures[future], error, pids_of(answer)))
        else:
            answer[found.path] = found
            for loss in losses:
                loss.pids_after.add(found.pid)
    return answer, losses


def by_map(pool: ZmqExecutor, paths: list[str]) -> Answer:
    """Files in chunks, taken in the order in which they were given."""
    found = pool.map(measure, paths, chunksize=8)
    return {each.path: each for each in progress(found, "map", len(paths))}


def by_loop(paths: list[str]) -> Answer:
    """No pool: what the other two are compared with."""
    return {each.path: each for each in progress(map(measure, paths), "serial", len(paths))}


def make_good(pool: ZmqExecutor, workers: int, loss: Loss) -> Measure:
    """Run the lost task again, then wait until a worker that was not there before has answered.

    The pool never does this by itself: a task that killed its worker may have
    done half of its work, so only its owner knows whether it may run twice.
    """
    found: Measure = pool.submit(measure, loss.path).result()
    deadline = time.monotonic() + 30
    while loss.pids_after <= loss.pids_before and time.monotonic() < deadline:
        loss.pids_after.update(pool.map(pid_of_a_worker, range(workers)))
    return found


def pid_of_a_worker(_: int) -> int:
    """Hold a worker for a moment, so that the others get their share of these tasks."""
    time.sleep(0.05)
    return os.getpid()


# ---------------------------------------------------------------- what you see


def progress(items: Iterable[T], name: str, total: int) -> Iterable[T]:
    """The same items, with a progress bar if somebody is watching."""
    return track(
        items, f"{name:<8}", total, console=console, transient=True, disable=not sys.stdout.isatty()
    )


def pids_of(answer: Answer) -> set[int]:
    return {found.pid for found in answer.values()}


def as_text(pids: set[int]) -> str:
    return " ".join(map(str, sorted(pids))) or "none"


def show_table(answer: Answer) -> None:
    """One line per package, the biggest first; modules outside any package count as one."""
    packages: defaultdict[str, list[Measure]] = defaultdict(list)
    for path, found in answer.items():
        packages[path.partition("/")[0] if "/" in path else "(modules)"].append(found)
    ranked = sorted(packages.items(), key=lambda item: -sum(found.lines for found in item[1]))

    table = Table(
        title=f"Standard library of Python {sys.version.split()[0]}",
        box=box.SIMPLE_HEAD,
        show_footer=True,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    headings = ("package", "files", "lines", "identifiers", "functions", "longest function")
    for heading, total in zip(headings, cells("all", list(answer.values())), strict=True):
        numeric = heading not in ("package", "longest function")
        table.add_column(heading, total, justify="right" if numeric else "left", no_wrap=True)
    for name, group in ranked[:PACKAGES_SHOWN]:
        table.add_row(*cells(name, group))
    if rest := [found for _, group in ranked[PACKAGES_SHOWN:] for found in group]:
        table.add_row(*cells(f"({len(ranked) - PACKAGES_SHOWN} more)", rest))
    console.print(table)


def cells(name: str, group: list[Measure]) -> list[str]:
    longest = max(group, key=lambda found: found.longest)
    counts = (
        len(group),
        sum(found.lines for found in group),
        sum(found.identifiers for found in group),
        sum(found.functions for found in group),
    )
    return [
        name[:16],
        *(f"{count:,}" for count in counts),
        f"{longest.longest:3} {longest.longest_name[:18]}",
    ]


def show_loss(loss: Loss) -> None:
    say(f"\nLost task: {loss.path}")
    say(f"  {type(loss.error).__name__}: {loss.error}")
    say(f"  workers before: {as_text(loss.pids_before)}")
    say(f"  workers after:  {as_text(loss.pids_after)}")
    new = loss.pids_after - loss.pids_before
    say(f"  new worker: {as_text(new)}. All other tasks finished; this one was then sent again.")


def say(text: str) -> None:
    """Print without markup: paths and error messages are shown as they are."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


# ---------------------------------------------------------------- the run


def main() -> int:
    options = parse_options()
    paths = sorted(
        str(path.relative_to(STDLIB))
        for path in STDLIB.rglob("*.py")
        if not {"site-packages", "dist-packages"} & set(path.parts)
    )[: options.limit]
    victim = paths[len(paths) // 2] if options.crash else ""
    say(f"{len(paths)} files of {STDLIB}, {options.workers} workers")

    start = time.perf_counter()
    with ZmqExecutor(options.workers) as pool:
        submitted, losses = by_submit(pool, paths, victim)
        submit_time = time.perf_counter() - start
        for loss in losses:
            submitted[loss.path] = make_good(pool, options.workers, loss)
        start = time.perf_counter()
        mapped = by_map(pool, paths)
        map_time = time.perf_counter() - start
    start = time.perf_counter()
    looped = by_loop(paths) if options.serial else None
    serial_time = time.perf_counter() - start

    show_table(mapped)
    faults = [found for found in mapped.values() if found.fault]
    if faults:
        say(f"not valid Python: {len(faults)} files, for instance {faults[0].path}")
    for loss in losses:
        show_loss(loss)

    answers = [submitted, mapped] + ([looped] if looped is not None else [])
    same = all(answer == answers[0] for answer in answers)
    pids = pids_of(submitted) | pids_of(mapped)
    say(f"\nsubmit   {submit_time:6.2f} s  (starting the pool included)")
    say(f"map      {map_time:6.2f} s")
    if looped is not None:
        say(f"serial   {serial_time:6.2f} s  ({serial_time / map_time:.2f} times the map's)")
    say(f"worker pids: {as_text(pids)} (this process: {os.getpid()})")
    verdict = "yes" if same else "NO"
    say(f"same answer from all {len(answers)} runs: {verdict} (digest {fingerprint(mapped)})")
    return 0 if same and len(losses) == bool(victim) else 1


def fingerprint(answer: Answer) -> str:
    """One short digest of everything that was read."""
    digests = "".join(answer[path].digest for path in sorted(answer))
    return hashlib.sha256(digests.encode()).hexdigest()[:12]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workers", type=at_least_one, default=2, help="default: 2")
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="only the first N files")
    parser.add_argument("--crash", action="store_true", help="let one task kill its worker")
    parser.add_argument(
        "--serial",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also do it in this process and compare",
    )
    return parser.parse_args()


def at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


# No `if __name__ == "__main__"` guard is needed: workers never import this file.
try:
    sys.exit(main())
except KeyboardInterrupt:
    sys.exit("interrupted")
