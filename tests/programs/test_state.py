"""What a script keeps in its globals, and the classes and functions that it defines."""

from __future__ import annotations

import pytest

from .conftest import Program


def test_an_initializer_that_sets_a_global(both: Program) -> None:
    out = both("""
        model = None
        def load(value):
            global model
            model = value * 2
        def predict(x):
            return model + x
        with Pool(2, initializer=load, initargs=(5,)) as pool:
            print(list(pool.map(predict, range(4))))
        print(model)
    """)
    assert out == "[10, 11, 12, 13]\nNone\n"


def test_a_counter_and_a_cached_connection(both: Program) -> None:
    out = both("""
        import sqlite3
        count, connection = 0, None
        def visit():
            global count, connection
            count += 1
            if connection is None:
                connection = sqlite3.connect(":memory:")
                connection.execute("create table visits (n)")
            connection.execute("insert into visits values (?)", (count,))
            return count, connection.execute("select count(*) from visits").fetchone()[0]
        with Pool(1) as pool:
            print([pool.submit(visit).result() for _ in range(4)])
        print(count, connection)
    """)
    assert out == "[(1, 1), (2, 2), (3, 3), (4, 4)]\n0 None\n"


def test_they_stay_while_other_globals_are_rebound(ours: Program) -> None:
    """The standard library's pool never sees `setting` change."""
    out = ours("""
        import sqlite3
        count, connection, setting, limits, model = 0, None, "a", [0], None
        def load():
            global model
            model = "loaded"
        def visit():
            global count, connection
            count += 1
            if connection is None:
                connection = sqlite3.connect(":memory:")
                connection.execute("create table visits (n)")
            connection.execute("insert into visits values (?)", (count,))
            n = connection.execute("select count(*) from visits").fetchone()[0]
            return f"{setting}{limits[0]}{count}{n}{model}"
        with Pool(1, initializer=load) as pool:
            for setting in "aabc":
                limits[0] += 1
                print(pool.submit(visit).result(), end=" ")
            count = 10
            print(pool.submit(visit).result(), pool.submit(visit).result())
        print(count, connection, model)
    """)
    assert out == "a111loaded a222loaded b333loaded c444loaded c4115loaded c4126loaded\n" + (
        "10 None None\n"
    )


def test_the_state_of_a_module_lives_as_long_as_its_worker(ours: Program) -> None:
    ours.write("helper.py", "calls = []\ndef call(x): calls.append(x); return list(calls)\n")
    out = ours("""
        import helper
        with Pool(1) as pool:
            print([pool.submit(helper.call, i).result() for i in range(3)])
        with Pool(1, max_tasks_per_child=2) as pool:
            print([pool.submit(helper.call, i).result() for i in range(5)])
        print(helper.calls)
    """)
    assert out == "[[0], [0, 1], [0, 1, 2]]\n[[0], [0, 1], [2], [2, 3], [4]]\n[]\n"


def test_closures_and_globals_that_change_between_submits(ours: Program) -> None:
    out = ours("""
        def counter():
            n = 0
            def bump():
                nonlocal n
                n += 1
            return bump, lambda: n
        bump, read = counter()
        table = {"x": 1}
        def look(): return table["x"], helper()
        def helper(): return "old"
        with Pool(1) as pool:
            print(pool.submit(read).result(), pool.submit(look).result())
            bump()
            table["x"] = 2
            def helper(): return "new"
            print(pool.submit(read).result(), pool.submit(look).result())
            for i in range(3): print(pool.submit(lambda: i).result(), end=" ")
            print([f.result() for f in [pool.submit(lambda: i) for i in range(3)]])
    """)
    assert out == "0 (1, 'old')\n1 (2, 'new')\n0 1 2 [0, 1, 2]\n"


def test_functools_of_the_script(both: Program) -> None:
    out = both("""
        import functools
        made = []
        @functools.lru_cache(maxsize=None)
        def square(n):
            made.append(n)
            return n * n
        def squares(*ns):
            return [square(n) for n in ns], made, square.cache_info().hits
        @functools.singledispatch
        def name(x): return "object"
        @name.register
        def _(x: int): return "int"
        @name.register(list)
        def _(x): return "list of " + name(x[0])
        class Circle:
            def __init__(self, r): self.r = r
            @functools.cached_property
            def area(self):
                made.append("area")
                return 3 * self.r ** 2
        def areas(c): return c.area, c.area, made[-2:]
        with Pool(1) as pool:
            print(pool.submit(square, 3).result())
            print(pool.submit(squares, 3, 4, 4).result())
            print(list(pool.map(name, [1, [2], "x"])))
            circle = Circle(2)
            print(pool.submit(areas, circle).result(), vars(circle))
            print(pool.submit(functools.partial(pow, 2), 5).result())
        print(made, square.cache_info().currsize)
    """)
    assert out == (
        "9\n([9, 16, 16], [3, 4], 2)\n['int', 'list of int', 'object']\n"
        "(12, 12, [4, 'area']) {'r': 2}\n32\n[] 0\n"
    )


def test_classes_of_the_script(both: Program) -> None:
    out = both("""
        import collections, dataclasses, enum, typing
        @dataclasses.dataclass(frozen=True)
        class Point:
            x: int
            tags: list = dataclasses.field(default_factory=list)
        class Colour(enum.Enum):
            RED = 1
            BLUE = enum.auto()
        class Access(enum.Flag):
            READ = 1
            WRITE = 2
        Pair = collections.namedtuple("Pair", "a b")
        class Row(typing.NamedTuple):
            name: str
            pair: Pair
        class Outer:
            class Inner:
                def __eq__(self, other): return type(other) is Outer.Inner
                __hash__ = None
            @classmethod
            def make(cls): return cls.Inner()
            @staticmethod
            def plain(x): return x
            def method(self, x): return self, x
        class Slotted:
            __slots__ = ("v",)
        class Failed(Exception):
            def __init__(self, code): super().__init__(code); self.code = code
        def back(x): return type(x).__name__, x
        def check(colour, access):
            return colour is Colour.RED, isinstance(colour, Colour), Access.READ in access
        def fail(): raise Failed(7)
        def slot(s): s.v += 1; return s
        with Pool(2) as pool:
            values = [Point(1), Colour.BLUE, Access.READ | Access.WRITE, Pair(1, 2),
                      Row("r", Pair(1, 2)), Outer.Inner(), Point]
            for value in values:
                name, got = pool.submit(back, value).result()
                assert type(got) is type(value) and got == value, value
                print(name, end=" ")
            print(pool.submit(back, Colour.RED).result()[1] is Colour.RED)
            print(pool.submit(check, Colour.RED, Access.READ).result())
            print(type(pool.submit(Outer.make).result()) is Outer.Inner,
                  pool.submit(Outer.plain, 3).result(),
                  type(pool.submit(Outer().method, 3).result()[0]) is Outer)
            s = Slotted()
            s.v = 1
            print(pool.submit(slot, s).result().v, s.v)
            try:
                pool.submit(fail).result()
            except Failed as error:
                print("Failed", error.code)
    """)
    assert out == (
        "Point Colour Access Pair Row Inner type True\n"
        + "(True, True, True)\nTrue 3 True\n2 1\nFailed 7\n"
    )


@pytest.mark.parametrize("library", ["attrs", "pydantic"])
def test_classes_made_with_libraries(both: Program, library: str) -> None:
    pytest.importorskip(library)
    texts = {
        "attrs": """
            import attrs, typing
            @attrs.define
            class Item:
                name: str
                price: int = attrs.field(validator=attrs.validators.ge(0))
            @attrs.frozen(slots=False)
            class Order:
                items: typing.List[Item] = attrs.field(factory=list)
            Refused = ValueError
        """,
        "pydantic": """
            import pydantic, typing
            class Item(pydantic.BaseModel):
                name: str
                price: int = pydantic.Field(ge=0)
                @pydantic.field_validator("name")
                @classmethod
                def lower(cls, v): return v.lower()
            class Order(pydantic.BaseModel):
                items: typing.List[Item] = []
                @pydantic.computed_field
                @property
                def total(self) -> int: return sum(i.price for i in self.items)
            Refused = pydantic.ValidationError
        """,
    }
    both.write("head.txt", texts[library])
    out = both("""
        import pathlib
        head = pathlib.Path(__file__).with_name("head.txt").read_text()
        exec(compile(head, __file__, "exec"))
        def double(order):
            assert type(order) is Order and type(order.items[0]) is Item
            return Order(items=[Item(name=i.name, price=i.price * 2) for i in order.items])
        def refuse(): return Item(name="x", price=-1)
        with Pool(2) as pool:
            order = Order(items=[Item(name="a", price=2)])
            for _ in range(3):
                order = pool.submit(double, order).result()
            print(type(order) is Order, type(order.items[0]) is Item, order.items[0].price)
            error = pool.submit(refuse).exception()
            print(isinstance(error, Refused))
    """)
    assert out == "True True 16\nTrue\n"


def test_redefined_classes_and_functions(ours: Program) -> None:
    out = ours("""
        class C:
            def v(self): return 1
        def make(): return C()
        def read(c): return isinstance(c, C), c.v()
        with Pool(1) as pool:
            old = pool.submit(make).result()
            print(type(old) is C, pool.submit(read, old).result())
            class C:
                def v(self): return 2
            new = pool.submit(make).result()
            print(type(new) is C, pool.submit(read, new).result(), type(old) is C)
            print(pool.submit(read, old).result())
            def make(): return "made", C()
            print(pool.submit(make).result()[0])
    """)
    assert out == "True (True, 1)\nTrue (True, 2) False\n(False, 1)\nmade\n"


def test_the_qualified_name_of_a_nested_class(ours: Program) -> None:
    out = ours("""
        import dataclasses, pickle
        class Outer:
            @dataclasses.dataclass
            class Inner:
                x: int
        def by_name():
            return str(Outer.Inner(1)), type(pickle.loads(pickle.dumps(Outer.Inner(1))))
        with Pool(1) as pool:
            text, kind = pool.submit(by_name).result()
            print(text, kind is Outer.Inner)
    """)
    assert out == "Outer.Inner(x=1) True\n"
