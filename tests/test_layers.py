"""A module imports only from the layers below it, and each library has its one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import zmqexecutor

PACKAGE = "zmqexecutor"
DIRECTORY = Path(zmqexecutor.__file__).parent
SOURCES = {
    ".".join(path.relative_to(DIRECTORY).with_suffix("").parts): path
    for path in DIRECTORY.rglob("*.py")
    if path.name != "__init__.py" or path.parent == DIRECTORY
}

# Each module may import those before it; the folders are layers, and so are their modules.
LAYERS = """
    : worker_errors errors
    system: arguments interrupts machine memory limits interpreter descriptors directories shutdown
    : keys
    wire: liveness protocol codecs wakeup mappings journal shortcuts security handshakes
        filling comparison buffers leases
    payload: namespaces imports arrays enums byvalue reducers unavailable constancy digests shares
        bulk picklers bindings packing tables checks groups costs proofs repeats pieces
        definitions snapshots values plain failures serialization
        inheritance setups
    worker: handler targets registration worker calls
    supervision: terminal last_words prctl template launch process group supervisor
        supervisor_boot supervisor_process supervisor_link restarts workers
    master: lean queues lanes scheduler tasks retries certificate fleet gatekeeper channels
        peers offers recalls stops roster dispatch attendance clients inbox coordinator loop
        master
    : jobrunner futures mapping settings pool opening executor client
    commands: references circus_ini reports exits worker_commands client_commands
        keygen_command
    : __init__
    commands: cli
    : __main__
"""


def _modules(layers: str) -> Iterator[str]:
    folder = ""
    for word in layers.split():
        if word.endswith(":"):
            folder = word[:-1]
        else:
            yield f"{folder}.{word}" if folder else word


MODULES = list(_modules(LAYERS))

PURE = [
    "worker_errors",
    "errors",
    "wire.protocol",
    "master.queues",
    "master.lanes",
    "master.scheduler",
]
IMPURE = {
    "zmq",
    "threading",
    "time",
    "asyncio",
    "select",
    "selectors",
    "socket",
    "os",
    "subprocess",
}
PICKLERS = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "copyreg"}
MAY_PICKLE = {
    "wire.codecs",
    "payload.namespaces",
    "payload.arrays",
    "payload.enums",
    "payload.byvalue",
    "payload.reducers",
    "payload.shares",
    "payload.bulk",
    "payload.picklers",
    "payload.bindings",
    "payload.checks",
    "payload.proofs",
    "payload.repeats",
    "payload.pieces",
    "payload.definitions",
    "payload.values",
    "payload.plain",
    "payload.failures",
    "payload.serialization",
}
SUPERVISION = {"circus", "tornado"}
MAY_SUPERVISE = {"supervision.process", "supervision.group", "supervision.supervisor"}
FACES = {"jobrunner", "executor", "settings", "opening", "pool", "futures", "mapping", "client"}
NOT_FOR_WORKERS = {
    module
    for module in MODULES
    if module.startswith(("master.", "supervision.", "commands.")) or module in FACES
}


@pytest.fixture(autouse=True)
def no_leaks() -> None:
    """In the place of conftest's: what is started here has ended when it is looked at."""


def imports(module: str) -> Iterator[tuple[str, str, int]]:
    """What a module imports, wherever it does so: module, name in it, and line.

    Modules of our own are named with a leading dot, and their path from the top.
    """
    folder, _, _ = module.rpartition(".")
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield _own(alias.name), "", node.lineno
        elif isinstance(node, ast.ImportFrom):
            name = _own(node.module or "")
            if node.level:
                above = folder if node.level == 1 else ""
                name = "." + ".".join(filter(None, (above, node.module)))
            for alias in node.names:
                inner = f"{name}.{alias.name}".replace("..", ".")
                if inner[1:] in SOURCES and inner.startswith("."):  # from . import protocol
                    yield inner, "", node.lineno
                else:
                    yield name, alias.name, node.lineno


def _own(name: str) -> str:
    return name.removeprefix(PACKAGE) if name.startswith(f"{PACKAGE}.") else name


def own_imports(module: str) -> set[str]:
    return {name[1:] for name, _, _ in imports(module) if name.startswith(".")}


def users_of(libraries: set[str]) -> dict[str, list[int]]:
    """The modules that import one of these libraries, and in which lines."""
    found: dict[str, list[int]] = {}
    for module in SOURCES:
        for name, what, line in imports(module):
            if (name, what) == ("pickle", "PicklingError"):
                continue  # the exception that ours is a kind of
            if name.partition(".")[0] in libraries:
                found.setdefault(module, []).append(line)
    return found


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after this code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(done.stdout.split())


def test_every_module_has_its_place_in_the_layers() -> None:
    assert set(SOURCES) == set(MODULES)
    assert len(MODULES) == len(set(MODULES))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_layers_before_it(module: str) -> None:
    below = set(MODULES[: MODULES.index(module)])
    assert own_imports(module) <= below


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_has_no_sockets_threads_or_clock(module: str) -> None:
    used = {name.partition(".")[0] for name, _, _ in imports(module)}
    assert not used & IMPURE


def test_the_scheduler_and_the_protocol_know_nothing_but_errors() -> None:
    assert own_imports("master.scheduler") == {"master.lanes", "wire.protocol"}
    assert own_imports("master.lanes") == {"master.queues", "wire.protocol"}
    assert own_imports("master.queues") == set()
    assert own_imports("wire.protocol") <= {"worker_errors"}


def test_pickles_have_one_place() -> None:
    assert set(users_of(PICKLERS)) <= MAY_PICKLE


def test_circus_and_tornado_have_one_place() -> None:
    assert set(users_of(SUPERVISION)) == MAY_SUPERVISE


def test_nobody_imports_the_supervisor_as_it_is_a_program_of_its_own() -> None:
    importers = {module for module in SOURCES if own_imports(module) & MAY_SUPERVISE}
    boot = "supervision.supervisor_boot"
    assert importers == {"supervision.group", "supervision.supervisor", boot}
    programs = {m for m in SOURCES if "supervision.supervisor" in own_imports(m)}
    assert programs == {boot}
    assert boot not in set().union(*map(own_imports, SOURCES))


def test_a_supervisor_starts_its_first_processes_before_it_imports_much() -> None:
    code = (
        "import sys, zmqexecutor.supervision.supervisor_boot; "
        "assert not {'asyncio', 'circus', 'zmq', 'tornado'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_process_wide_zmq_context_is_never_used() -> None:
    users = [
        module
        for module, path in SOURCES.items()
        if "Context.instance" in path.read_text(encoding="utf-8")
    ]
    assert set(users) <= MAY_SUPERVISE, "only the supervisor has a process to itself"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("worker.")])
def test_a_workers_module_names_nothing_of_the_masters_side(module: str) -> None:
    assert not own_imports(module) & NOT_FOR_WORKERS


def test_a_worker_process_loads_nothing_of_the_masters_side() -> None:
    loaded = loaded_by(f"import {PACKAGE}.worker.calls")
    assert f"{PACKAGE}.worker.worker" in loaded
    assert not loaded & {f"{PACKAGE}.{module}" for module in NOT_FOR_WORKERS}
    assert not loaded & {"circus", "tornado", "numpy"}
    assert "concurrent.futures" not in loaded, "it takes long to import"
    assert "hashlib" not in loaded, "it takes memory"


def test_a_worker_by_its_public_name_loads_nothing_of_the_masters_side() -> None:
    loaded = loaded_by(f"from {PACKAGE} import Worker")
    assert not loaded & {f"{PACKAGE}.{module}" for module in NOT_FOR_WORKERS}
    assert not loaded & {f"{PACKAGE}.payload.serialization", "cloudpickle"}


def test_the_package_alone_loads_none_of_its_modules() -> None:
    assert {name for name in loaded_by(f"import {PACKAGE}") if name.startswith(PACKAGE)} == {
        PACKAGE
    }


@pytest.mark.parametrize("name", ["ZmqExecutor", "JobRunner", "Workers", "Worker"])
def test_a_public_name_loads_no_circus_tornado_or_numpy(name: str) -> None:
    loaded = loaded_by(f"import {PACKAGE}; {PACKAGE}.{name}")
    assert not loaded & {"circus", "tornado", "numpy"}


def test_an_executor_can_be_imported_without_what_takes_long() -> None:
    """Its supervisor is started by then, and imports it at the same time as the program does."""
    loaded = loaded_by(f"from {PACKAGE} import ZmqExecutor")
    assert not loaded & {"zmq", "msgspec", "cloudpickle", "asyncio", "inspect"}


def test_every_public_name_can_be_had() -> None:
    for name in zmqexecutor.__all__:
        assert getattr(zmqexecutor, name) is not None
        assert name in dir(zmqexecutor)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        zmqexecutor.nonsense  # noqa: B018
