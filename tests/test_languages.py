"""The workers in other languages: examples/cpp and examples/node, with a real master.

What a real master does only in trouble is done here by one that says what it is told to.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from zmqexecutor import JobFailedError, JobRunner, WorkerLostError

from .conftest import DEADLINE, eventually

EXAMPLES = Path(__file__).parent.parent / "examples"
Start = Callable[..., "subprocess.Popen[str]"]


# ------------------------------------------------------------------- building


def build_cpp(directory: Path) -> list[str]:
    """Compile into a directory that survives the run, again only if a source has changed."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or shutil.which("make") is None:
        pytest.skip("no C++ compiler, or no make")
    sources = [EXAMPLES / "cpp" / name for name in ("worker.cpp", "tcp.hpp", "Makefile")]
    for source in sources:
        copy_if_changed(source, directory)
    probe = run(
        [compiler, "-std=c++17", "-x", "c++", "-", "-lzmq", "-o", "probe"],
        directory,
        "#if !__has_include(<zmq.hpp>) || !__has_include(<nlohmann/json.hpp>)\n#error\n#endif\n"
        "int main() {}\n",
    )
    if probe.returncode:
        pytest.skip("no headers: apt install libzmq3-dev cppzmq-dev nlohmann-json3-dev")
    made = run(["make", f"CXX={compiler}", "CXXFLAGS=-O0 -Wall -Wextra -Werror"], directory)
    assert made.returncode == 0, made.stdout
    return [str(directory / "worker")]


def build_node(directory: Path) -> list[str]:
    """Install its packages into a directory that survives the run."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("no Node.js, or no npm")
    version = run([node, "--version"], directory).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < 18:
        pytest.skip(f"Node.js {version} is older than 18")
    changed = [
        copy_if_changed(EXAMPLES / "node" / name, directory)
        for name in ("package.json", "package-lock.json", "worker.js", "tcp.js")
    ]
    if any(changed[:2]) or not (directory / "node_modules" / "zeromq").exists():
        quick = ["--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
        limits = ["--fetch-retries=0", "--fetch-timeout=10000"]
        installed = run([npm, "ci", *quick, *limits], directory)
        if installed.returncode:
            (directory / "package.json").unlink()  # so that the next run tries again
            # Those two would be our fault. All else is that of the network or of npm.
            assert "EUSAGE" not in installed.stdout, installed.stdout
            assert "EINTEGRITY" not in installed.stdout, installed.stdout
            why = [line for line in installed.stdout.splitlines() if " code " in line]
            pytest.skip(f"npm cannot install the packages: {why or installed.stdout[-200:]}")
    loaded = run([node, "-e", "require('zeromq')"], directory)
    if loaded.returncode:
        pytest.skip(f"zeromq for Node.js has no binary for this system: {loaded.stdout[-300:]}")
    return [node, str(directory / "worker.js")]


def copy_if_changed(source: Path, directory: Path) -> bool:
    target = directory / source.name
    if target.exists() and target.read_bytes() == source.read_bytes():
        return False
    shutil.copy(source, target)  # with the time of now, by which make compiles again
    return True


def run(command: list[str], directory: Path, source: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=directory,
            input=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=90,
            check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{Path(command[0]).name} took more than 90 s")


BUILDERS = {"cpp": build_cpp, "node": build_node}


@pytest.fixture(scope="module", params=list(BUILDERS))
def command(request: pytest.FixtureRequest) -> list[str]:
    """How to start the worker, without its arguments."""
    language: str = request.param
    return BUILDERS[language](request.config.cache.mkdir(f"languages-{language}"))


@pytest.fixture
def start(command: list[str]) -> Iterator[Start]:
    processes: list[subprocess.Popen[str]] = []

    def begin(endpoint: str, patience: float = 60, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*command, endpoint, str(patience)],
            env={**os.environ, "ZMQEXECUTOR_KEYS": "", **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/m"


@pytest.fixture(params=["ipc", "tcp"])
def any_endpoint(request: pytest.FixtureRequest, endpoint: str) -> str:
    return endpoint if request.param == "ipc" else free_port()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def registered(runner: JobRunner, number: int = 1) -> bool:
    return eventually(lambda: len(runner.workers) == number)


def ends(process: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for the end of a worker; what it had to say."""
    _, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == status, said
    return said


# ------------------------------------------------------------------- with a JobRunner


def test_services_codecs_and_errors(start: Start, any_endpoint: str) -> None:
    worker = start(any_endpoint)
    with JobRunner(any_endpoint) as runner:
        assert registered(runner)
        assert sorted(runner.workers[0].services) == ["shout", "square"]
        assert runner.workers[0].pid == worker.pid

        def ask(data: Any, service: str = "square", codec: str | None = None) -> Any:
            return runner.execute("1", data, DEADLINE, service=service, codec=codec)

        assert ask("12") == "144"
        assert ask(b"-12") == b"144"
        assert ask(12, codec="json") == 144
        assert ask(-70_000, codec="msgpack") == 4_900_000_000
        assert ask("nice été", "shout").startswith("NICE ")
        assert ask(b"nice", "shout") == b"NICE"
        assert ask("nice", "shout", "json") == ask("nice", "shout", "msgpack") == "NICE"
        assert ask("", "shout") == ""

        with pytest.raises(JobFailedError, match="tw"):
            ask("twelve")
        with pytest.raises(JobFailedError):
            ask({"no": ["number"]}, codec="json")
        with pytest.raises(JobFailedError, match="does not know the codec pickle"):
            ask(12, codec="pickle")

        futures = [runner.submit(str(n), str(n), service="square") for n in range(200)]
        assert [future.result(DEADLINE) for future in futures] == [str(n * n) for n in range(200)]
        worker.terminate()
        assert eventually(lambda: not runner.workers)
        assert ends(worker) == ""


def test_a_killed_worker_costs_its_job_and_no_other(start: Start, any_endpoint: str) -> None:
    victim = start(any_endpoint)
    with JobRunner(any_endpoint) as runner:
        assert registered(runner)
        os.kill(victim.pid, signal.SIGSTOP)  # makes any job a long one
        lost = runner.submit("lost", "1", service="square")
        assert eventually(lambda: runner.workers[0].state == "busy")
        others = [runner.submit("other", "2", service="square") for _ in range(20)]
        start(any_endpoint)
        assert registered(runner, 2)
        victim.kill()
        with pytest.raises(WorkerLostError):
            lost.result(DEADLINE)
        assert {future.result(DEADLINE) for future in others} == {"4"}
        assert registered(runner, 1)


def test_a_worker_that_is_told_to_end_loses_no_job(start: Start, endpoint: str) -> None:
    leaving = start(endpoint)
    with JobRunner(endpoint) as runner:
        assert registered(runner)
        os.kill(leaving.pid, signal.SIGSTOP)
        future = runner.submit("1", "5", service="square")
        assert eventually(lambda: runner.workers[0].state == "busy")
        start(endpoint)
        assert registered(runner, 2)
        leaving.send_signal(signal.SIGINT)
        leaving.send_signal(signal.SIGCONT)
        assert future.result(DEADLINE) == "25"
        assert ends(leaving) == ""


def test_it_serves_the_next_master_under_a_new_name(start: Start, any_endpoint: str) -> None:
    worker = start(any_endpoint)
    names = set()
    for _ in range(3):
        with JobRunner(any_endpoint) as runner:
            assert registered(runner)
            names.add(runner.workers[0].id)
            assert runner.workers[0].pid == worker.pid
            assert runner.execute("1", "6", DEADLINE, service="square") == "36"
    assert len(names) == 3
    worker.send_signal(signal.SIGINT)  # while there is no master
    assert ends(worker) == ""


def test_it_ends_if_no_master_comes_or_comes_back(start: Start, endpoint: str) -> None:
    bereft, lonely = start(endpoint, 1), start(endpoint + "-nobody", 1)
    with JobRunner(endpoint) as runner:
        assert registered(runner)
    for worker in (bereft, lonely):
        assert "no master at ipc://" in ends(worker, 1)


# ------------------------------------------------------------------- with a master of our own


class Script:
    """A master that says what a test wants, to one worker."""

    def __init__(self, endpoint: str, server_secret: bytes | None = None) -> None:
        self._context = zmq.Context()
        self.control, self.work = (self._context.socket(zmq.ROUTER) for _ in range(2))
        for router in (self.control, self.work):
            router.linger = 0
            if server_secret is not None:
                router.curve_server = True
                router.curve_secretkey = server_secret
        self.control.bind(endpoint)
        self.work.bind(endpoint.rpartition(":")[0] + ":*" if "tcp" in endpoint else endpoint + "w")
        self.worker = b""

    def close(self) -> None:
        self._context.destroy()

    def say(self, router: zmq.Socket[bytes], *message: Any) -> None:
        router.send_multipart([self.worker, msgspec.msgpack.encode(message)])

    def hear(self, router: zmq.Socket[bytes]) -> list[Any]:
        assert router.poll(int(DEADLINE * 1000)), "the worker said nothing"
        self.worker, frame = router.recv_multipart()
        message: list[Any] = msgspec.msgpack.decode(frame)
        return message

    def welcome(self) -> list[Any]:
        """Have a worker register; its Hello."""
        hello = self.hear(self.control)
        address = self.work.getsockopt_string(zmq.LAST_ENDPOINT)
        self.say(self.control, "Welcome", 1, address, b"", "a field of a later version")
        assert self.hear(self.work) == ["Ready", hello[2]]
        return hello


@pytest.fixture
def script(endpoint: str) -> Iterator[Script]:
    with contextlib.closing(Script(endpoint)) as script:
        yield script


def job(seq: int, data: bytes, service: str = "square") -> list[Any]:
    return [seq, "name", data, "text", b"", 0, None, service]


def test_what_it_says(start: Start, endpoint: str, script: Script) -> None:
    worker = start(endpoint)
    name, version, worker_name, pid, _host, machine, workpoint, journal, *rest = script.welcome()
    assert (name, version, pid, workpoint, journal) == ("Hello", 1, worker.pid, None, None)
    assert worker_name.encode() == script.worker
    assert rest[0] == ""
    assert sorted(rest[1]) == ["shout", "square"]
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.exists():
        links = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "mnt")]
        assert machine == " ".join([os.uname().nodename, boot.read_text().strip(), *links])
    begun = time.monotonic()
    script.say(script.work, "Jobs", 0, [job(1, b"3"), job(2, b"x"), job(3, b"a", "shout")])
    results: list[Any] = []
    while len(results) < 3:
        name, position, some, *_ = script.hear(script.work)
        assert (name, position) == ("Results", 0)
        results += some
    assert [result[:2] for result in results] == [[1, True], [2, False], [3, True]]
    assert [results[0][2:4], results[2][2:4]] == [[b"9", "text"], [b"A", "text"]]
    assert results[1][3] == "text"
    assert 0 <= results[0][4] <= time.monotonic() - begun
    script.say(script.control, "Drain")
    assert script.hear(script.work) == ["Goodbye"]
    assert ends(worker) == ""


def test_it_drops_what_it_does_not_understand(start: Start, endpoint: str, script: Script) -> None:
    worker = start(endpoint)
    script.welcome()
    rubbish: list[Any] = [b"\xc1", b"", b"\xdd\xff\xff\xff\xff", *map(msgspec.msgpack.encode, (
        7, [], {}, [[]], ["Novelty", 1], ["constructor"], ["Jobs"], ["Jobs", 0, 5], ["Welcome"],
    ))]  # fmt: skip
    for frame in rubbish:
        script.control.send_multipart([script.worker, frame])
        script.work.send_multipart([script.worker, frame])
    script.say(script.control, "Ping")
    script.say(script.work, "Jobs", 0, [], [], [b"key to forget"])
    script.say(script.work, "Jobs", 0, [job(1, b"4")], [], [], "a field of a later version")
    assert script.hear(script.work)[2][0][:3] == [1, True, b"16"]
    script.say(script.control, "Drain")
    assert script.hear(script.work) == ["Goodbye"]
    ends(worker)


def test_drain_does_not_lose_a_job(start: Start, endpoint: str, script: Script) -> None:
    worker = start(endpoint)
    script.welcome()
    os.kill(worker.pid, signal.SIGSTOP)
    script.say(script.work, "Jobs", 0, [job(1, b"4")])
    script.say(script.control, "Drain")
    os.kill(worker.pid, signal.SIGCONT)
    said = script.hear(script.work)
    if said[0] == "Results":  # it may as well leave before the job starts
        assert said[2][0][:3] == [1, True, b"16"]
        said = script.hear(script.work)
    assert said == ["Goodbye"]
    assert ends(worker) == ""


def test_refused(start: Start, endpoint: str, script: Script) -> None:
    worker = start(endpoint)
    script.hear(script.control)
    script.say(script.control, "Refused", "you are too late")
    assert "refused" in (said := ends(worker, 1))
    assert "you are too late" in said


def test_a_master_of_another_version(start: Start, endpoint: str, script: Script) -> None:
    worker = start(endpoint)
    script.hear(script.control)
    script.say(script.control, "Welcome", 2, "ipc:///nowhere")
    assert "version" in ends(worker, 1)


def test_expelled(start: Start, endpoint: str, script: Script) -> None:
    start(endpoint)
    names = []
    for _ in range(3):
        names.append(script.welcome()[2])
        script.say(script.control, "Expelled")
    assert len(set(names)) == 3


def test_die(start: Start, endpoint: str, script: Script, command: list[str]) -> None:
    if len(command) == 1:
        pytest.skip("the worker in C++ runs jobs where it listens")
    worker = start(endpoint)
    script.welcome()
    script.say(script.control, "Die")
    ends(worker, -signal.SIGKILL)


def test_keys_for_tcp(start: Start, tmp_path: Path) -> None:
    endpoint = free_port()
    master_public, master_secret = zmq.curve_keypair()
    _, worker_secret = zmq.curve_keypair()
    for folder, public in (("right", master_public), ("wrong", zmq.curve_keypair()[0])):
        keys = tmp_path / folder
        keys.mkdir(0o700)
        (keys / "master.public").write_bytes(b"# of the master\n" + public + b"\n")
        (keys / "worker.secret").write_bytes(worker_secret + b"\n")
    with contextlib.closing(Script(endpoint, master_secret)) as script:
        deceived = start(endpoint, 1, ZMQEXECUTOR_KEYS=str(tmp_path / "wrong"))
        assert "no master at tcp://" in ends(deceived, 1)
        start(endpoint, ZMQEXECUTOR_KEYS=str(tmp_path / "right"))
        script.welcome()
        script.say(script.work, "Jobs", 0, [job(1, b"5")])
        assert script.hear(script.work)[2][0][:3] == [1, True, b"25"]


def test_without_an_endpoint_it_tells_what_it_needs(command: list[str]) -> None:
    asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert asked.returncode == 1
    assert "ENDPOINT" in asked.stderr
