"""What a measurement was made on: date, machine, versions, command."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.version import __version__


def provenance() -> dict[str, Any]:
    """Date, machine, versions, command."""
    name = platform.processor() or platform.machine()
    try:
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        name = found[1] if found else name
    except OSError:
        pass
    versions = {"moetel": __version__, "python": platform.python_version()}
    for package in ("numpy", "torch", "jax", "transformers", "rouge-score"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{name}, {os.cpu_count()} cores, {platform.system()}",
        "versions": versions,
        "command": _command(),
    }


def _command() -> str:
    """What was typed, without the folders of the interpreter and of scripts."""
    if sys.orig_argv[1:2] == ["-m"]:
        return shlex.join(["python", *sys.orig_argv[1:]])
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
