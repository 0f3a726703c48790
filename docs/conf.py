"""Sphinx configuration. `make docs` builds with warnings as errors."""

from __future__ import annotations

import zmqexecutor

project = "zmqexecutor"
author = "The zmqexecutor authors"
copyright = "2026, The zmqexecutor authors"  # noqa: A001
release = version = zmqexecutor.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"zmqexecutor {release}"
html_copy_source = False

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

# Docstrings write names between single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Every reference must resolve, but the standard library's cannot: the build uses
# no network.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"zmqexecutor\.[\w.]+\.[PT]"),  # type variables
    (r"py:class", r"zmqexecutor\.master\.tasks\.TaskOptions"),  # made by `options` only
    (
        r"py:.*",
        r"(_pickle|builtins|collections|concurrent|multiprocessing|os|pathlib|types|typing)\..*",
    ),
    (r"py:class", r"(Target|Initializer)"),  # names of types of functions
    (r"py:class", r"(T|TaskOptions)"),  # of the executor, which imports nothing for its types
    (
        r"py:(class|exc)",
        r"(Any|Callable|Executor|Future|Iterable|Iterator|Mapping|Sequence|Self|TracebackType)",
    ),
    (
        r"py:exc",
        r"(AttributeError|ConnectionError|KeyboardInterrupt|NotImplementedError|OSError"
        r"|RuntimeError|TimeoutError|TypeError|ValueError)",
    ),
]

doctest_test_doctest_blocks = ""  # only what is marked as an example to be run
doctest_global_setup = "from zmqexecutor import *"
