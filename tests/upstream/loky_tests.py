"""Finds loky's tests, which only its source distribution has."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

__all__ = ["VARIABLE", "VERSION", "find"]

VERSION = "3.7.0"
VARIABLE = "ZMQEXECUTOR_LOKY_SOURCE"
"""Names an unpacked source distribution; without it, one is downloaded once with pip."""

PATIENCE = 60.0  # seconds for pip


def find(cache: Path) -> tuple[Path | None, str]:
    """Return the folder with loky's `loky` and `tests`, or None and the reason."""
    if named := os.environ.get(VARIABLE):
        if (Path(named) / "tests" / "_test_process_executor.py").exists():
            return Path(named), ""
        return None, f"{VARIABLE} is {named}, which has no tests of loky"
    source = cache / f"loky-{VERSION}"
    if source.is_dir():
        return source, ""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-binary", "loky", "--dest", str(cache), f"loky=={VERSION}"]
    try:
        subprocess.run(pip, capture_output=True, text=True, timeout=PATIENCE, check=True)
        with tarfile.open(cache / f"{source.name}.tar.gz") as archive:
            archive.extractall(cache / "unpacking", filter="data")
        (cache / "unpacking" / source.name).rename(source)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "ERROR" in line or "No mod" in line]
        return None, f"pip cannot download loky {VERSION}: {' '.join(lines) or error.stderr}"
    except (OSError, subprocess.TimeoutExpired, tarfile.TarError) as error:
        return None, f"loky {VERSION} cannot be had: {error}"
    return source, ""
