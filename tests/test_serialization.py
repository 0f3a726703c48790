"""Calls and outcomes, in one process for the mechanics, in two for the script's globals."""

from __future__ import annotations

import enum
import functools
import gc
import importlib
import io
import multiprocessing
import operator
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from zmqexecutor.errors import SerializationError
from zmqexecutor.payload.constancy import is_constant
from zmqexecutor.payload.proofs import prove
from zmqexecutor.payload.serialization import Call, CallPickler, CallRunner, Outcome
from zmqexecutor.payload.values import OUT_OF_BAND


class Pair:
    """Both sides of the wire in one process."""

    def __init__(self) -> None:
        self.pickler = CallPickler()
        self.runner = CallRunner()

    def run(self, call: Call) -> Outcome:
        for share in call.shares:
            self.runner.load_share(share.key, share.contents(mapped=False))
        self.runner.load_function(call.shared.key, call.shared.data)
        return self.runner.run(call.shared.key, call.data, call.buffers)

    def outcome(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
        return self.run(self.pickler.dump_call(fn, args, kwargs))

    def call(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.pickler.load_outcome(self.outcome(fn, *args, **kwargs))


@pytest.fixture
def pair() -> Pair:
    return Pair()


def echo(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def first(value: Any) -> Any:
    return value


def raise_(error: BaseException | type[BaseException]) -> NoReturn:
    raise error


def make(kind: Callable[..., Any], *args: Any) -> Any:
    return kind(*args)


class Node:
    """An object that can be weakly referenced."""

    def method(self, value: int) -> tuple[str, int]:
        return type(self).__name__, value

    @classmethod
    def named(cls, value: int) -> tuple[str, int]:
        return cls.__name__, value


# -------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((1,), {}), (("abc", 2.5), {"x": None}), (({"a": [1]}, {1, 2}), {}), ((len,), {})],
)
def test_arguments_and_results_travel(
    pair: Pair, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    assert pair.call(echo, *args, **kwargs) == (args, kwargs)


def adder(base: int) -> Callable[[int], int]:
    return lambda x: base + x


@pytest.mark.parametrize(
    ("fn", "arg", "expected"),
    [
        (abs, -1, 1),
        (str.upper, "a", "A"),
        (int, "3", 3),
        ([1, 1, 2].count, 1, 2),
        (partial(max, 5), 3, 5),
        (adder(5), 1, 6),
        (Node().method, 1, ("Node", 1)),
        (Node.named, 1, ("Node", 1)),
        (partial(partial(adder(1))), 1, 2),
    ],
)
def test_callables_of_all_kinds_travel(
    pair: Pair, fn: Callable[..., Any], arg: Any, expected: Any
) -> None:
    for _ in range(3):
        assert pair.call(fn, arg) == expected


def test_the_same_function_has_the_same_id(pair: Pair) -> None:
    calls = [pair.pickler.dump_call(fn, (), {}) for fn in (echo, echo, adder(1), adder(1))]
    assert calls[0].shared.key == calls[1].shared.key != calls[2].shared.key
    assert calls[2].shared.key == calls[3].shared.key
    assert {len(call.shared.key) for call in calls} == {16}


def test_a_callable_instance_is_not_cached(pair: Pair) -> None:
    class Adder:
        base = 1

        def __call__(self, x: int) -> int:
            return self.base + x

    fn = Adder()
    assert [pair.call(fn, 1) for _ in range(3)] == [2, 2, 2]
    fn.base = 10
    assert pair.call(fn, 1) == 11
    Adder.base = 20
    del fn.base
    assert pair.call(fn, 1) == 21


def test_a_forgotten_function_is_let_go(pair: Pair) -> None:
    call = pair.pickler.dump_call(adder(1), (1,), {})
    assert pair.run(call).ok
    pair.runner.forget(call.shared.key)
    pair.runner.forget(b"never there")
    outcome = pair.runner.run(call.shared.key, call.data, call.buffers)
    with pytest.raises(SerializationError, match="cannot be unpickled in the worker"):
        pair.pickler.load_outcome(outcome)


# ----------------------------------------------------------------------- failures


class Unfriendly:
    """Does something at one stage of its way."""

    def __init__(self, on_pickle: Any = None, on_unpickle: Any = None) -> None:
        self.on_pickle = on_pickle
        self.on_unpickle = on_unpickle

    def __reduce__(self) -> Any:
        if self.on_pickle is not None:
            raise self.on_pickle
        return raise_, (self.on_unpickle,)


class ClosedError(Exception):
    """Cannot be unpickled: its arguments are not those of __new__."""

    def __new__(cls, code: int, why: str) -> ClosedError:
        return super().__new__(cls, code, why)

    def __init__(self, code: int, why: str) -> None:
        super().__init__(f"{code}: {why}")


class LockedError(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("locked")
        self.lock = threading.Lock()


class FalseError(Exception):
    def __bool__(self) -> bool:
        return False


class SpeechlessError(Exception):
    def __str__(self) -> str:
        sys.exit("no words")


ERRORS = [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), RecursionError(), MemoryError()]


@pytest.mark.parametrize("error", [*ERRORS, ValueError(1), FalseError()], ids=repr)
def test_what_a_task_raises_is_its_result(pair: Pair, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        pair.call(raise_, error)
    cause = caught.value.__cause__
    assert type(cause).__name__ == "_RemoteTraceback"
    text = str(cause)
    assert text.startswith('\n"""\nTraceback (most recent call last):\n  File "')
    assert "in raise_" in text.splitlines()[3]
    assert text.endswith('"""')


@pytest.mark.parametrize("error", [*ERRORS, ValueError("bad")], ids=repr)
def test_what_unpickling_an_argument_raises_is_the_cause(pair: Pair, error: BaseException) -> None:
    with pytest.raises(SerializationError, match="unpickled in the worker") as caught:
        pair.call(first, Unfriendly(on_unpickle=error))
    assert type(caught.value.__cause__) is type(error)


@pytest.mark.parametrize("error", [ValueError("bad"), RecursionError(), MemoryError()], ids=repr)
def test_what_pickling_a_result_raises_is_the_cause(pair: Pair, error: BaseException) -> None:
    with pytest.raises(SerializationError, match="result cannot be pickled") as caught:
        pair.call(make, Unfriendly, error)
    assert type(caught.value.__cause__) is type(error)
    assert pair.call(first, 1) == 1


@pytest.mark.parametrize("error", ERRORS[:3], ids=repr)
def test_an_exit_while_a_result_is_pickled_is_the_result(pair: Pair, error: BaseException) -> None:
    with pytest.raises(type(error)):
        pair.call(make, Unfriendly, error)


@pytest.mark.parametrize("error", [*ERRORS, ValueError("bad")], ids=repr)
def test_what_unpickling_a_result_raises_is_the_cause(pair: Pair, error: BaseException) -> None:
    with pytest.raises(SerializationError, match="result cannot be unpickled") as caught:
        pair.call(make, Unfriendly, None, error)
    assert type(caught.value.__cause__) is type(error)


def test_an_exception_that_cannot_be_unpickled(pair: Pair) -> None:
    with pytest.raises(SerializationError, match="in raise_") as caught:
        pair.call(make, lambda: raise_(ClosedError(4, "shut")))
    assert isinstance(caught.value.__cause__, TypeError)
    assert "4: shut" in str(caught.value)


def test_an_exception_that_cannot_be_pickled(pair: Pair) -> None:
    with pytest.raises(SerializationError, match="LockedError: locked") as caught:
        pair.call(lambda: raise_(LockedError()))
    assert type(caught.value.__cause__).__name__ == "_RemoteTraceback"
    assert "in raise_" in str(caught.value)


def test_an_exception_that_cannot_be_printed(pair: Pair) -> None:
    with pytest.raises(SpeechlessError):
        pair.call(raise_, SpeechlessError)


def test_an_exception_that_unpickles_to_something_else(pair: Pair) -> None:
    class OddError(Exception):
        def __reduce__(self) -> Any:
            return str, ("not an exception",)

    with pytest.raises(SerializationError, match="unpickling made"):
        pair.call(raise_, OddError)


def deep(levels: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


@pytest.fixture
def unpicklable(tmp_path: Path) -> Iterator[dict[str, Any]]:
    with (tmp_path / "file").open("w") as file:
        yield {
            "lock": threading.Lock(),
            "generator": iter(x for x in range(3)),
            "file": file,
            "exit": Unfriendly(on_pickle=SystemExit(1)),
            "recursion": deep(100_000),
        }


@pytest.mark.parametrize("kind", ["lock", "generator", "file", "exit", "recursion"])
def test_what_cannot_be_sent_is_named(pair: Pair, unpicklable: dict[str, Any], kind: str) -> None:
    bad = unpicklable[kind]
    cases: list[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
        (r"echo\(\).*argument 2 \(of type", echo, (1, bad), {}),
        (r"echo\(\).*argument 'key' \(of type", echo, (1,), {"key": [bad]}),
        (r"<lambda>\(\).*the function itself cannot", lambda: bad, (), {}),
        (r"partial\(\).*the function itself cannot", partial(echo, bad), (), {}),
    ]
    for pattern, fn, args, kwargs in cases:
        with pytest.raises(SerializationError, match=pattern) as caught:
            pair.pickler.dump_call(fn, args, kwargs)
        assert "make it in the task" in str(caught.value)
        assert caught.value.__cause__ is not None
        assert caught.value.__cause__.__traceback__ is None
        assert pair.call(echo, 1) == ((1,), {})


def test_the_object_of_a_method_is_named(pair: Pair) -> None:
    class Locked:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def method(self, value: int) -> None: ...

    with pytest.raises(SerializationError, match="the object it is a method of cannot be pickled"):
        pair.call(Locked().method, 1)


def test_ctrl_c_while_pickling_is_not_swallowed(pair: Pair) -> None:
    with pytest.raises(KeyboardInterrupt):
        pair.pickler.dump_call(echo, (Unfriendly(on_pickle=KeyboardInterrupt()),), {})


def test_garbage_is_an_outcome(pair: Pair) -> None:
    call = pair.pickler.dump_call(echo, (1,), {})
    for function, data in ((b"nonsense", call.data), (call.shared.data, b""), (b"", b"")):
        pair.runner.load_function(b"id", function)
        outcome = pair.runner.run(b"id", data, [])
        with pytest.raises(SerializationError):
            pair.pickler.load_outcome(outcome)


# ------------------------------------------------------------------------ buffers

BIG = OUT_OF_BAND // 8


def total(array: Any) -> Any:
    return array.sum()


@pytest.mark.parametrize(
    ("array", "count"),
    [
        (np.arange(BIG), 1),
        (np.arange(BIG - 1), 0),
        (np.asfortranarray(np.arange(BIG * 2).reshape(2, BIG)), 1),
        (np.arange(BIG * 2)[::2], 0),
        (np.zeros((0, 5)), 0),
        (np.array(3.5), 0),
        (np.array([{"a": 1}, None], dtype=object), 0),
        (np.zeros(BIG, dtype=[("a", "i4"), ("b", "f8")]), 1),
    ],
    ids=["big", "small", "fortran", "strided", "empty", "0-d", "object", "structured"],
)
def test_big_buffers_travel_beside_the_data(pair: Pair, array: Any, count: int) -> None:
    call = pair.pickler.dump_call(first, (array,), {})
    assert len(call.buffers) == count + (not call.data)  # a big pickle is a buffer too
    assert all(view.nbytes >= OUT_OF_BAND for view in call.buffers)
    outcome = pair.run(call)
    result = pair.pickler.load_outcome(outcome)
    np.testing.assert_array_equal(result, array)
    assert result.dtype == array.dtype
    assert result.flags.f_contiguous == array.flags.f_contiguous or not array.flags.contiguous


def test_buffers_nest_and_keep_their_order(pair: Pair) -> None:
    arrays = {"a": [np.full(BIG, 1)], "b": (np.full(BIG, 2), np.full(3, 3))}
    call = pair.pickler.dump_call(first, (arrays,), {})
    assert len(call.buffers) == 2
    result = pair.pickler.load_outcome(pair.run(call))
    assert [result["a"][0][0], result["b"][0][0], result["b"][1][0]] == [1, 2, 3]


def test_arguments_are_what_they_were_at_submit(pair: Pair) -> None:
    array = np.ones(BIG)
    call = pair.pickler.dump_call(total, (array,), {})
    array[:] = 2
    assert pair.pickler.load_outcome(pair.run(call)) == BIG


def add_one(array: Any) -> Any:
    array += 1
    return array


def test_arrays_are_writable_and_isolated(pair: Pair) -> None:
    array = np.zeros(BIG)
    result = pair.call(add_one, array)
    result += 1
    assert (array[0], result[0]) == (0, 2)


def test_memory_that_nobody_can_change_is_not_copied(pair: Pair) -> None:
    array = np.frombuffer(bytes(BIG * 8))
    call = pair.pickler.dump_call(first, (array,), {})
    assert np.shares_memory(np.frombuffer(call.buffers[0]), array)
    result = pair.pickler.load_outcome(pair.run(call))
    assert result.flags.writeable
    assert (result == array).all()


def test_writable_memory_is_used_in_place(pair: Pair) -> None:
    call = pair.pickler.dump_call(first, (np.zeros(OUT_OF_BAND // 8),), {})
    memory = bytearray(call.buffers[0])
    pair.runner.load_function(call.shared.key, call.shared.data)
    outcome = pair.runner.run(call.shared.key, call.data, [memory])
    memory[0] = 255
    assert outcome.buffers[0][0] == 255


def test_a_pickler_is_not_kept_that_has_met_many_objects(pair: Pair) -> None:
    # Its table of what it has met would be cleared at each later call, in 0.7 ms for these.
    many = list(map(str, range(100_000)))
    assert pair.call(first, many) == many
    assert pair.pickler._spare == []
    assert pair.runner._spare == []
    few = [1.5, {"a": (2, "b")}]
    for _ in range(3):
        assert pair.call(first, few) == few
        assert len(pair.pickler._spare) == 1
        assert len(pair.runner._spare) == 1


# --------------------------------------------------------------------- references


@pytest.mark.parametrize("fn", [first, adder(1).__class__ and (lambda value: value)])
def test_nothing_is_kept_alive(pair: Pair, fn: Callable[[Any], Any]) -> None:
    node = Node()
    ref = weakref.ref(node)
    call = pair.pickler.dump_call(fn, (node,), {})
    del node
    assert ref() is None
    outcome = pair.run(call)
    result = pair.pickler.load_outcome(outcome)
    ref = weakref.ref(result)
    del result
    assert ref() is None


KEPT: list[weakref.ref[Node]] = []
LAST: list[BaseException] = []


def fail(error: BaseException) -> NoReturn:
    node = Node()
    KEPT.append(weakref.ref(node))
    LAST.append(error)
    raise error


def returns(kind: Callable[[], Any]) -> Any:
    node = kind()
    KEPT.append(weakref.ref(node))
    return node


def test_a_run_keeps_nothing_alive(pair: Pair) -> None:
    KEPT.clear()
    pair.outcome(returns, Node)
    outcome = pair.outcome(fail, ValueError())  # the task keeps its exception
    assert not outcome.ok
    assert [ref() for ref in KEPT] == [None, None]
    LAST.clear()


def test_a_failed_dump_keeps_nothing_alive(pair: Pair) -> None:
    node = Node()
    ref = weakref.ref(node)
    errors = []
    try:
        pair.pickler.dump_call(echo, (node, threading.Lock()), {})
    except SerializationError as error:
        errors.append(error.with_traceback(None))
    del node
    assert ref() is None


def test_functions_die_and_leave_nothing(pair: Pair) -> None:
    gc.disable()
    try:
        for i in range(50):
            fn = adder(i)
            for _ in range(3):
                pair.call(fn, 1)
            ref = weakref.ref(fn)
            del fn
            assert ref() is None
    finally:
        gc.enable()
    assert not pair.pickler._definitions._known


def recursive() -> Callable[[int], int]:
    def factorial(n: int) -> int:
        return 1 if n < 2 else n * factorial(n - 1)

    return factorial


def test_recursive_closures_die_too(pair: Pair) -> None:
    fn = recursive()
    assert [pair.call(fn, 5) for _ in range(3)] == [120] * 3
    ref = weakref.ref(fn)
    del fn
    gc.collect()
    assert ref() is None


def test_cells_stay_shared(pair: Pair) -> None:
    def counter() -> tuple[Callable[[], int], Callable[[], int]]:
        n = 0

        def increment() -> int:
            nonlocal n
            n += 1
            return n

        return increment, lambda: n

    def both(functions: tuple[Callable[[], int], Callable[[], int]]) -> int:
        increment, read = functions
        increment()
        return read()

    assert pair.call(both, counter()) == 1


# ------------------------------------------------------------------------ threads


class Submits:
    """Pickles a call while it is pickled."""

    def __init__(self, pickler: CallPickler) -> None:
        self.pickler = pickler

    def __reduce__(self) -> Any:
        call = self.pickler.dump_call(first, ([3],), {})
        return first, (call.shared.key,)


def test_pickling_may_pickle(pair: Pair) -> None:
    result = pair.call(echo, [1], Submits(pair.pickler), [2])
    assert (result[0][0], result[0][2]) == ([1], [2])


def test_many_threads_dump_at_once(pair: Pair) -> None:
    calls: list[list[tuple[int, Call]]] = [[] for _ in range(8)]
    shared = adder(1000)

    def work(into: list[tuple[int, Call]], start: int) -> None:
        for i in range(start, start + 200):
            into.append((i + i, pair.pickler.dump_call(adder(i), (i,), {})))
            into.append((1000 + i, pair.pickler.dump_call(shared, (i,), {})))
            into.append((i, pair.pickler.dump_call(first, (i,), {})))

    threads = [threading.Thread(target=work, args=(into, n * 1000)) for n, into in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, call in (pairs for into in calls for pairs in into):
        assert pair.pickler.load_outcome(pair.run(call)) == expected


# ------------------------------------------------------- functions of other modules

HELPER = """
LIMIT = 1
def f(): return LIMIT
def make():
    seen = []
    def g():
        global LIMIT
        LIMIT += 1
        return LIMIT
    return g
class Thing:
    @classmethod
    def create(cls): return cls
    def make(self): return lambda: __class__
"""


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "zmq_helper.py").write_text(HELPER)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("zmq_helper")
    del sys.modules["zmq_helper"]


def test_an_importable_function_is_its_name(pair: Pair, helper: Any) -> None:
    call = pair.pickler.dump_call(helper.f, (), {})
    assert len(call.shared.data) < 100
    assert pair.pickler.dump_call(helper.f, (), {}).shared.key == call.shared.key


def test_an_importable_function_whose_name_leads_elsewhere(pair: Pair, helper: Any) -> None:
    old = helper.f
    assert [pair.call(old) for _ in range(3)] == [1, 1, 1]
    helper.f = lambda: 2
    assert pair.call(old) == 1
    assert pair.call(helper.f) == 2
    helper.f = old
    assert pair.call(old) == 1


def test_a_local_function_of_a_module_uses_the_modules_globals(pair: Pair, helper: Any) -> None:
    fn = helper.make()
    assert [pair.call(fn), pair.call(fn), helper.LIMIT] == [2, 3, 3]


def test_methods_of_an_importable_class(pair: Pair, helper: Any) -> None:
    assert pair.call(helper.Thing.create) is helper.Thing
    assert pair.call(helper.Thing().make()) is helper.Thing


def test_multiprocessings_reducers_are_asked_last(pair: Pair) -> None:
    from multiprocessing.reduction import ForkingPickler

    class Special:
        pass

    ForkingPickler.register(Special, lambda _: (str, ("reduced",)))
    assert pair.call(first, Special()) == "reduced"
    assert pair.call(first, Node().method)(1) == ("Node", 1)


def test_results_do_not_change_a_class_that_is_known(pair: Pair) -> None:
    class Local:
        n = 0

    def change(cls: type[Local]) -> Local:
        return cls()

    outcome = pair.outcome(change, Local)
    Local.n = 5
    result = pair.pickler.load_outcome(outcome)
    assert type(result) is Local
    assert Local.n == 5


# ---------------------------------------------------------------- scripts, for real

HARNESS = '''
"""A worker in a process of its own, over pipes, as the real one would do it."""
import os, pickle, struct, subprocess, sys
from zmqexecutor.payload.serialization import CallPickler, CallRunner, Outcome

class Worker:
    def __init__(self):
        self.pickler = CallPickler()
        self.sent = set()
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import harness; harness.serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
    def call(self, fn, *args, **kwargs):
        return self.send(self.pickler.dump_call(fn, args, kwargs))
    def send(self, call):
        function = None if call.shared.key in self.sent else call.shared.data
        self.sent.add(call.shared.key)
        buffers = [bytes(view) for view in call.buffers]
        put(self.process.stdin, (call.shared.key, function, call.data, buffers))
        return self.pickler.load_outcome(Outcome(*get(self.process.stdout)))
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

def put(file, obj):
    data = pickle.dumps(obj)
    file.write(struct.pack("q", len(data)) + data)
    file.flush()

def get(file):
    head = file.read(8)
    if not head:
        raise EOFError
    return pickle.loads(file.read(struct.unpack("q", head)[0]))

def serve():
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    runner = CallRunner()
    while True:
        try:
            function_id, function, data, buffers = get(requests)
        except EOFError:
            return
        if function is not None:
            runner.load_function(function_id, function)
        outcome = runner.run(function_id, data, buffers)
        put(answers, (outcome.ok, outcome.data, [bytes(view) for view in outcome.buffers]))
'''

Script = Callable[[str], None]


def python_path(directory: Path) -> str:
    return os.pathsep.join(filter(None, (str(directory), os.environ.get("PYTHONPATH"))))


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Run a program that has `w`, a worker in another process; it must end well."""
    (tmp_path / "harness.py").write_text(HARNESS)

    def run(text: str) -> None:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(text))
        environ = dict(os.environ, PYTHONPATH=python_path(tmp_path))
        done = subprocess.run(
            [sys.executable, str(path)],
            env=environ,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert (done.stderr, done.stdout) == ("", "")

    return run


def test_globals_are_shared_and_live_on(script: Script) -> None:
    script("""
        from harness import Worker
        model, count, limit, connection = None, 0, 1, None
        def initialize(value):
            global model
            model = value
        def task():
            return model
        def increment():
            global count
            count += 1
            return count, limit
        def connect():
            global connection
            if connection is None:
                connection = object()
            return id(connection), limit
        def dynamic():
            globals()["late"] = 7
        late = None
        with Worker() as w:
            w.call(initialize, "loaded")
            assert w.call(task) == "loaded"
            assert [w.call(increment) for _ in range(3)] == [(1, 1), (2, 1), (3, 1)]
            first, _ = w.call(connect)
            limit = 2
            assert w.call(increment) == (4, 2)
            assert w.call(connect) == (first, 2)
            count = 10
            assert w.call(increment) == (11, 2)
            assert w.call(connect) == (first, 2)
            assert w.call(task) == "loaded"
            w.call(dynamic)
            assert w.call(lambda: late) == 7
            late = 8
            assert w.call(lambda: late) == 8
            assert (model, count, connection) == (None, 10, None)
    """)


@pytest.mark.parametrize(
    "body",
    [
        """
        def g():
            current.n += 1
            return counter.n, current is counter
        assert [w.call(lambda: counter.n) for _ in range(3)] == [0, 0, 0]
        current = counter
        assert [w.call(g) for _ in range(3)] == [(1, True), (2, True), (3, True)]
        """,
        """
        def make():
            def inner(): pass
            inner.n = 0
            return inner
        named = make()
        assert [w.call(lambda: named.n) for _ in range(3)] == [0, 0, 0]
        def g():
            current.n += 1
            return named.n, current is named
        current = named
        assert [w.call(g) for _ in range(3)] == [(1, True), (2, True), (3, True)]
        """,
        """
        parent, child = Counter(), Counter()
        child.up, parent.down = parent, child
        def f():
            return parent.down is child
        def g():
            return current.down is child, current is parent, child.up is current
        assert [w.call(f) for _ in range(3)] == [True] * 3
        current = parent
        assert [w.call(g) for _ in range(3)] == [(True, True, True)] * 3
        """,
        """
        holder = Counter()
        holder.held = counter
        def both():
            counter.n += 1
            return holder.held.n, holder.held is counter
        def only():
            return counter.tag
        counter.tag = "a"
        assert w.call(both) == (1, True)
        counter.tag = "b"
        assert w.call(only) == "b"
        counter.tag = "a"
        assert [w.call(both) for _ in range(3)] == [(1, True), (2, True), (3, True)]
        """,
        """
        class Base:
            shared = counter
        class A(Base): pass
        holder = Base()
        def bump():
            holder.n = getattr(holder, "n", 0) + 1
            return holder.n, A().shared is counter
        assert w.call(bump) == (1, True)
        counter.tag = "other"
        assert w.call(lambda: counter.tag) == "other"
        assert w.call(bump) == (2, True)
        """,
        """
        task = lambda: counter.flag
        Counter.flag = 1
        assert w.call(task) == 1
        saved = Counter
        del Counter
        saved.flag = 2
        assert w.call(task) == 2
        Counter = saved
        Counter.flag = 1
        assert [w.call(task) for _ in range(3)] == [1, 1, 1]
        """,
        """
        for cls in (Counter,):
            cls.flag = 2
            assert w.call(lambda: (cls.flag, Counter.flag)) == (2, 2)
        Counter.flag = 1
        del cls
        assert w.call(lambda: Counter.flag) == 1
        """,
    ],
    ids=["alias", "function", "cycle", "there and back", "class", "nameless", "renamed"],
)
def test_other_names_of_what_was_sent(script: Script, body: str) -> None:
    script(
        "from harness import Worker\n"
        "class Counter: n = 0\n"
        "current, counter = None, Counter()\n"
        "with Worker() as w:\n" + textwrap.indent(textwrap.dedent(body), "    ")
    )


def test_a_callable_that_is_dropped_is_not_kept(script: Script) -> None:
    script("""
        import functools, gc, weakref
        from harness import Worker
        class Call:
            def __init__(self, items):
                self.items = items
                self.size = lambda: len(self.items)
                self.me = self
            def __call__(self):
                return len(self.items)
        class Held: pass
        def of_partial(items):
            return functools.partial(len, items)
        def of_closure(items):
            return lambda: len(items)
        def of_instance(items):
            return Call(items)
        def of_attribute(items):
            return Call(items).size
        def check(w, make):
            items = [[n] for n in range(100)]
            held = Held()
            items.append(held)
            task = make(items)
            assert [w.call(task) for _ in range(4)] == [101] * 4
            items.append(0)
            assert w.call(task) == 102
            return weakref.ref(held)
        with Worker() as w:
            for make in (of_partial, of_closure, of_instance, of_attribute):
                ref = check(w, make)
                gc.collect()
                assert ref() is None, make
    """)


def test_changes_of_large_containers_are_seen(script: Script) -> None:
    script("""
        from zmqexecutor import ZmqExecutor
        table = {f"word{n}": n for n in range(5000)}
        items = [str(n) for n in range(5000)]
        members = set(range(5000))
        pairs = {n: (n, str(n)) for n in range(5000)}
        mixed = [[n] for n in range(100)]
        frozen = tuple(range(5000))
        def look():
            values = table["word1"], items[1], 1 in members, pairs[1], mixed[1], frozen[-1]
            return values, list(table)[-1], len(items)
        changes = [
            lambda: table.update(word1=True),
            lambda: table.update(word1=1.0),
            lambda: table.update(word1=1),
            lambda: table.update(word1=table.pop("word1")),
            lambda: items.__setitem__(1, "other"),
            lambda: items.append("last"),
            lambda: items.pop(),
            lambda: members.discard(1),
            lambda: members.add(1),
            lambda: pairs.update({1: (1, True)}),
            lambda: pairs.update({1: [1]}),
            lambda: pairs[1].append(2),
            lambda: mixed[1].append(2),
            lambda: globals().update(frozen=frozen + (1,)),
        ]
        with ZmqExecutor(1) as executor:
            for change in [lambda: None, *changes]:
                change()
                for _ in range(3):
                    seen = executor.submit(look).result()
                    assert (repr(seen), seen) == (repr(look()), look())
    """)


def test_a_dictionary_that_is_filled_meanwhile(script: Script) -> None:
    script("""
        import threading
        from zmqexecutor import ZmqExecutor
        class Item: pass
        table = {}
        members = set()
        def look():
            return len(table), len(members)
        go_on = threading.Event()
        def fill():
            while not go_on.is_set():
                number = len(table)
                table[number] = Item()
                members.add(Item())
                if number > 20_000:
                    table.clear()
                    members.clear()
        with ZmqExecutor(1) as executor:
            filler = threading.Thread(target=fill)
            filler.start()
            try:
                for _ in range(30):
                    sizes = executor.submit(look).result()
                    assert all(0 <= size < 25_000 for size in sizes)
            finally:
                go_on.set()
                filler.join()
    """)


def test_a_call_sees_what_was_when_it_was_made(script: Script) -> None:
    script("""
        from harness import Worker
        x = 1
        def f():
            return x
        with Worker() as w:
            old = w.pickler.dump_call(f, (), {})
            x = 2
            new = w.pickler.dump_call(f, (), {})
            assert [w.send(call) for call in (new, old, new, old)] == [2, 1, 2, 1]
            del x
            try:
                w.call(f)
            except NameError:
                pass
            else:
                raise AssertionError
            len = lambda _: "mine"
            def g():
                return len([])
            assert w.call(g) == "mine"
            del len
            assert w.call(g) == 0
    """)


CLASSES = """
    import abc, collections, dataclasses, datetime, enum, typing
    from harness import Worker
    T = typing.TypeVar("T")
    class Plain:
        n = 0
        def bump(self):
            type(self).n += 1
            Plain.seen = True
            return self.n, self
    @dataclasses.dataclass
    class Point:
        x: int
        y: int = 2
        def double(self):
            return Point(self.x * 2, self.y)
    @dataclasses.dataclass(frozen=True, order=True)
    class Box(typing.Generic[T]):
        value: T
    @dataclasses.dataclass(slots=True)
    class Slotted:
        a: "list[Slotted]"
    class Slots:
        __slots__ = ("a", "__weakref__")
        def __init__(self, a):
            self.a = a
        def __eq__(self, other):
            return type(self) is type(other) and self.a == other.a
    class Color(enum.Enum):
        RED = 1
        BLUE = "b"
        def other(self):
            return Color.BLUE if self is Color.RED else Color.RED
    class Bits(enum.Flag):
        A = enum.auto()
        B = enum.auto()
    class Level(enum.IntEnum):
        LOW = 1
    class Planet(enum.Enum):
        EARTH = (5.976e24, 6.37814e6)
        PLANET_A = EARTH
        def __init__(self, mass, radius):
            self.mass, self.radius = mass, radius
        @property
        def density(self):
            return self.mass / self.radius**3
    class Scaled(int, enum.Enum):
        def __new__(cls, value):
            obj = int.__new__(cls, value * 10)
            obj._value_ = value
            return obj
        ONE = 1
    class Axis(bytes, enum.Enum):
        def __new__(cls, value, label):
            obj = bytes.__new__(cls, [value])
            obj._value_, obj.label = value, label
            return obj
        X = (0, "x")
        Y = (1, "y")
    class Numbered(enum.Enum):
        def __new__(cls):
            obj = object.__new__(cls)
            obj._value_ = len(cls.__members__) + 1
            return obj
        FIRST = ()
        SECOND = ()
    class Perm(enum.IntFlag):
        R = 4
        W = 2
        X = 1
        RWX = 7
    class Unhashable(enum.Enum):
        A = [1]
    class Day(datetime.date, enum.Enum):
        FIRST = (2026, 1, 1)
    @dataclasses.dataclass
    class Size:
        width: int
        height: int = 1
    class Paper(Size, enum.Enum):
        A4 = (210, 297)
    class Odd(enum.Enum):
        name = 1
        other = 2
    Pair = collections.namedtuple("Pair", "a b")
    class Named(typing.NamedTuple):
        a: int
        def twice(self):
            return self._replace(a=self.a * 2)
    class Typed(typing.TypedDict):
        a: int
    class Proto(typing.Protocol):
        def go(self): ...
    class Base(abc.ABC):
        @abc.abstractmethod
        def go(self):
            return "base"
    class Derived(Base):
        def __init__(self):
            super().__init__()
            self.k = 1
        def go(self):
            return super().go(), self.k, __class__
    class Registered: pass
    Base.register(Registered)
    class Meta(type):
        made = []
        def __new__(mcls, name, bases, body, *, options):
            cls = super().__new__(mcls, name, bases, body)
            cls.options = options
            mcls.made.append(name)
            return cls
        def __init__(cls, name, bases, body, **options):
            super().__init__(name, bases, body)
        def __getitem__(cls, item):
            return cls, item
    class Made(metaclass=Meta, options=1): pass
    class Hooked:
        subclasses = []
        def __init_subclass__(cls, /, key, **rest):
            super().__init_subclass__(**rest)
            cls.key = key
            Hooked.subclasses.append(cls)
    class A1(Hooked, key=1): pass
    class A2(A1, key=2): pass
    class Outer:
        class Inner:
            class Core: pass
        @staticmethod
        def static(): return Outer.Inner
        @classmethod
        def create(cls): return cls()
        @property
        def prop(self): return self.Inner.Core()
        square = lambda self, x: x * x
    class Tree:
        def __init__(self, *children): self.children = children
        def depth(self): return 1 + max((c.depth() for c in self.children), default=0)
    class Callable_:
        def __init__(self, n): self.n = n
        def __call__(self, x): return self.n + x, self
    class MyDict(dict): pass
    class MyError(Exception): pass
    class ApiError(Exception):
        def __init__(self, code, message=""):
            super().__init__(f"{code}: {message}")
            self.code = code
    class NamedError(Exception):
        def __init__(self, *, reason):
            super().__init__(reason)
    class PathError(OSError):
        def __init__(self, path):
            super().__init__(2, "not there", path)
            self.path = path
    class CodeExit(SystemExit):
        def __init__(self, code, reason):
            super().__init__(code)
            self.reason = reason
    class WithState:
        def __init__(self): self.a = 1
        def __getstate__(self): return {"a": self.a + 1}
        def __setstate__(self, state): self.__dict__.update(state, set=True)
    class Descriptor:
        def __set_name__(self, owner, name): self.name = "_" + name
        def __get__(self, obj, owner=None): return getattr(obj, self.name)
        def __set__(self, obj, value): setattr(obj, self.name, value)
    class Described:
        field = Descriptor()
"""


@pytest.mark.parametrize(
    "body",
    [
        """
        p = Plain()
        assert w.call(p.bump)[0] == 1
        n, back = w.call(p.bump)
        assert (n, type(back), Plain.n, hasattr(Plain, "seen")) == (2, Plain, 0, False)
        assert w.call(lambda x: (isinstance(x, Plain), x.n), back) == (True, 2)
        Plain.n = 100
        assert w.call(p.bump)[0] == 101
        """,
        """
        assert w.call(Point.double, Point(3)) == Point(6)
        assert w.call(Point(3).double) == Point(6)
        assert w.call(Point, 3) == Point(3)
        assert w.call(lambda: (Box(1), Box[int], Box("a") < Box("b"))) == (Box(1), Box[int], True)
        assert w.call(lambda s: Slotted([s]), Slotted([])) == Slotted([Slotted([])])
        assert w.call(lambda s: Slots(s), Slots(1)) == Slots(Slots(1))
        """,
        """
        assert w.call(lambda c: c.other(), Color.RED) is Color.BLUE
        assert w.call(Color.RED.other) is Color.BLUE
        assert w.call(lambda: [Color("b"), Color["RED"], *Color]) == [Color.BLUE, Color.RED, *Color]
        assert w.call(lambda b: b | Bits.B, Bits.A) == Bits.A | Bits.B
        assert w.call(lambda x: x + 1, Level.LOW) == 2
        assert w.call(lambda: {Color.RED: Level.LOW}) == {Color.RED: Level.LOW}
        """,
        """
        earth = w.call(lambda p: (p.mass, p.density, p.value, p.name), Planet.EARTH)
        assert earth == (5.976e24, Planet.EARTH.density, (5.976e24, 6.37814e6), "EARTH")
        assert w.call(lambda: (Planet["PLANET_A"], list(Planet.__members__), len(Planet))) == (
            Planet.EARTH, ["EARTH", "PLANET_A"], 1
        )
        assert w.call(lambda: (int(Scaled.ONE), Scaled.ONE.value, Scaled(1).name)) == (10, 1, "ONE")
        assert w.call(lambda: [(bytes(a), a.value, a.label) for a in Axis]) == [
            (bytes([0]), 0, "x"), (bytes([1]), 1, "y")
        ]
        assert w.call(lambda: [(n.value, n) for n in Numbered]) == [
            (1, Numbered.FIRST), (2, Numbered.SECOND)
        ]
        assert w.call(lambda: (Perm(7).name, str(Perm(3)), ~Perm.R)) == (
            "RWX", str(Perm(3)), ~Perm.R
        )
        assert w.call(lambda: (list(Perm), list(Perm.__members__))) == (
            list(Perm), ["R", "W", "X", "RWX"]
        )
        assert w.call(lambda: Unhashable([1])) is Unhashable.A
        assert w.call(lambda d: (d.year, Day(d.value) is d), Day.FIRST) == (2026, True)
        assert w.call(lambda: (Paper.A4.width, Paper.A4.height)) == (210, 297)
        assert w.call(lambda: (Odd.other.name, Odd.other.value)) == ("other", 2)
        Planet.EARTH.moons = 1
        assert w.call(lambda: Planet.EARTH.moons) == 1
        Planet.EARTH.moons = 2
        assert w.call(lambda: Planet.EARTH.moons) == 2
        def local():
            class Shape(enum.Enum):
                ROUND = "r"
                def __init__(self, letter):
                    self.letter = letter
            return Shape.ROUND
        assert w.call(local).letter == "r"
        """,
        """
        assert w.call(lambda p: Pair(p.b, Named(1)), Pair(1, 2)) == Pair(2, Named(1))
        assert type(w.call(lambda: Pair(1, 2))) is Pair
        assert w.call(Named(2).twice) == Named(4)
        assert w.call(lambda: Typed(a=1)) == {"a": 1}
        assert w.call(lambda: Typed) is Typed
        assert w.call(lambda: Proto) is Proto
        """,
        """
        assert w.call(Derived().go) == ("base", 1, Derived)
        assert w.call(lambda x: isinstance(x, Base), Registered())
        def fails():
            return Base()
        try:
            w.call(fails)
        except TypeError as error:
            assert "abstract" in str(error)
        """,
        """
        assert w.call(lambda: (Made, Made[1], Meta.made, Made.options)) == (
            Made, (Made, 1), ["Made"], 1
        )
        assert w.call(lambda: [c.__name__ for c in Hooked.subclasses]) == ["A1", "A2"]
        assert w.call(lambda: (A2.key, A2.__mro__)) == (2, A2.__mro__)
        assert w.call(lambda x: type(x).key, A1()) == 1
        def there():
            class A4(A2, key=4): pass
            return A4()
        back = w.call(there)
        assert isinstance(back, A2) and type(back).key == 4 and Hooked.subclasses == [A1, A2]
        def more():
            class A3(A2, key=3): pass
            return [c.__name__ for c in Hooked.subclasses], A3.key
        assert w.call(more) == (["A1", "A2", "A4", "A3"], 3)
        assert Hooked.subclasses == [A1, A2]
        """,
        """
        assert w.call(Outer.static) is Outer.Inner
        assert type(w.call(Outer.create)) is Outer
        assert type(w.call(lambda o: o.prop, Outer())) is Outer.Inner.Core
        assert w.call(lambda o: type(o) is Outer.Inner.Core, Outer.Inner.Core())
        assert w.call(Outer().square, 3) == 9
        assert w.call(Tree(Tree(), Tree(Tree())).depth) == 3
        assert w.call(Callable_(1), 2)[0] == 3
        assert type(w.call(Callable_(1), 2)[1]) is Callable_
        """,
        """
        back = w.call(lambda d: (d, MyDict(b=d)), MyDict(a=1))
        assert [type(x) for x in back] == [MyDict, MyDict] and back[1] == {"b": {"a": 1}}
        assert vars(w.call(lambda x: x, WithState())) == {"a": 3, "set": True}
        def describe():
            d = Described()
            d.field = 3
            return d
        assert w.call(describe).field == 3
        """,
        """
        def boom():
            try:
                raise MyError("inner")
            except MyError:
                raise MyError("outer", Point(1))
        try:
            w.call(boom)
        except MyError as error:
            assert error.args == ("outer", Point(1))
            text = str(error.__cause__)
            assert "inner" in text and "During handling" in text
            assert "in boom" in text.splitlines()[3], text
        else:
            raise AssertionError
        def fails(kind, *args, **kwargs):
            raise kind(*args, **kwargs)
        for kind, args, kwargs in (
            (ApiError, (503, "busy"), {}),
            (NamedError, (), {"reason": "busy"}),
            (PathError, ("/x",), {}),
            (CodeExit, (3, "why"), {}),
        ):
            error = kind(*args, **kwargs)
            try:
                w.call(fails, kind, *args, **kwargs)
            except BaseException as other:
                assert type(other) is kind, other
                assert (str(other), other.args) == (str(error), error.args)
                assert vars(other) == vars(error)
                assert "in fails" in str(other.__cause__)
            else:
                raise AssertionError
        """,
    ],
    ids=[
        "state",
        "dataclasses",
        "enums",
        "members",
        "tuples",
        "abc",
        "hooks",
        "nested",
        "pickle",
        "errors",
    ],
)
def test_classes_of_the_script(script: Script, body: str) -> None:
    with_worker = "with Worker() as w:\n" + textwrap.indent(textwrap.dedent(body), "    ")
    script(textwrap.dedent(CLASSES) + with_worker)


def test_functions_of_the_script(script: Script) -> None:
    script("""
        import functools, typing
        from harness import Worker
        def even(n): return True if n == 0 else odd(n - 1)
        def odd(n): return False if n == 0 else even(n - 1)
        def outer():
            def factorial(n): return 1 if n < 2 else n * factorial(n - 1)
            return factorial
        def counting():
            n = 0
            def step():
                nonlocal n
                n += 1
                return n
            return step
        UserId = typing.NewType("UserId", int)
        P, R = typing.ParamSpec("P"), typing.TypeVar("R")
        def traced(f: typing.Callable[P, R]) -> typing.Callable[P, R]:
            @functools.wraps(f)
            def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
                wrapper.calls += 1
                return f(*args, **kwargs)
            wrapper.calls = 0
            return wrapper
        def bare(f):
            return lambda *args: f(*args)
        @traced
        def recursive(n: UserId) -> int:
            return n if n == 0 else recursive(n - 1)
        @bare
        def hidden(n): return n if n == 0 else hidden(n - 1)
        def calls(): return recursive.calls
        def body():
            class Local:
                value = LIMIT      # loaded by name, not as a global
            return Local.value
        LIMIT = 9
        def keyword(a, /, b=2, *c, d=4, **e): return a, b, c, d, e
        async def coroutine(): return LIMIT
        def run_coroutine():
            try:
                coroutine().send(None)
            except StopIteration as stop:
                return stop.value
        def generator(n): yield from range(n)
        with Worker() as w:
            assert w.call(even, 10) is True
            assert w.call(outer(), 5) == 120
            step = counting()
            assert [w.call(step) for _ in range(3)] == [1, 2, 3]
            assert w.call(lambda: step()) == 4
            assert step() == 1
            assert w.call(recursive, 3) == 0 and w.call(calls) == 4 and recursive.calls == 0
            assert w.call(hidden, 3) == 0
            assert w.call(body) == 9
            assert w.call(keyword, 1, d=5, z=6) == (1, 2, (), 5, {"z": 6})
            assert w.call(run_coroutine) == 9
            assert w.call(lambda: list(generator(3))) == [0, 1, 2]
            assert w.call(lambda f: f(4), even) is True
            assert w.call(lambda f: f(4), lambda x: x + LIMIT) == 13
            assert w.call(lambda: UserId(3)) == 3
            assert w.call(lambda: even) is even
            back = w.call(lambda: lambda: LIMIT)
            LIMIT = 10
            assert back() == 10
            assert w.call(functools.partial(keyword, 1, d=3), 2) == (1, 2, (), 3, {})
    """)


def test_functools_of_the_script(script: Script) -> None:
    script("""
        import functools
        from harness import Worker
        runs = 0
        @functools.lru_cache(maxsize=5)
        def slow(x):
            global runs
            runs += 1
            return x * 2
        @functools.cache
        def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
        def info(f, *args): return f(*args), f.cache_info()
        @functools.singledispatch
        def show(x): return "object"
        @show.register
        def _(x: int): return "int"
        @show.register(list)
        def show_list(x): return [show(i) for i in x]
        class Box:
            @functools.cached_property
            def value(self):
                return 42
            @functools.lru_cache
            def method(self, x): return x, self
            @functools.singledispatchmethod
            def kind(self, x): return "object"
            @kind.register
            def _(self, x: int): return "int"
        @functools.total_ordering
        class Ordered:
            def __eq__(self, other): return True
            def __lt__(self, other): return False
        def local():
            @functools.lru_cache
            def f(n): return 0 if n == 0 else f(n - 1) + 1
            return f
        with Worker() as w:
            assert [w.call(slow, 1), w.call(slow, 1), w.call(slow, 2)] == [2, 2, 4]
            assert w.call(lambda: runs) == 2
            assert slow.cache_info().currsize == 0
            result, statistics = w.call(info, slow, 1)
            assert (result, statistics.hits, statistics.maxsize) == (2, 2, 5)
            assert w.call(fib, 50) == 12586269025
            assert w.call(lambda: slow) is slow
            assert w.call(local(), 10) == 10
            assert [w.call(show, x) for x in ("a", 1)] == ["object", "int"]
            assert w.call(show, [1, "a"]) == ["int", "object"]
            assert w.call(lambda b: b.value, Box()) == 42
            assert w.call(Box().method, 1)[0] == 1
            assert w.call(lambda b: b.kind(1), Box()) == "int"
            assert w.call(lambda: Ordered() <= Ordered())
    """)


def test_objects_that_hold_each_other(script: Script) -> None:
    script("""
        from harness import Worker
        class Config:
            instance = None
            def __new__(cls):
                if cls.instance is None:
                    cls.instance = super().__new__(cls)
                return cls.instance
        config = Config()
        class Left: pass
        class Right: pass
        Left.other, Right.other = Right, Left
        left, right = Left(), Right()
        Left.default, Right.default = right, left
        left.peer, right.peer = right, left
        class Plugin:
            registry = {}
        def plugin(f):
            Plugin.registry[f.__name__] = f
            return f
        @plugin
        def a(x: Plugin) -> Plugin: return "a"
        class App:
            def __init__(self): self.n = 0
            def run(self):
                self.n += 1
                return self.n
        app = App()
        run = app.run
        def both(): return run(), app.run(), app.n
        ring = []
        ring.append(ring)
        class Child: pass
        class Parent: default = Child()
        class ZChild(Child): pass
        Child.kinds = [ZChild()]
        with Worker() as w:
            assert w.call(lambda: Config.instance is config is Config())
            assert w.call(lambda: (Left.other is Right, Left.default is right)) == (True, True)
            assert w.call(lambda: left.peer.peer is left and left.peer is right)
            assert w.call(lambda: Plugin.registry["a"](None)) == "a"
            assert w.call(both) == (1, 2, 2)
            assert w.call(both) == (3, 4, 4)
            assert w.call(lambda: ring[0] is ring)
            assert w.call(lambda: type(Child.kinds[0]) is ZChild)
            assert w.call(lambda: type(Parent.default) is Child)
    """)


def test_a_captured_object_is_the_callers(script: Script) -> None:
    script("""
        import functools
        from harness import Worker
        class Settings:
            def __init__(self, x): self.x = x
        settings = Settings(1)
        def initialize():
            global settings
            settings = Settings(2)
        def get(captured): return captured.x, settings.x
        class Counted:
            def __init__(self, function): self.function, self.n = function, 0
            def __call__(self):
                self.n += 1
                return self.n
        @Counted
        def counted(): pass
        with Worker() as w:
            w.call(initialize)
            assert w.call(get, settings) == (1, 2)
            assert w.call(functools.partial(get, settings)) == (1, 2)
            assert w.call((lambda captured: lambda: get(captured))(settings)) == (1, 2)
            # An object is a value also if a global is bound to it; the global is another one.
            assert [w.call(counted) for _ in range(3)] == [1, 1, 1]
            assert [w.call(lambda: counted()) for _ in range(2)] == [1, 2]
    """)


def test_each_task_has_its_own_copy_of_what_its_callable_holds(script: Script) -> None:
    script("""
        import functools, io
        from harness import Worker
        def append(to, *values):
            to.append(len(to))
            return len(to)
        class Model:
            def __init__(self): self.calls = 0
            def __call__(self):
                self.calls += 1
                return self.calls
        model = Model()
        def closure():
            seen = []
            return lambda: append(seen)
        def counter():
            n = 0
            def count():
                nonlocal n
                n += 1
                return n
            return count
        def nested_counter():
            n = 0
            def count():
                def add():
                    nonlocal n
                    n += 1
                add()
                return n
            return count
        def attribute():
            def count():
                count.calls = getattr(count, "calls", 0) + 1
                return count.calls
            return count
        def attribute_of_another():
            def inner(): pass
            def count():
                inner.calls = getattr(inner, "calls", 0) + 1
                return inner.calls
            return count
        def two():
            count = counter()
            return lambda: count()
        def held_partial():
            p = functools.partial(len, ())
            def count():
                p.n = getattr(p, "n", 0) + 1
                return p.n
            return count
        def once(f):
            f.calls = getattr(f, "calls", 0) + 1
            return f.calls
        def held_cache():
            def new(): return []
            cached = functools.lru_cache(new)
            return lambda: append(cached())
        another = []
        def helper(): return "helper"
        def holding(f, seen): return lambda: (f(), append(seen))
        def check(w):
            for callable_ in [
                functools.partial(append, []),
                functools.partial(append, to=[]),
                functools.partial(functools.partial, append, []).func(append, []),
                Model(),
                model,
                closure(),
                counter(),
                nested_counter(),
                attribute(),
                attribute_of_another(),
                two(),
                lambda seen=[]: append(seen),
                held_partial(),
                functools.partial(once, lambda: 0),
                (lambda f: lambda: once(f))(lambda: 0),
                held_cache(),
                functools.lru_cache(closure()),
                io.BytesIO(b"a").getvalue,
            ]:
                assert len({w.call(callable_) for _ in range(3)}) == 1, callable_
            assert [w.call({"a": 1}.popitem) for _ in range(2)] == [("a", 1)] * 2
            assert [w.call(functools.partial(append, seen)) for seen in ([], [1])] == [1, 2]
            # Also of functions whose names a task has bound to others.
            held = holding(helper, [])
            assert w.call(held) == ("helper", 1)
            def rebind():
                global helper
                helper = None
            w.call(rebind)
            assert w.call(held) == ("helper", 1)
            assert w.call(lambda: another) == []
            assert w.call(held) == ("helper", 1), "another global has been bound since"
        with Worker() as w:
            check(w)
            # What a global is bound to is the same for all tasks of a worker.
            counted = counter()
            assert [w.call(counted) for _ in range(2)] == [1, 2]
            assert w.call(lambda f: f(), counted) == 3
    """)


def test_a_callable_in_which_nothing_changes_is_unpickled_once() -> None:
    def closure(value: object) -> Callable[..., object]:
        return lambda: value

    def recursive(depth: int) -> int:
        return recursive(depth - 1) if depth else 0

    def with_default(table: dict[str, int] = {}) -> None:  # noqa: B006
        pass

    def with_attribute() -> None:
        pass

    with_attribute.table = {}  # type: ignore[attr-defined]
    constant = [
        echo,
        Node,
        len,
        "a".upper,
        str.upper,
        Node.named,
        np.add,
        closure((1, "a", None, frozenset((2.5,)))),
        closure(np.float64(1.5)),
        closure(Fruit(1)),
        partial(closure(echo), 1, x=first),
        operator.itemgetter(1, 2),
        operator.methodcaller("count", 1, x=2),
        functools.lru_cache(closure(1)),
    ]
    changing = [
        Node(),
        Node().method,
        [].append,
        closure([]),
        closure(([],)),
        closure(np.arange(3)),
        closure(closure([])),
        partial(echo, []),
        partial(echo, closure(1)),
        closure(closure(1)),
        closure(partial(echo, 1)),
        closure(types.ModuleType("made")),
        partial(echo, x={}),
        operator.itemgetter([1]),
        functools.lru_cache(closure([])),
        recursive,
        with_default,
        with_attribute,
    ]
    assert [value for value in constant if not is_constant(value)] == []
    assert [value for value in changing if is_constant(value)] == []
    many: tuple[Any, ...] = (1,)
    for _ in range(60):
        many = (many, many)
    assert is_constant(partial(echo, many))


def test_a_global_that_is_bound_anew_is_a_new_one(script: Script) -> None:
    script("""
        from zmqexecutor import ZmqExecutor
        import numpy as np
        cache, seen, big, text, pair = {}, [], np.zeros(50_000), "a", (1, [2])
        def helper(): return 1
        runs = []
        def use(key):
            cache[key] = helper()
            seen.append(key)
            big[0] += 1
            runs.append(text)
            pair[1].append(key)
            return sorted(cache), len(seen), big[0], len(runs), len(pair[1])
        with ZmqExecutor(1) as executor:
            assert executor.submit(use, 1).result() == ([1], 1, 1.0, 1, 2)
            assert executor.submit(use, 2).result() == ([1, 2], 2, 2.0, 2, 3)
            cache = {}
            assert executor.submit(use, 3).result() == ([3], 3, 3.0, 3, 4)
            assert executor.submit(use, 4).result() == ([3, 4], 4, 4.0, 4, 5)
            cache, seen, big, pair = {}, [], np.zeros(50_000), (1, [2])
            assert executor.submit(use, 5).result() == ([5], 1, 5.0, 5, 2)
            # In these nothing can change, but what a task changes stays. So it is with arrays.
            text = "".join(["a"])
            def helper(): return 1
            assert executor.submit(use, 6).result() == ([5, 6], 2, 6.0, 6, 3)
    """)


def test_an_array_with_two_names(script: Script) -> None:
    script("""
        import numpy as np
        from zmqexecutor import ZmqExecutor
        weights = best = np.ones(8)
        def both(): return weights.sum(), best.sum()
        def one(): return best.sum()
        with ZmqExecutor(1) as executor:
            for _ in range(3):
                assert executor.submit(both).result() == (8, 8)
            for _ in range(2):
                weights = weights * 2
                assert executor.submit(both).result() == (weights.sum(), 8)
            weights = best
            assert executor.submit(one).result() == 8
            del weights
            assert executor.submit(one).result() == 8
    """)


def test_a_cache_that_is_made_anew_is_empty(script: Script) -> None:
    script("""
        import functools
        from harness import Worker
        def define():
            global load, count
            calls = []
            @functools.lru_cache
            def load():
                calls.append(1)
                return len(calls)
            def count():
                count.calls += 1
                return count.calls
            count.calls = 0
        def use(): return load(), load.cache_info().hits, count()
        with Worker() as w:
            for _ in range(2):
                define()
                assert w.call(use) == (1, 0, 1)
                assert w.call(use) == (1, 1, 2)
    """)


def test_a_callable_object_of_the_script_with_a_lock(script: Script) -> None:
    script("""
        import threading
        from harness import Worker
        class Service:
            def __init__(self): self.lock, self.calls = threading.Lock(), 0
            def __call__(self):
                with self.lock:
                    self.calls += 1
                    return self.calls
        service = Service()
        def synchronized(f):
            lock = threading.RLock()
            def run(*args):
                with lock:
                    return f(*args)
            return run
        @synchronized
        def work(x): return x + 1
        with Worker() as w:
            assert [w.call(service) for _ in range(2)] == [1, 1]
            assert [w.call(work, 1) for _ in range(2)] == [2, 2]
    """)


def test_changes_of_what_looks_constant(script: Script) -> None:
    script("""
        import collections, datetime, decimal, operator
        from harness import Worker
        class Zone(datetime.tzinfo):
            hours = 1
            def utcoffset(self, _): return datetime.timedelta(hours=self.hours)
            def dst(self, _): return datetime.timedelta()
        context = decimal.Context(prec=5)
        counted = []
        count = operator.methodcaller("count", counted)
        part = slice([1], None)
        table = collections.OrderedDict()
        moment = datetime.datetime(2026, 1, 1, tzinfo=Zone())
        def look():
            return (
                str(context.divide(decimal.Decimal(1), decimal.Decimal(3))),
                count([[1], []]), part.start, getattr(table, "tag", None),
                moment.utcoffset().total_seconds(),
            )
        with Worker() as w:
            for _ in range(3):
                assert w.call(look) == look() == ("0.33333", 1, [1], None, 3600.0)
            context.prec = 3
            assert w.call(look) == look()
            counted.append(1)
            assert w.call(look) == look()
            part.start.append(2)
            assert w.call(look) == look()
            table.tag = 5
            assert w.call(look) == look()
            moment.tzinfo.hours = 2
            assert w.call(look) == look() == ("0.333", 1, [1, 2], 5, 7200.0)
    """)


def test_what_could_not_be_pickled_can_be_mended(script: Script) -> None:
    script("""
        import collections
        from harness import Worker
        from zmqexecutor import SerializationError
        class Service:
            handle = open("/dev/null")
        held = collections.UserDict(handle=Service.handle)
        def closure(handle):
            def get(): return handle
            def forget():
                nonlocal handle
                handle = None
            return get, forget
        get, forget = closure(Service.handle)
        class User:
            def service(self): return Service.handle
            def held(self): return len(held)
            def get(self): return get()
        def call(user, method): return getattr(user, method)()
        def fails(method):
            try:
                w.call(call, User(), method)
            except SerializationError:
                return True
        with Worker() as w:
            for _ in range(3):
                assert fails("service") and fails("held") and fails("get")
            Service.handle = None
            assert w.call(call, User(), "service") is None
            del held["handle"]
            assert w.call(call, User(), "held") == 0
            forget()
            assert w.call(call, User(), "get") is None
    """)


def test_global_arrays_can_be_resized(script: Script) -> None:
    script("""
        import numpy as np
        from zmqexecutor import ZmqExecutor
        small, large = np.arange(10), np.arange(50_000)
        def sizes(): return len(small), len(large)
        with ZmqExecutor(1) as executor:
            for _ in range(3):
                assert executor.submit(sizes).result() == (10, 50_000)
            small.resize(20)
            large.resize(60_000)
            assert executor.submit(sizes).result() == (20, 60_000)
    """)


class Proxy:
    """Something that answers whatever it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__reduce") or name in ("__getstate__", "__setstate__"):
            raise AttributeError(name)
        return lambda *_: name

    def __call__(self, value: int) -> int:
        return value + 1


class Refusing:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __reduce__(self) -> Any:
        return Refusing, ()

    def __call__(self, value: int) -> int:
        return value + 1


@pytest.mark.parametrize("kind", [Proxy, Refusing])
def test_callables_that_answer_anything(pair: Pair, kind: type[Any]) -> None:
    assert pair.call(kind(), 1) == 2
    assert pair.call(partial(kind(), 1)) == 2
    assert pair.call(make, kind(), 1) == 2


def test_ctrl_c_while_the_culprit_is_looked_for(pair: Pair) -> None:
    class Slow:
        asked = 0

        def __reduce__(self) -> Any:
            Slow.asked += 1
            if Slow.asked == 2:
                raise KeyboardInterrupt
            raise ValueError("no")

    with pytest.raises(KeyboardInterrupt):
        pair.call(first, Slow())


def test_redefinition(script: Script) -> None:
    script("""
        from harness import Worker
        def helper(): return 1
        def f(): return helper()
        class C:
            n = 0
            def go(self): return 1, self
        class D(C): pass
        c, d = C(), D()
        keep = helper
        with Worker() as w:
            for _ in range(3):
                assert w.call(f) == 1
                assert w.call(c.go)[0] == 1
                assert w.call(d.go)[0] == 1
            def helper(): return 2
            assert w.call(f) == 2
            assert w.call(lambda: (keep(), helper())) == (1, 2)
            old = C
            class C:
                n = 0
                def go(self): return 2, self
            assert w.call(C().go)[0] == 2
            assert type(w.call(C().go)[1]) is C
            n, back = w.call(c.go)
            assert n == 1 and type(back) is old
            assert w.call(d.go)[0] == 1
            assert w.call(lambda: isinstance(d, old) and not isinstance(d, C))
            class D(C): pass
            assert w.call(D().go)[0] == 2
            def f(): return 3
            assert w.call(f) == 3
            assert w.call(lambda: f()) == 3
    """)


# Each changes something that f captured. f() in the parent says what is right.
STALE = {
    "global": ("x = 1\ndef f(): return x", "x = 2"),
    "global to equal": ("x = 1\ndef f(): return type(x)", "x = True"),
    "list": ("x = [1]\ndef f(): return len(x)", "x.append(2)"),
    "list item": ("x = [[1]]\ndef f(): return x", "x[0].append(2)"),
    "dict": ("x = {'a': 1}\ndef f(): return x", "x['a'] = 2"),
    "dict key": ("x = {'a': 1}\ndef f(): return list(x)", "x['b'] = 1"),
    "set": ("x = {1}\ndef f(): return x", "x.add(2)"),
    "bytearray": ("x = bytearray(b'a')\ndef f(): return x", "x[0] = 98"),
    "tuple of lists": ("x = ([1],)\ndef f(): return x", "x[0].append(2)"),
    "helper": ("def g(): return 1\ndef f(): return g()", "def g(): return 2"),
    "helper's helper": (
        "def h(): return 1\ndef g(): return h()\ndef f(): return g()",
        "def h(): return 2",
    ),
    "helper's global": ("x = 1\ndef g(): return x\ndef f(): return g()", "x = 2"),
    "helper's code": (
        "def g(): return 1\ndef f(): return g()",
        "g.__code__ = (lambda: 2).__code__",
    ),
    "code": ("def f(): return 1", "f.__code__ = (lambda: 2).__code__"),
    "cell": (
        "def o():\n x = 1\n def s():\n  nonlocal x\n  x += 1\n return (lambda: x), s\nf, s = o()",
        "s()",
    ),
    "cell's list": ("def o(x): return lambda: x\nl = [1]\nf = o(l)", "l.append(2)"),
    "cell's function": (
        "def o(g): return lambda: g()\ndef g(): return 1\nf = o(g)",
        "g.__code__ = (lambda: 2).__code__",
    ),
    "default": ("def f(x=1): return x", "f.__defaults__ = (2,)"),
    "default that is equal": ("def f(x=1): return repr(x)", "f.__defaults__ = (True,)"),
    "default in a default": ("l = [1]\ndef f(x=((l,),)): return x", "l.append(2)"),
    "new keyword default": (
        "def f(**kw): return f.__kwdefaults__",
        "f.__kwdefaults__ = {'x': 2}",
    ),
    "default's list": ("l = [1]\ndef f(x=l): return x", "l.append(2)"),
    "keyword default": ("def f(*, x=1): return x", "f.__kwdefaults__['x'] = 2"),
    "attribute": ("def f(): return f.x\nf.x = 1", "f.x = 2"),
    "attribute of helper": ("def g(): pass\ng.x = 1\ndef f(): return g.x", "g.x = 2"),
    "new attribute": ("def f(): return getattr(f, 'x', 0)", "f.x = 2"),
    "annotation": ("def f(): return dict(f.__annotations__)", "f.__annotations__['x'] = int"),
    "annotation's class": (
        "def f(x: int = 0): return f.__annotations__['x']",
        "f.__annotations__['x'] = str",
    ),
    "annotations": (
        "def f(x: int = 0) -> None: return f.__annotations__",
        "f.__annotations__ = {}",
    ),
    "name": ("def f(): return f.__name__", "f.__name__ = 'g'"),
    "qualified name": ("def f(): return f.__qualname__", "f.__qualname__ = 'g'"),
    "text": ("def f():\n 'a'\n return f.__doc__", "f.__doc__ = 'b'"),
    "list in a tuple": ("x = ((1, [2]),)\ndef f(): return x", "x[0][1].append(3)"),
    "file of the code": (
        "def f(): return f.__code__.co_filename",
        "f.__code__ = f.__code__.replace(co_filename='/elsewhere.py')",
    ),
    "order of annotations": (
        "def f(x: int = 0, y: int = 0): return list(f.__annotations__)",
        "f.__annotations__ = dict(reversed(f.__annotations__.items()))",
    ),
    "annotation that is equal to all": (
        "import unittest.mock\ndef f(x: int = 0): return repr(f.__annotations__['x'])",
        "f.__annotations__['x'] = unittest.mock.ANY",
    ),
    "constant that is equal": (
        "def f(): return repr(1)",
        "f.__code__ = (lambda: repr(True)).__code__",
    ),
    "class attribute": ("class C: x = 1\ndef f(): return C.x", "C.x = 2"),
    "deleted class attribute": (
        "class C: x = 1\ndef f(): return getattr(C, 'x', 0)",
        "del C.x",
    ),
    "new class attribute": (
        "class C: x = 1\ndef f(): return getattr(C, 'y', 0)",
        "C.y = 2",
    ),
    "class attribute's list": ("class C: x = [1]\ndef f(): return C.x", "C.x.append(2)"),
    "base's attribute": (
        "class B: x = 1\nclass C(B): pass\ndef f(): return C.x",
        "B.x = 2",
    ),
    "bases": (
        "class A: x = 1\nclass B: x = 2\nclass C(A): pass\ndef f(): return C.x",
        "class C(B): pass",
    ),
    "method": ("class C:\n def m(self): return 1\ndef f(): return C().m()", "C.m = lambda _: 2"),
    "method's global": (
        "x = 1\nclass C:\n def m(self): return x\ndef f(): return C().m()",
        "x = 2",
    ),
    "method's code": (
        "class C:\n def m(self): return 1\ndef f(): return C().m()",
        "C.m.__code__ = (lambda self: 2).__code__",
    ),
    "property's function": (
        "class C:\n @property\n def m(self): return 1\ndef f(): return C().m",
        "C.m.fget.__code__ = (lambda self: 2).__code__",
    ),
    "static method": (
        "class C:\n @staticmethod\n def m(): return 1\ndef f(): return C.m()",
        "C.m.__code__ = (lambda: 2).__code__",
    ),
    "metaclass": (
        "class M(type): x = 1\nclass C(metaclass=M): pass\ndef f(): return C.x",
        "M.x = 2",
    ),
    "registration": (
        "import abc\nclass A(abc.ABC): pass\nclass C: pass\ndef f(): return issubclass(C, A)",
        "A.register(C)",
    ),
    "class": ("class C: x = 1\ndef f(): return C.x", "class C: x = 2"),
    "instance": ("class C: pass\nc = C()\nc.x = 1\ndef f(): return c.x", "c.x = 2"),
    "instance's slot": (
        "class C: __slots__ = 'x',\nc = C()\nc.x = 1\ndef f(): return c.x",
        "c.x = 2",
    ),
    "instance's list": ("class C: pass\nc = C()\nc.x = []\ndef f(): return c.x", "c.x.append(1)"),
    "instance's class": (
        "class C: x = 1\nclass D: x = 2\nc = C()\ndef f(): return c.x",
        "c.__class__ = D",
    ),
    "array": ("import numpy\nx = numpy.zeros(3)\ndef f(): return x.tolist()", "x[0] = 1"),
    "bound method": (
        "class C:\n n = 1\n def m(self): return self.n\nc = C()\nf = c.m",
        "c.n = 2",
    ),
    "partial": (
        "from functools import partial\nl = [1]\nf = partial(list, l)",
        "l.append(2)",
    ),
    "partial's function": (
        "from functools import partial\ndef g(x): return x\nf = partial(g, 1)",
        "g.__code__ = (lambda x: 2).__code__",
    ),
    "alias": ("def g(): return 1\nh = g\ndef f(): return h()", "def h(): return 2"),
    "bound helper in a list": (
        "def g(): return 1\nl = [g]\ndef f(): return l[0]()",
        "def g(): return 2\nl[0] = g",
    ),
    "rebound twin": (
        "def g(): return 1\nl = [g]\ndef f(): return l[0]()",
        "def g(): return 1\ndef g2(): return 2\nl = [g2]",
    ),
    "missing": ("def f():\n try: return y\n except NameError: return 0", "y = 1"),
    "builtin": ("def f(): return len([])", "len = lambda _: 5"),
    "module": ("import string\nx = string\ndef f(): return x.__name__", "import json\nx = json"),
    "dispatch": (
        "import functools\n@functools.singledispatch\ndef g(x): return 0\ndef f(): return g(1)",
        "g.register(int, lambda x: 1)",
    ),
    "submodule": (
        "import xml\ndef f():\n try: return xml.sax.handler.__name__\n"
        " except AttributeError: return 0",
        "import xml.sax.handler",
    ),
    "enum": (
        "import enum\nclass E(enum.Enum): A = 1\ndef f(): return E.A.value",
        "class E(enum.Enum): A = 2",
    ),
    "wrapped": (
        "import functools\ndef d(g):\n @functools.wraps(g)\n def w(): return g()\n return w\n"
        "@d\ndef f(): return 1",
        "f.__wrapped__.__code__ = (lambda: 2).__code__",
    ),
    "lru_cache": (
        "import functools\n@functools.lru_cache\ndef g(): return 1\ndef f(): return g()",
        "@functools.lru_cache\ndef g(): return 2",
    ),
    "dataclass field": (
        "import dataclasses\n@dataclasses.dataclass\nclass C:\n x: int = 1\n"
        "def f(): return dataclasses.fields(C)[0].default",
        "C.__dataclass_fields__['x'].default = 2",
    ),
    "class in annotation": (
        "class C: x = 1\ndef f(a: C = None): return f.__annotations__['a'].x",
        "C.x = 2",
    ),
    "ordered dict": (
        "from collections import OrderedDict as O\nx = O(a=1, b=2)\ndef f(): return x",
        "x.move_to_end('a')",
    ),
    "default dict": (
        "from collections import defaultdict as D\nx = D(int)\ndef f(): return x.default_factory",
        "x.default_factory = str",
    ),
    "deque": (
        "from collections import deque\nx = deque([1])\ndef f(): return x",
        "x.append(1)",
    ),
    "namespace": (
        "from types import SimpleNamespace as N\nx = N(a=1)\ndef f(): return x.a",
        "x.a = 2",
    ),
    "import moved": ("from string import digits as x\ndef f(): return x", "x = 'abc'"),
}


def test_captures_do_not_go_stale(script: Script) -> None:
    script(f"""
        from harness import Worker
        cases = {STALE!r}
        kept = set(globals()) | {{"kept"}}
        failures = []
        with Worker() as w:
            for name, (setup, change) in cases.items():
                exec(setup, globals())
                for _ in range(3):
                    before = w.call(f)
                if repr(before) != repr(f()):
                    failures.append((name, "before", before, f()))
                exec(change, globals())
                for _ in range(3):
                    after = w.call(f)
                    if repr(after) != repr(f()):
                        failures.append((name, after, f()))
                if repr(before) == repr(f()) and name != "rebound":
                    failures.append((name, "is no test", before))
                for extra in set(globals()) - kept - {{"w", "name", "setup", "change", "failures"}}:
                    if extra not in ("kept", "_", "before", "after", "cases"):
                        del globals()[extra]
        assert not failures, failures
    """)


RANDOM = """
import random, re, sys
from functools import partial
from harness import Worker
chance, N = random.Random(SEED), 8
class Base:
    tag = 0
    def val(self): return type(self).tag, getattr(self, "data", None)
FORMS = [
    "v{i} = {n}",
    "v{i} = [{n}, {{}}]",
    "v{i} = {{'k': {n}}}",
    "def v{i}(d=3, acc=[{n}]): return 'f{n}', acc, show(v{r}, d - 1)",
    "v{i} = Base(); v{i}.data = [{n}]; v{i}.other = globals().get('v{r}')",
    "class v{i}(Base):\\n tag = {n}\\n other = globals().get('v{r}')\\n"
    " def val(self): return super().val(), show(v{r}, 1)",
    "v{i} = (lambda c: lambda d=3: (c, show(v{r}, d - 1)))(globals().get('v{r}'))",
    "def h{i}(x, d=3): return 'p{n}', show(x, 1)\\nv{i} = partial(h{i}, globals().get('v{r}'))",
]
def define(i):
    form = chance.choice(FORMS)
    exec(form.format(i=i, n=chance.randrange(5), r=chance.randrange(N)), globals())
def change(i):
    value, n = globals()[f"v{i}"], chance.randrange(9)
    if isinstance(value, list): value.append(n)
    elif isinstance(value, dict): value["k"] = n
    elif isinstance(value, type): value.tag = n
    elif isinstance(value, Base): value.data.append(n)
    else: define(i)
def show(x, depth=3):
    if depth <= 0: return "..."
    if isinstance(x, (type, Base)):
        parts = x.val() if isinstance(x, Base) else (x.__name__, x.tag)
        return type(x).__name__, parts, show(x.__dict__.get("other"), depth - 1)
    if isinstance(x, list): return [show(y, depth - 1) for y in x]
    if isinstance(x, dict): return {k: show(y, depth - 1) for k, y in x.items()}
    return "call", x(d=depth - 1) if callable(x) else x
def everything(): return [show(v) for v in (v0, v1, v2, v3, v4, v5, v6, v7)]
def task0(): return show(v0)
def task1(): return show(v1)
def plain(value): return re.sub(" at 0x[0-9a-f]+", "", repr(value))
for i in [*range(N), *range(N)]:
    define(i)
with Worker() as w:
    for step in range(150):
        f = chance.choice([everything, task0, task1])
        there, here = plain(w.call(f)), plain(f())
        assert there == here, (step, there, here)
        if chance.random() < 0.5:
            chance.choice([define, change])(chance.randrange(N))
"""


@pytest.mark.parametrize("seed", range(4))
def test_random_programs(script: Script, seed: int) -> None:
    script(RANDOM.replace("SEED", str(seed)))


def test_what_is_proven_is_not_pickled_again(script: Script) -> None:
    script("""
        import dataclasses, enum, functools, math, typing
        from harness import Worker
        from zmqexecutor.payload import picklers
        LIMIT, TABLE = 3, {"a": [1, 2]}
        @dataclasses.dataclass
        class Point:
            x: int
            others: "list[Point]" = dataclasses.field(default_factory=list)
        class Color(enum.Enum):
            RED = 1
        class Base(typing.Generic[typing.TypeVar("T")]):
            @property
            def p(self): return LIMIT
            @staticmethod
            def s(): return TABLE
        origin = Point(0)
        def helper(x): return math.sqrt(x) + LIMIT
        def f(p: Point, c: Color = Color.RED) -> "Point":
            return Point(helper(p.x), [origin]), Base().p, TABLE
        @functools.lru_cache
        def g(x): return helper(x)
        def closure(k): return lambda: (k, helper(k), functools.partial(helper, 1))
        cases = [
            (f, (Point(4),)), (g, (4,)), (closure(1), ()), (Point(1).__eq__, (1,)), (Color, (1,)),
            (functools.partial(helper, 4), ()),
        ]
        with Worker() as w:
            for fn, args in cases:
                for _ in range(3):
                    w.call(fn, *args)
            def fail(*_): raise AssertionError("pickled again")
            picklers.DefinitionPickler.dumps = fail
            for fn, args in cases:
                w.call(fn, *args)
    """)


def test_what_is_reduced_by_multiprocessing_is_pickled_each_time() -> None:
    reader, writer = multiprocessing.Pipe(duplex=False)
    with reader, writer:
        assert prove([reader]) is None  # its pickle serves once
    assert prove([1]) is not None


def test_globals_that_cannot_be_pickled(script: Script) -> None:
    script("""
        import contextlib
        from harness import Worker
        lock = contextlib.ExitStack()
        lock.generator = (i for i in ())
        class Simulation:
            def step(self): return 1
            def run(self):
                with lock:
                    return 2
        def work():
            with lock:
                return 1
        with Worker() as w:
            # Only a method that this task may never call needs the lock.
            assert [w.call(Simulation().step) for _ in range(3)] == [1, 1, 1]
            for fn in (work, lambda: work(), lambda: Simulation().run()):
                try:
                    w.call(fn)
                except Exception as error:
                    assert type(error).__name__ == "SerializationError", error
                    assert "the global 'lock' of __main__" in str(error), error
                else:
                    raise AssertionError
            lock = None
            try:
                w.call(Simulation().run)
            except (AttributeError, TypeError):
                pass
    """)


def test_main_in_the_worker(script: Script) -> None:
    script("""
        import os, sys
        from harness import Worker
        class C: pass
        def f(): return 1
        def by_name():
            import __main__, pickle
            assert __main__.f is f and pickle.loads(pickle.dumps((f, C()))) [0] is f
            return __name__, __file__, __main__.__file__
        def pool():
            import multiprocessing
            with multiprocessing.get_context("fork").Pool(1) as pool:
                return pool.apply(f), type(pool.apply(C))
        def leftovers():
            return sorted(name for name in globals() if not name.startswith("__"))
        with Worker() as w:
            assert w.call(by_name) == ("__main__", __file__, __file__)
            assert w.call(pool) == (1, C)
            assert w.call(leftovers) == ["C", "by_name", "f", "harness", "leftovers", "pool"]
    """)


@pytest.mark.parametrize("how", ["-c", "-m", "child"])
def test_other_ways_to_be_main(tmp_path: Path, how: str) -> None:
    (tmp_path / "harness.py").write_text(HARNESS)
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "other.py").write_text("value = 5")
    text = """
import multiprocessing
from harness import Worker
count = 0
class C: pass
def f():
    global count
    count += 1
    return count, C()
def relative():
    from .other import value
    return value
def main():
    with Worker() as w:
        n, c = w.call(f)
        assert n == 1 and type(c) is C and w.call(f)[0] == 2, n
        RELATIVE
def spawn():
    process = multiprocessing.get_context("spawn").Process(target=main)
    process.start()
    process.join()
    assert process.exitcode == 0
"""
    if how == "-m":
        text = text.replace("RELATIVE", "assert w.call(relative) == 5")
    text = text.replace("RELATIVE", "")
    (package / "__main__.py").write_text(f"{text}\nmain()")
    (tmp_path / "child.py").write_text(f"{text}\nif __name__ == '__main__': spawn()")
    command = {"-c": ["-c", f"{text}\nmain()"], "-m": ["-m", "package"], "child": ["child.py"]}
    done = subprocess.run(
        [sys.executable, "-W", "error", *command[how]],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=python_path(tmp_path)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_module_registered_by_value(script: Script, tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text(
        "state = 0\n"
        "class Thing: pass\n"
        "def step():\n    global state\n    state += 1\n    return state, Thing()\n"
        "def other(): return step()\n"
    )
    script("""
        import cloudpickle, library
        from harness import Worker
        with Worker() as w:
            first = w.call(library.step)
            cloudpickle.register_pickle_by_value(library)
            assert [w.call(library.step)[0] for _ in range(2)] == [1, 2]
            state, thing = w.call(library.other)
            assert state == 3 and type(thing) is library.Thing
            library.state = 10
            assert w.call(library.step)[0] == 11
            assert library.state == 10
            def inside():
                import library
                return library.state
            assert w.call(inside) == 1
    """)


def test_classes_made_in_functions(script: Script) -> None:
    script("""
        import gc
        from harness import Worker
        def local():
            class Local:
                n = 0
                def bump(self):
                    Local.n += 1
                    return Local.n, self
            return Local
        def made_there():
            class There:
                x = 1
            return There(), There
        with Worker() as w:
            w.call(gc.set_threshold, 1)  # what nothing keeps alive goes at once
            Local = local()
            assert w.call(Local().bump)[0] == 1
            n, back = w.call(Local().bump)
            assert (n, type(back), Local.n) == (2, Local, 0)
            assert w.call(lambda x: isinstance(x, Local), Local())
            there, There = w.call(made_there)
            assert type(there) is There and There.x == 1
            There.x = 2
            assert w.call(lambda t: type(t).x, there) == 2
            assert w.call(lambda t: t, there).x == 2 and There.x == 2
            gone = w.call(local().bump, local()())  # its class lives on in the result
            assert gone[0] == 1
    """)


def test_a_nested_pool(script: Script) -> None:
    script("""
        from harness import Worker
        class C:
            n = 0
        def inner(c):
            C.n += 1
            return C.n, c
        def outer(c):
            with Worker() as w:
                inner(c)
                n, back = w.call(inner, c)
                assert type(back) is C
                return n, back
        with Worker() as w:
            n, back = w.call(outer, C())
            assert n == 2 and type(back) is C and C.n == 0, n
    """)


@pytest.mark.parametrize("library", ["attrs", "pydantic"])
def test_classes_of_libraries(script: Script, library: str) -> None:
    pytest.importorskip(library)
    texts = {
        "attrs": """
            import attrs
            @attrs.define
            class Model:
                x: int
                others: list = attrs.Factory(list)
        """,
        "pydantic": """
            import pydantic
            class Model(pydantic.BaseModel):
                x: int
                others: list["Model"] = []
        """,
    }
    script(
        textwrap.dedent(texts[library])
        + textwrap.dedent("""
            from harness import Worker
            def double(m): return Model(x=m.x * 2, others=[m])
            with Worker() as w:
                for _ in range(3):
                    back = w.call(double, Model(x=2))
                    assert back == Model(x=4, others=[Model(x=2)]) and type(back) is Model
                    assert type(back.others[0]) is Model
        """)
    )


def test_a_worker_starts_without_the_parents_modules() -> None:
    text = (
        "import sys, zmqexecutor.payload.serialization\n"
        "assert 'concurrent.futures.process' not in sys.modules\n"
        "assert 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", text], check=True, timeout=60)


def test_data_is_a_plain_pickle(pair: Pair) -> None:
    call = pair.pickler.dump_call(echo, (1, "a"), {"b": 2})
    assert pickle.load(io.BytesIO(call.data)) == ((1, "a"), {"b": 2})


PLAIN = [
    *(0, -1, 2**31, -(2**63), 10**5000, True, False, None),
    *(0.0, -0.0, 1.5, float("inf"), float("nan"), 5e-324, complex(0.0, -0.0)),
    *("", "a", "ä€\U0001f40d", "\udc80", "x" * 9999, "x" * 10_001),
    *(b"", b"\x80", bytes(range(256)), b"x" * 9999, b"x" * 10_001),
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: f"{type(value).__name__}-{hash(value)}")
def test_numbers_and_text_arrive_as_they_are(pair: Pair, value: object) -> None:
    there = pair.outcome(type_and_repr, value)
    assert pair.pickler.load_outcome(there) == type_and_repr(value)
    back = pair.call(first, value)
    assert type_and_repr(back) == type_and_repr(value)
    assert pair.call(echo, value, "b", 3)[0] == (back, "b", 3) or back != back


def type_and_repr(value: object) -> str:
    if type(value) is int:
        return f"int {value:x}"
    return f"{type(value).__name__} {value!r}"


class Fruit(enum.IntEnum):
    APPLE = 1


class Word(str):
    __slots__ = ()


@pytest.mark.parametrize("value", [Fruit.APPLE, Word("a"), np.float64(1.5)], ids=str)
def test_what_is_like_a_number_or_text_keeps_its_class(pair: Pair, value: object) -> None:
    assert type(pair.call(first, value)) is type(value)
    assert pair.call(echo, value, 1) == ((value, 1), {})


def test_numbers_and_text_are_told_from_pickles(pair: Pair) -> None:
    arguments: list[tuple[object, ...]] = [(), (b"\x80",), (1, "a"), ([1],), (b"\x80" * 10_001,)]
    for args in arguments:
        assert pair.call(echo, *args) == (args, {})
        assert pair.call(echo, *args, key=1) == (args, {"key": 1})


def test_data_that_is_damaged_fails_its_task_only(pair: Pair) -> None:
    call = pair.pickler.dump_call(echo, (1, "a"), {})
    pair.runner.load_function(call.shared.key, call.shared.data)
    for data in (call.data[:-1], b"?", b"", b"\x80\x05"):
        outcome = pair.runner.run(call.shared.key, data)
        with pytest.raises(SerializationError, match="unpickled"):
            pair.pickler.load_outcome(outcome)
        with pytest.raises(SerializationError, match="The result cannot be unpickled"):
            pair.pickler.load_outcome(Outcome(True, data))
    assert pair.pickler.load_outcome(pair.runner.run(call.shared.key, call.data))[0] == (1, "a")
