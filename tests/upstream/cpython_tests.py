"""Finds CPython's `test.test_concurrent_futures` for the interpreter at hand.

Some distributions leave it out. Then it may come from another installation, the
same minor version first: Debian has it in `libpython3.11-testsuite`, and pyenv's 3.13
comes with it. It runs with this interpreter's own `test.support` all the same.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

__all__ = ["NAME", "VARIABLE", "find", "import_from"]

NAME = "test_concurrent_futures"
VARIABLE = "ZMQEXECUTOR_CPYTHON_TESTS"
"""Names a `test` directory of a CPython, to be used before any other."""

Version = tuple[int, int]

# What `test.support` got later than 3.11, as tests of a later version need it.
LATER = """
if "Py_GIL_DISABLED" not in globals():
    Py_GIL_DISABLED = False

    def requires_gil_enabled(message="", /):
        return message if callable(message) else lambda test: test

try:
    check_sanitizer(thread=True)
except TypeError:
    def check_sanitizer(**kinds):
        return False

    def skip_if_sanitizer(*reason, **kinds):
        return lambda test: test

def _sleeping_retry(timeout, err_msg=None, /, **options):
    import time
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        yield
        time.sleep(0.01)
    raise AssertionError(err_msg or "timed out")

sleeping_retry = globals().get("sleeping_retry", _sleeping_retry)
"""


def find() -> tuple[Path | None, str]:
    """Return the file or package of the tests, or None and the reason."""
    own = Path(sysconfig.get_path("stdlib")) / "test"
    here = sys.version_info[:2]
    if named := os.environ.get(VARIABLE):
        candidates = [(here, Path(named))]
    else:
        candidates = [(here, own), *sorted(_elsewhere(here), key=lambda found: found[0])]
    if not (own / "support").is_dir():
        return None, f"{own} has no `support`, which the tests of any version need"
    for _, directory in candidates:
        for suite in (directory / NAME, directory / f"{NAME}.py"):
            if suite.exists():
                return suite, ""
    places = ", ".join(str(directory) for _, directory in candidates)
    return None, f"no {NAME} for Python {here[0]}.{here[1]} or later in {places}"


def _elsewhere(here: Version) -> Iterator[tuple[Version, Path]]:
    """Yield the test directories of other installations, of this version or later."""
    prefixes = [Path("/usr"), Path("/usr/local"), *Path(sys.base_prefix).parent.glob("*")]
    for prefix in prefixes:
        for directory in prefix.glob("lib/python3.*/test"):
            match = re.fullmatch(r"python(3)\.(\d+)", directory.parent.name)
            if match and (version := (int(match[1]), int(match[2]))) >= here:
                yield version, directory


def import_from(suite: Path, scratch: Path) -> None:
    """Make `import test.test_concurrent_futures` find this suite, here and in workers.

    If it is not this interpreter's own, a package `test` in front of the standard
    library's has links to it and to everything of ours.
    """
    own = Path(sysconfig.get_path("stdlib")) / "test"
    if suite.parent == own:
        return
    package = scratch / "test"
    package.mkdir()
    for entry in own.iterdir():
        if entry.name not in ("support", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    (package / suite.name).symlink_to(suite)
    support = package / "support"
    support.mkdir()
    path = own / "support" / "__init__.py"
    (support / "__init__.py").write_text(
        f"__path__ = [{str(path.parent)!r}]\n"
        f"exec(compile(open({str(path)!r}).read(), {str(path)!r}, 'exec'))\n" + LATER
    )
    sys.path.insert(0, str(scratch))
    for name in [name for name in sys.modules if name.split(".")[0] == "test"]:
        del sys.modules[name]
    found = importlib.util.find_spec("test")
    assert found is not None
    assert found.origin == str(package / "__init__.py")
