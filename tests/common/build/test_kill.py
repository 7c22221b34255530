"""A build killed at any moment leaves the old store or none, and the next build succeeds."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import Store, build_store
from tests import helpers
from tests.common.conftest import Family

BUILD = """
import sys
from common import build_store
print("ready", flush=True)
build_store(sys.argv[1], [pair.split("=") for pair in sys.argv[2:]])
"""


def start(path: Path, tenants: dict[str, Path]) -> subprocess.Popen[str]:
    """A process that is about to build; its imports are done when this returns."""
    command = [sys.executable, "-c", BUILD, str(path), *(f"{n}={p}" for n, p in tenants.items())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=helpers.REPOSITORY)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_fifty_killed_builds(family: Family, tmp_path: Path) -> None:
    old = {n: family.paths[n] for n in ("base", "ana")}
    begun = time.monotonic()
    process = start(tmp_path / "timed", family.paths)
    building = time.monotonic()
    assert process.wait() == 0
    duration = time.monotonic() - building
    rng = random.Random(int(begun))
    print("seed", int(begun), "a build takes", round(duration, 3), "s")  # noqa: T201
    outcomes = {"none": 0, "old": 0, "new": 0}
    for attempt in range(50):
        path = tmp_path / f"place-{attempt}" / "store"
        path.parent.mkdir()
        replacing = attempt % 2 == 1
        if replacing:
            build_store(path, old)
        process = start(path, family.paths)
        time.sleep(rng.uniform(0, 1.2 * duration))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if path.exists():
            found = Store.open(path)
            assert found.verify() == []
            assert found.tenants in (tuple(old), tuple(family.paths))
            outcomes["old" if found.tenants == tuple(old) else "new"] += 1
        else:
            assert not replacing
            outcomes["none"] += 1
        again = build_store(path, family.paths)
        assert again.verify() == []
        assert again.tenants == tuple(family.paths)
        assert again.objects.unreferenced(set(again.manifest.objects)) == []
        assert [p.name for p in path.parent.iterdir()] == ["store"]
        assert not list(path.glob("*.partial"))
    # Most moments fall inside the build: all three outcomes are seen unless the machine stands
    # still.
    assert outcomes["none"] and outcomes["old"], outcomes
