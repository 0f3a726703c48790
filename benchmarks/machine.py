"""What the figures belong to: the machine, and versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = [
    "zmqexecutor",
    "pyzmq",
    "msgspec",
    "cloudpickle",
    "circus",
    "numpy",
    "scipy",
    "pillow",
    "loky",
    "joblib",
    "pebble",
    "mpire",
    "executorlib",
    "distributed",
    "ipyparallel",
    "parsl",
    "ray",
]


def describe() -> dict[str, str]:
    """Short texts, to be shown one a line."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} of them, {_usable()} usable",
        "memory": _memory(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": ", ".join(_versions()),
        "load at the start": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _usable() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            pass  # it is not among the peers of this run
    return found
