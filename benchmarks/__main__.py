"""Process pools side by side: `python -m benchmarks [--quick] [--only NAME,...]`.

Prints tables, and writes them with all samples and plots into a folder.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine, measure, plots, report, stages
from benchmarks.base import SCALES, Workload
from benchmarks.peers import OURS, PEERS
from benchmarks.workloads import WORKLOADS


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Process pools side by side in one run.",
        epilog=f"Peers: {', '.join(PEERS)}. Workloads: {', '.join(w.name for w in WORKLOADS)}. "
        "Groups are named by the heads of their tables.",
    )
    parser.add_argument("--quick", action="store_true", help="less than two minutes")
    parser.add_argument("--scale", choices=SCALES, help="how much is done (default: full)")
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        action="append",
        default=[],
        help="peers, workloads or groups, with * and ? for any characters; may be repeated",
    )
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmarks/results"),
        metavar="FOLDER",
        help="default: %(default)s",
    )
    parser.add_argument("--stages", action="store_true", help="what one of our tasks costs, where")
    options = parser.parse_args(arguments)
    options.scale = options.scale or ("quick" if options.quick else "full")
    try:
        options.peers, options.workloads = choose(",".join(options.only), options.scale == "quick")
    except ValueError as error:
        parser.error(str(error))
    return options


def choose(only: str, quick: bool) -> tuple[list[str], list[Workload]]:
    """The peers and workloads that these names mean; all, if there are none of a kind.

    Raises:
        ValueError: a name means nothing.
    """
    names = [name.strip().lower() for name in only.split(",") if name.strip()]
    peers: list[str] = []
    workloads: list[Workload] = []
    for name in names:
        some_peers = [peer for peer in PEERS if fnmatch.fnmatch(peer.lower(), name)]
        some = [
            workload
            for workload in WORKLOADS
            if fnmatch.fnmatch(workload.name.lower(), name)
            or fnmatch.fnmatch(workload.group.lower(), name)
        ]
        if not some_peers and not some:
            raise ValueError(f"there is no peer, workload or group {name!r}; see --help")
        peers += some_peers
        workloads += some
    if not peers:
        peers = [name for name in PEERS if not (quick and PEERS[name].heavy)]
    chosen = {workload.name for workload in workloads} or {w.name for w in WORKLOADS}
    return (
        [peer for peer in PEERS if peer in peers],
        [workload for workload in WORKLOADS if workload.name in chosen],
    )


def show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<70}", end="" if text else "\r", file=sys.stderr, flush=True)


def left_out(peers: Sequence[str]) -> dict[str, str]:
    """Which of these cannot run here, and why."""
    reasons = {peer: PEERS[peer].missing() for peer in peers}
    return {peer: reason for peer, reason in reasons.items() if reason is not None}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    start = time.perf_counter()
    about = machine.describe()
    if options.stages:
        table = stages.table(SCALES[options.scale].part)
        for key, content in about.items():
            print(f"{key}: {content}")
        print(f"\n{report.text(table)}")
        report.write(options.output / "stages", about, measure.Samples(), [table])
        return
    missing = left_out(options.peers)
    peers = [peer for peer in options.peers if peer not in missing]
    if not peers:
        sys.exit("none of these peers can run here: " + "; ".join(missing.values()))
    for peer, reason in missing.items():
        about[f"left out, {peer}"] = reason
    if options.scale == "quick" and any(PEERS[name].heavy for name in set(PEERS) - set(peers)):
        heavy = [name for name in PEERS if PEERS[name].heavy and name not in options.peers]
        about["left out by --quick"] = (
            f"{', '.join(heavy)} (they start servers; name them in --only)"
        )
    samples = measure.run(peers, options.workloads, options.scale, options.workers, show_progress)
    about["run"] = (
        f"{options.scale}, {options.workers} workers, rounds: {samples.rounds}, "
        "median ± half of the range; "
        f"{SCALES[options.scale].cell:g} s for one peer in one workload, unless it has more"
    )
    found = report.tables(samples, peers, options.workloads)
    about["took"] = f"{time.perf_counter() - start:.0f} s"
    for key, content in about.items():
        print(f"{key}: {content}")
    print()
    for table in found:
        print(report.text(table))
    for line in report.troubles(samples):
        print(line)
    files = report.write(options.output, about, samples, found)
    files += plots.draw(options.output, samples, peers)
    print(f"written: {', '.join(str(file) for file in files)}")
    if OURS in peers and not samples.values.get(OURS):
        sys.exit(f"{OURS} did nothing")


if __name__ == "__main__":
    main()
