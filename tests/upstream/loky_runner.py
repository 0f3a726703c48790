"""Runs loky's tests, as `loky_adapter` arranges them, with a pytest of its own.

python -m upstream.loky_runner CHANNEL SOURCE       run, as `driver` says
python -m upstream.loky_runner list SOURCE          print the tests' names
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from .driver import Outcome, serve

__all__ = ["main"]

MARKS = ("timeout", "broken_pool", "high_memory")  # loky's own


class Runner:
    """Runs the collected tests one by one, as they are asked for."""

    def __init__(self) -> None:
        self._reports: list[pytest.TestReport] = []

    def pytest_configure(self, config: pytest.Config) -> None:
        for mark in MARKS:
            config.addinivalue_line("markers", mark)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("loky's tests cannot be collected")
        items = {item.nodeid.partition("::")[2]: item for item in session.items}

        def run_one(name: str) -> Outcome:
            self._reports.clear()
            item = items[name]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            return _outcome(self._reports)

        if sys.argv[1] == "list":
            print(*items, sep="\n")
        else:
            serve(run_one)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)


def _outcome(reports: list[pytest.TestReport]) -> Outcome:
    failures = [report.longreprtext for report in reports if report.failed]
    if failures:
        return Outcome("failed", "\n".join(failures))
    skips = [str(report.longrepr) for report in reports if report.skipped]
    return Outcome("skipped", "; ".join(skips)) if skips else Outcome("passed")


def main() -> None:
    """Do what the arguments say."""
    source = Path(sys.argv[2]).resolve()
    sys.path.insert(0, str(source))
    # Programs that the tests start import loky's tests too.
    os.environ["PYTHONPATH"] = str(source)
    # A file for pytest to collect. The adapter itself it would import under a name that
    # begins with `tests`, which is loky's here.
    cases = Path("test_loky.py").resolve()
    cases.write_text(f"from {__package__}.loky_adapter import *\n")
    without = ("cacheprovider", "faulthandler", "terminal", "timeout", "warnings")
    options = [part for plugin in without for part in ("-p", f"no:{plugin}")]
    options += ["-c", os.devnull, "-s", "--assert=plain", f"--rootdir={cases.parent}"]
    sys.exit(pytest.main([*options, str(cases)], plugins=[Runner()]))
