"""The demo, run as its users run it: as a program of its own."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"
LIMIT = "40"


def run_demo(*options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(DEMO), "--limit", LIMIT, *options],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def pids(label: str, text: str) -> set[str]:
    found = re.search(rf"^ *{label}: *([\d ]+)", text, re.MULTILINE)
    assert found, f"no line {label!r} in:\n{text}"
    return set(found[1].split())


def test_all_runs_give_the_same_answer() -> None:
    text = run_demo("--workers", "2")
    assert "same answer from all 3 runs: yes" in text
    assert re.search(r"^ *all +40 ", text, re.MULTILINE)
    assert 1 <= len(pids("worker pids", text)) <= 2
    assert "Lost task" not in text


def test_no_progress_display_without_a_terminal() -> None:
    text = run_demo("--no-serial")
    assert "same answer from all 2 runs: yes" in text
    assert not re.search(r"^serial", text, re.MULTILINE)
    assert "\r" not in text
    assert "\x1b" not in text


def test_a_crash_costs_one_task_and_brings_a_new_worker() -> None:
    text = run_demo("--crash")
    assert text.count("Lost task:") == 1
    assert "WorkerLostError" in text
    assert "SIGKILL" in text
    before = pids("workers before", text)
    after = pids("workers after", text)
    new = pids("new worker", text)
    assert new
    assert new <= after - before
    assert "same answer from all 3 runs: yes" in text


def test_progress_display_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, str(DEMO), "--limit", LIMIT, "--no-serial"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
            close_fds=True,
        ) as demo:
            os.close(theirs)
            theirs = -1
            text = read_all(ours)
            assert demo.wait(60) == 0, text
    finally:
        os.close(ours)
        if theirs != -1:
            os.close(theirs)
    assert re.search(r"submit .*%", text)
    assert "same answer from all 2 runs: yes" in text


def read_all(terminal: int) -> str:
    """Everything written to a pseudo-terminal until its last writer is gone."""
    chunks = []
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # Linux says so with EIO
            break
        if not chunk:
            break
        chunks.append(chunk)
    return b"".join(chunks).decode()
