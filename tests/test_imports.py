"""What a script imports from a module, and what of its code runs when its globals arrive."""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from tests.conftest import sent_by_value
from zmqexecutor import SerializationError, ZmqExecutor
from zmqexecutor.payload.imports import importable_as, is_only_itself, origin_of
from zmqexecutor.payload.serialization import CallPickler

LIBRARY = """
import threading

class Service:
    def __init__(self):
        self.calls = []

    def call(self, number):
        self.calls.append(number)
        return list(self.calls)

class Sealed:
    def __reduce__(self):
        raise TypeError("cannot be sent")

SERVICE = Service()
call = SERVICE.call
UNSET = object()
LOCK = threading.Lock()
CONNECTION = Sealed()
TABLE = {"of": "the module"}

def is_unset(value):
    return value is UNSET
"""

SCRIPT = """
import dataclasses, os, random, sys, threading
import imported_library
from dataclasses import MISSING
from imported_library import CONNECTION, LOCK, SERVICE, TABLE, UNSET, call, is_unset
from os import environ
from random import gauss, random as draw, randint
from sys import flags, modules, version_info

def same():
    return {
        "call": call.__self__ is SERVICE,
        "UNSET": UNSET is imported_library.UNSET and is_unset(UNSET),
        "MISSING": MISSING is dataclasses.MISSING,
        "LOCK": LOCK is imported_library.LOCK,
        "CONNECTION": CONNECTION is imported_library.CONNECTION,
        "environ": environ is os.environ,
        "modules": modules is sys.modules,
        "flags": flags is sys.flags,
        "version_info": version_info is sys.version_info,
        "draw": draw.__self__ is random._inst and randint.__self__ is random._inst,
    }

def use(number):
    return call(number), SERVICE.calls

def numbers(_):
    return draw(), gauss(0, 1), randint(0, 10**12)

def seeded():
    random.seed(5)
    return draw()

def table():
    return TABLE

class Scaled:
    def __init__(self, number):
        self.number = number
    def __getstate__(self):
        return self.number
    def __setstate__(self, number):
        self.number, self.scaled = number, number * rate
        self.thread = threading.current_thread().name

class Hashed:
    def __init__(self, number):
        self.number = number
    def __hash__(self):
        return zeroth(self.number)
    def __eq__(self, other):
        return self.number == other.number

def zeroth(number):
    return number * later

later = 3
rate = 1
a_first = Scaled(10)
b_second = {Hashed(1): 1}

def scaled():
    return a_first.scaled, a_first.number * rate

def found():
    return Hashed(1) in b_second
"""


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Any]:
    """A module that is sent by value, and one that workers can import."""
    (tmp_path / "imported_library.py").write_text(LIBRARY)
    with sent_by_value("importing_script", SCRIPT, tmp_path) as module:
        yield module
    del sys.modules["imported_library"]


@pytest.fixture
def executor() -> Iterator[ZmqExecutor]:
    with ZmqExecutor(2) as executor:
        yield executor


def test_it_is_the_module_s_in_a_task_too(script: Any, executor: ZmqExecutor) -> None:
    same = executor.submit(script.same).result(60)
    assert same == dict.fromkeys(same, True)


def test_a_method_is_of_the_copy_of_its_object(script: Any) -> None:
    """An object with something in it is copied as the program has it, and so are its methods."""
    script.SERVICE.calls.append(0)
    with ZmqExecutor(1) as executor:
        assert executor.submit(script.use, 1).result(60) == ([0, 1], [0, 1])
        assert executor.submit(script.use, 2).result(60) == ([0, 1, 2], [0, 1, 2])
    assert script.SERVICE.calls == [0]


def test_workers_draw_other_numbers(script: Any, executor: ZmqExecutor) -> None:
    script.draw()
    drawn = list(executor.map(script.numbers, range(20)))
    assert len(set(drawn)) == 20
    assert [len(set(column)) for column in zip(*drawn, strict=True)] == [20, 20, 20]
    assert executor.submit(script.seeded).result(60) == script.seeded()


def test_tables_arrive_as_the_program_has_changed_them(script: Any, executor: ZmqExecutor) -> None:
    """What can be copied is, by whatever way the script came to it."""
    script.TABLE["of"] = "the program"
    assert executor.submit(script.table).result(60) == {"of": "the program"}


def test_it_is_not_looked_for_again_but_seen_when_it_changes(script: Any) -> None:
    pickler = CallPickler()
    keys = [pickler.dump_call(script.numbers, (1,), {}).shared.key for _ in range(2)]
    script.draw = script.random.Random(5).random
    keys.append(pickler.dump_call(script.numbers, (1,), {}).shared.key)
    assert keys[0] == keys[1] != keys[2]


def test_what_a_script_has_put_into_a_module_is_the_script_s(script: Any) -> None:
    """The module of a worker has something else there, or nothing."""
    library = script.imported_library
    library.LOCK = script.LOCK = threading.RLock()
    library.UNSET = script.UNSET = script.Scaled(2)
    library.MORE = script.MORE = object()
    exec("def more(): return type(MORE) is object, type(LOCK), UNSET.scaled", vars(script))
    exec("def cpu_count(): return 1000\ndef count(): return cpu_count()", vars(script))
    before = os.cpu_count
    os.cpu_count = script.cpu_count
    try:
        with ZmqExecutor(1) as executor:
            more = executor.submit(script.more).result(60)
            assert more == (True, type(threading.RLock()), 2)
            assert executor.submit(script.count).result(60) == 1000
    finally:
        os.cpu_count = before


def test_a_module_that_workers_cannot_import(script: Any, executor: ZmqExecutor) -> None:
    """Then it is as if it had not been imported: a copy, or an error when it is used."""
    module: Any = types.ModuleType("nowhere_to_be_found")
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    module.UNSET = script.UNSET = object()
    module.CONNECTION = script.CONNECTION = script.imported_library.Sealed()
    exec("def unset(): return type(UNSET) is object", vars(script))
    exec("def connect(): return CONNECTION.name", vars(script))
    sys.modules[module.__name__] = module
    try:
        assert executor.submit(script.unset).result(60) is True
        with pytest.raises(SerializationError, match=r"'CONNECTION' .* cannot be used in a worker"):
            executor.submit(script.connect).result(60)
    finally:
        del sys.modules[module.__name__]


def test_what_no_module_has_is_refused(script: Any, executor: ZmqExecutor) -> None:
    script.CONNECTION = script.imported_library.Sealed()
    with pytest.raises(SerializationError, match="CONNECTION"):
        executor.submit(script.same).result(60)


class Lazy:
    """Has no attributes yet, and says so."""

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("not bound")


@pytest.mark.parametrize(
    "value",
    [
        *(len, cloudpickle.dumps, dict.fromkeys, None, 10**10, {"a": 1}, type("Kind", (), {})),
        *(type("Held", (), {"__slots__": ("a",)})(), sys.argv, sys.path, os.name, Lazy()),
    ],
)
def test_what_is_copied(value: Any) -> None:
    assert origin_of(value) is None
    assert not is_only_itself(value)


def test_there_must_be_no_doubt_which_module() -> None:
    dataclasses: Any = sys.modules["dataclasses"]
    unset = object()
    for name in ("another_module", "a", "a.part"):
        module: Any = types.ModuleType(name)
        module.__spec__ = dataclasses.__spec__
        module.MISSING = dataclasses.MISSING
        module.UNSET = unset
        sys.modules[name] = module
    try:
        assert importable_as("MISSING", dataclasses.MISSING) == ("dataclasses", "MISSING")
        assert importable_as("UNSET", unset) is None
        del sys.modules["another_module"]
        assert importable_as("UNSET", unset) == ("a", "UNSET")
    finally:
        del sys.modules["a"], sys.modules["a.part"]


# ----------------------------------------------------- code that runs when globals arrive


@pytest.mark.parametrize("name", ["scaled", "found"])
def test_it_finds_the_globals_that_it_uses(script: Any, executor: ZmqExecutor, name: str) -> None:
    function: Callable[[], Any] = getattr(script, name)
    assert executor.submit(function).result(60) == (True if name == "found" else (10, 10))


def test_it_finds_them_as_they_are_now(script: Any) -> None:
    with ZmqExecutor(1) as executor:
        for rate in (1, 2, 3):
            script.rate, script.a_first = rate, script.Scaled(10 * rate)
            result = executor.submit(script.scaled).result(60)
            assert result == (10 * rate * rate, 10 * rate * rate)


# ------------------------------------------------------------------- executors among them


EXECUTORS = """
import os

class Service:
    pool = None

    def work(self, number):
        return number + 1

    def run(self):
        return [future.result(60) for future in [self.pool.submit(self.work, n) for n in range(3)]]

    def nested(self):
        return self.pool.submit(abs, -1).result(60)

executor = None
home = os.getpid()

def fibonacci(n):
    if n < 2:
        return n
    if n > 6 and os.getpid() == home:
        parts = [executor.submit(fibonacci, n - 1), executor.submit(fibonacci, n - 2)]
        return sum(part.result(60) for part in parts)
    return fibonacci(n - 1) + fibonacci(n - 2)
"""


def test_an_executor_beside_what_a_task_needs(script: Any, executor: ZmqExecutor) -> None:
    """As with a fork it may be there; who uses it is told."""
    exec(EXECUTORS, vars(script))
    script.Service.pool = script.executor = executor
    assert script.Service().run() == [1, 2, 3]
    assert script.fibonacci(8) == 21
    with ThreadPoolExecutor(1) as threads:
        script.executor = threads
        assert executor.submit(script.fibonacci, 8).result(60) == 21
    with pytest.raises(SerializationError, match="a ZmqExecutor cannot be used in a worker"):
        executor.submit(script.Service().nested).result(60)
    script.Service.pool = None


def test_a_class_that_cannot_be_sent_can_be_imported(script: Any, executor: ZmqExecutor) -> None:
    script.Scaled.held = (number for number in range(3))
    with pytest.raises(SerializationError, match=r"'Scaled'.* Move it to a module") as caught:
        executor.submit(script.scaled).result(60)
    assert isinstance(caught.value.__cause__, TypeError)
