"""What is told of a worker that died: from its last words to the error."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
from pathlib import Path

import pytest

from tests.conftest import run_in_supervisors
from zmqexecutor import WorkerLostError, ZmqExecutor
from zmqexecutor.master.certificate import ending, lost_error
from zmqexecutor.supervision.last_words import FAULT_BYTES, TAIL_BYTES, TAIL_LINES, LastWords
from zmqexecutor.system.machine import oom_kills
from zmqexecutor.wire.protocol import Reaped

MIB = 2**20
FAULT = (
    "Fatal Python error: Segmentation fault\n"
    "\n"
    "Stack (most recent call first):\n"
    + "".join(f'  File "/some/where/{n}.py", line {n} in function_{n}\n' for n in range(100))
    + "\nExtension modules: numpy._core, zmq.backend (total: 2)\n"
)


def certificate(end: Reaped | None, seconds: float | None = None) -> WorkerLostError:
    return lost_error("f", 7, end, seconds, replaced=True)


class TestLastWords:
    def test_the_last_lines_are_kept(self) -> None:
        words = LastWords()
        for n in range(5000):
            words.add(b"line %d\n" % n)
        tail, fault = words.tell(crashed=True)
        assert tail.splitlines() == [f"line {n}" for n in range(5000 - TAIL_LINES, 5000)]
        assert fault == ""

    def test_bytes_are_bounded_and_need_not_be_text(self) -> None:
        words = LastWords()
        words.add(b"\xff" * 100_000)
        assert words.tell(crashed=False) == ("\N{REPLACEMENT CHARACTER}" * TAIL_BYTES, "")

    @pytest.mark.parametrize("size", [1, 7, 1000, 100_000])
    def test_a_stack_is_taken_out_whole(self, size: int) -> None:
        text = f"before\nhalf a line{FAULT}after\n".encode()
        words = LastWords()
        for start in range(0, len(text), size):
            words.add(text[start : start + size])
        assert len(FAULT) > TAIL_BYTES
        assert words.tell(crashed=True) == ("before\nhalf a lineafter\n", FAULT)

    def test_a_process_that_did_not_crash_has_no_stack(self) -> None:
        words = LastWords()
        words.add(FAULT.encode())
        tail, fault = words.tell(crashed=False)
        assert tail.splitlines() == FAULT.splitlines()[-TAIL_LINES:]
        assert fault == ""

    def test_the_last_of_several_counts(self) -> None:
        words = LastWords()
        words.add(f"{FAULT}of a child\n{FAULT.replace('Segmentation', 'Other')}".encode())
        tail, fault = words.tell(crashed=True)
        assert fault == FAULT.replace("Segmentation", "Other")
        assert tail.endswith("of a child\n")

    def test_what_is_far_back_is_no_last_word(self) -> None:
        words = LastWords()
        words.add(FAULT.encode())
        for _ in range(FAULT_BYTES // 4 + 1):
            words.add(b"more\n")
        assert words.tell(crashed=True) == ("more\n" * TAIL_LINES, "")


class TestError:
    def test_all_that_is_known_is_told(self) -> None:
        end = Reaped(7, -signal.SIGSEGV, "last words\n", peak_rss=300 * MIB, fault=FAULT)
        error = certificate(end, 2.5)
        assert (error.job, error.pid, error.signal) == ("f", 7, "SIGSEGV")
        assert (error.seconds, error.peak_rss) == (2.5, 300 * MIB)
        assert error.stderr == "last words\n"
        assert error.stack == FAULT
        assert "native code" in error.cause
        head, *rest = str(error).splitlines()
        assert head == (
            "the worker (pid 7) that ran f was killed by SIGSEGV after 2.5 s, having used up to "
            f"300 MiB of memory; likely cause: {error.cause}. Only this task is lost; the pool "
            "goes on with a new worker"
        )
        assert "last words" in rest
        assert rest.index("last words") < rest.index("Where it crashed:")
        assert str(error).endswith("(total: 2)")

    def test_nothing_is_made_up(self) -> None:
        error = certificate(None)
        assert "how it ended is not known" in str(error)
        assert (error.exitcode, error.seconds, error.peak_rss) == (None, None, None)
        assert (error.cause, error.stack, error.stderr) == ("", "", "")

    def test_out_of_memory_is_a_fact_only_if_the_kernel_says_so(self) -> None:
        fact = certificate(Reaped(7, -signal.SIGKILL, "", oom_killed=True))
        assert fact.cause == "the kernel killed it because memory ran out"
        assert f"SIGKILL; {fact.cause}." in str(fact)
        guess = certificate(Reaped(7, -signal.SIGKILL, ""))
        assert guess.cause == "the system ran out of memory, or somebody used kill -9"
        assert f"likely cause: {guess.cause}." in str(guess)

    def test_an_exit_code_of_a_ready_worker_has_two_likely_causes(self) -> None:
        error = certificate(Reaped(7, 3, "Traceback ..."))
        assert "ended by itself with exit code 3; likely cause: something called" in str(error)
        assert "os._exit, or the worker's own code failed" in error.cause
        assert "own code" not in certificate(Reaped(7, 0, "")).cause
        assert "os._exit" not in ending(Reaped(7, 3, "Traceback ..."))

    def test_an_unknown_signal_has_a_number(self) -> None:
        assert "signal 1000" in str(certificate(Reaped(7, -1000, "")))

    def test_it_comes_through_a_pickle(self) -> None:
        end = Reaped(7, -signal.SIGSEGV, "words", peak_rss=MIB, fault=FAULT)
        error = certificate(end, 1.0)
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is WorkerLostError
        assert str(again) == str(error)
        assert vars(again) == vars(error)


class TestKernelsCount:
    """With files in the place of the kernel's."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/outer/inner").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text("4:memory:/x\n0::/outer/inner\n")
        (tmp_path / "proc/vmstat").write_text("nr_free_pages 5\noom_kill 3\n")
        return tmp_path

    def test_our_own_group_comes_first(self, root: Path) -> None:
        events = "low 0\nhigh 0\nmax 9\noom 8\noom_kill {}\noom_group_kill 0\n"
        groups = root / "sys/fs/cgroup"
        (groups / "memory.events").write_text(events.format(100))
        assert oom_kills(str(root)) == 100
        (groups / "outer/memory.events").write_text(events.format(50))
        assert oom_kills(str(root)) == 50
        (groups / "outer/inner/memory.events").write_text(events.format(7))
        assert oom_kills(str(root)) == 7

    def test_without_groups_the_systems_count(self, root: Path) -> None:
        assert oom_kills(str(root)) == 3
        (root / "proc/self/cgroup").unlink()
        assert oom_kills(str(root)) == 3

    def test_without_any_count_it_is_nothing(self, root: Path) -> None:
        (root / "proc/vmstat").unlink()
        assert oom_kills(str(root)) == 0

    def test_a_group_at_the_top_is_not_counted_twice(self, root: Path) -> None:
        (root / "proc/self/cgroup").write_text("0::/\n")
        (root / "sys/fs/cgroup/memory.events").write_text("oom_kill 4\n")
        assert oom_kills(str(root)) == 4

    def test_here_it_is_a_number(self) -> None:
        assert oom_kills() >= 0


def grow_and_die(size: int) -> None:
    print("about to die", file=sys.stderr, flush=True)
    block = b"x" * size
    os.kill(os.getpid(), signal.SIGKILL if block else 0)


def fault(depth: int) -> None:
    if depth:
        fault(depth - 1)
    else:
        ctypes.string_at(0)


class TestRealDeaths:
    def test_memory_and_last_words(self, executor: ZmqExecutor) -> None:
        error = executor.submit(grow_and_die, 200 * MIB).exception(30)
        assert isinstance(error, WorkerLostError)
        assert error.peak_rss is not None
        assert 200 * MIB < error.peak_rss < 400 * MIB
        assert error.stderr == "about to die\n"
        assert error.stack == ""

    def test_a_crash_has_a_stack(self, executor: ZmqExecutor) -> None:
        error = executor.submit(fault, 60).exception(30)
        assert isinstance(error, WorkerLostError)
        assert error.signal == "SIGSEGV"
        assert error.stack.startswith("Fatal Python error: Segmentation fault\n")
        assert error.stack.count(" in fault\n") == 61
        assert len(error.stack) > TAIL_BYTES
        assert "Fatal Python error" not in error.stderr
        assert str(error).rstrip().endswith(error.stack.rstrip())

    def test_an_abort_too(self, executor: ZmqExecutor) -> None:
        error = executor.submit(os.abort).exception(30)
        assert isinstance(error, WorkerLostError)
        assert error.signal == "SIGABRT"
        assert error.stack.startswith("Fatal Python error: Aborted\n")

    def test_the_kernels_count_decides_about_kill_9(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """With a file for the kernel's count; to run out of memory is not for a test."""
        count = tmp_path / "count"

        def set_count(kills: int) -> None:
            new = count.with_suffix(".new")
            new.write_text(str(kills))
            new.replace(count)  # the supervisor may read it at any time

        set_count(5)
        run_in_supervisors(
            monkeypatch,
            "from zmqexecutor.supervision import group; "
            f"group.oom_kills = lambda: int(open({str(count)!r}).read())",
        )
        with ZmqExecutor(1) as executor:
            for kills, cause in ((5, "kill -9"), (6, "the kernel killed it")):
                executor.submit(set_count, kills).result(30)
                error = executor.submit(os.kill, 0, signal.SIGKILL).exception(30)
                assert isinstance(error, WorkerLostError)
                assert cause in error.cause
            set_count(7)
            error = executor.submit(os.abort).exception(30)
            assert isinstance(error, WorkerLostError)
            assert "the kernel" not in error.cause

    def test_a_closed_standard_error_does_no_harm(self, executor: ZmqExecutor) -> None:
        def close_and_crash() -> None:
            os.close(2)
            ctypes.string_at(0)

        error = executor.submit(close_and_crash).exception(30)
        assert isinstance(error, WorkerLostError)
        assert error.signal == "SIGSEGV"
        assert error.stack == ""
        assert executor.submit(pow, 2, 2).result(30) == 4
