"""A build that was stopped goes on where it was, and makes what one in one go makes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import common.build.unfinished
import common.planning.measurements
from common import Store, build_store
from common.build.calibration import calibrate
from common.store.unfinished import FOLDER
from tests import helpers
from tests.oracle.build.case import Case


class Stopping:
    """A `Progress` that is interrupted after some parts of a step, and counts those done."""

    def __init__(self, what: str = "", parts: int = 0, stop: type[BaseException] | None = None):
        self.done: dict[str, int] = {}
        self._at, self._stop = (what, parts), stop

    @contextmanager
    def __call__(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        def advance() -> None:
            self.done[what] = self.done.get(what, 0) + 1
            if self._stop is not None and (what, self.done[what]) == self._at:
                raise self._stop

        yield advance


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(tenant) of each calibration and (curves, position) of each spectrum that is measured."""
    seen: list[Any] = []

    def watched(store: Store, sets: Any, **rest: Any) -> Any:
        seen.extend(sets)
        return calibrate(store, sets, **rest)

    from common.planning.planner import Planner

    spectra = Planner._measure_spectra

    def measure(self: Planner, p: int, *rest: Any) -> None:
        before = set(self._spectra)
        spectra(self, p, *rest)
        seen.extend(set(self._spectra) - before)

    monkeypatch.setattr(common.build.unfinished, "calibrate", watched)
    monkeypatch.setattr(Planner, "_measure_spectra", measure)
    monkeypatch.setattr(common.planning.measurements, "WRITE_SECONDS", 0.0)
    return seen


def build(case: Case, path: Path, progress: Any) -> Store:
    return build_store(path, case.paths, calibration=case.sets, extra=0.3, progress=progress)


def content(store: Store) -> tuple[Any, ...]:
    manifest = store.manifest
    return manifest.plan, manifest.merged, manifest.residuals, sorted(manifest.objects)


def test_a_stopped_build_goes_on(mixtral: Case, tmp_path: Path, measured: list[Any]) -> None:
    whole = build(mixtral, tmp_path / "whole", Stopping())
    everything = list(measured)
    path, staging = tmp_path / "store", tmp_path / ".store.building"

    measured.clear()
    with pytest.raises(KeyboardInterrupt):
        build(mixtral, path, Stopping("calibrating", 2, KeyboardInterrupt))
    assert not path.exists() and (staging / FOLDER).is_dir()
    assert measured == list(mixtral.sets), "the third tenant was not reached"
    assert len(list((staging / FOLDER).iterdir())) == 2

    measured.clear()
    with pytest.raises(KeyboardInterrupt):
        build(mixtral, path, Stopping("measuring candidates", 3, KeyboardInterrupt))
    assert measured[0] == list(mixtral.sets)[2], "the others are known"
    begun = set(measured[1:])

    measured.clear()
    found = build(mixtral, path, Stopping())
    assert measured and not set(measured) & set(mixtral.sets)
    assert len(measured) < len([m for m in everything if isinstance(m, tuple)])
    assert begun | set(measured) == {m for m in everything if isinstance(m, tuple)}
    assert content(found) == content(whole) and found.verify() == []
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert not (path / FOLDER).exists()


def test_what_was_measured_for_others_is_not_used(
    mixtral: Case, tmp_path: Path, measured: list[Any]
) -> None:
    path = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        build(mixtral, path, Stopping("measuring candidates", 3, KeyboardInterrupt))
    measured.clear()
    two = dict(list(mixtral.paths.items())[:2])
    sets = {name: mixtral.sets[name] for name in two}
    found = build_store(path, two, calibration=sets, extra=0.3)
    assert [m for m in measured if not isinstance(m, tuple)] == list(two)
    plain = build_store(tmp_path / "plain", two, calibration=sets, extra=0.3)
    assert content(found) == content(plain)


def test_a_store_that_is_there_stays_and_goes_on(
    mixtral: Case, tmp_path: Path, measured: list[Any]
) -> None:
    path = tmp_path / "store"
    old = build_store(path, mixtral.paths, policy="round_robin")
    with pytest.raises(KeyboardInterrupt):
        build(mixtral, path, Stopping("measuring candidates", 3, KeyboardInterrupt))
    assert content(Store.open(path)) == content(old) and Store.open(path).verify() == []
    assert (path / FOLDER).exists()
    measured.clear()
    build(mixtral, path, Stopping())
    assert not set(measured) & set(mixtral.sets) and not (path / FOLDER).exists()


def test_a_build_that_fails_leaves_nothing(mixtral: Case, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        build(mixtral, tmp_path / "store", Stopping("measuring candidates", 1, ZeroDivisionError))
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from common import build_store
from common.build.examples import CalibrationSet
from tests.oracle.build.test_unfinished import Stopping
import common.planning.measurements

class Kill(BaseException):
    def __init__(self):
        os.kill(os.getpid(), signal.SIGKILL)

common.planning.measurements.WRITE_SECONDS = 0.0
paths = dict(pair.split("=") for pair in sys.argv[2:])
sets = {name: CalibrationSet.texts([[5, 6, 7, 8]]) for name in paths}
progress = Stopping("measuring candidates", 3, Kill)
build_store(sys.argv[1], paths, calibration=sets, extra=0.3, progress=progress)
"""


def test_a_killed_build_goes_on(mixtral: Case, tmp_path: Path, measured: list[Any]) -> None:
    from common.build.examples import CalibrationSet

    path = tmp_path / "store"
    pairs = [f"{name}={where}" for name, where in mixtral.paths.items()]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), *pairs], cwd=helpers.REPOSITORY, check=False
    )
    assert done.returncode == -signal.SIGKILL and not path.exists()
    sets = {name: CalibrationSet.texts([[5, 6, 7, 8]]) for name in mixtral.paths}
    found = build_store(path, mixtral.paths, calibration=sets, extra=0.3)
    assert measured and not set(measured) & set(sets), "calibration is known"
    assert found.verify() == [] and [p.name for p in tmp_path.iterdir()] == ["store"]
