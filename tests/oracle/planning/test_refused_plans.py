"""What cannot be planned is refused with the mend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import PlanError, Store, StoreError, UnknownTenantError, build_store
from common.build.build import replan
from common.build.examples import CalibrationSet
from tests import helpers
from tests.oracle.planning.case import Case, planner, tiny


def test_what_cannot_be_planned_is_refused(mixtral: Case, tmp_path: Path) -> None:
    path = mixtral.path
    before = Store.open(path).plan
    refused: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (
            PlanError,
            "no policy 'best'; there is: round_robin, fit",
            lambda: replan(path, policy="best"),
        ),
        (PlanError, "no policy 'best'", lambda: planner(Store.open(path)).plan("best")),
        (PlanError, "'all' shares nothing", lambda: planner(Store.open(path)).plan("all")),
        (PlanError, "'all' keeps all that", lambda: replan(path, policy="all", slots=3)),
        (PlanError, "no policy 'best'", lambda: planner(Store.open(path)).allocator("best")),
        (
            PlanError,
            "'mean' keeps one copy a position and has no use",
            lambda: replan(path, policy="mean", extra=0.1),
        ),
        (
            PlanError,
            "'round_robin' keeps one copy",
            lambda: replan(path, policy="round_robin", extra=0.1),
        ),
        (PlanError, "extra is -0.1", lambda: replan(path, extra=-0.1)),
        (PlanError, "extra is nan", lambda: replan(path, extra=float("nan"))),
        (PlanError, "extra is '15%'", lambda: replan(path, extra="15%")),  # type: ignore[arg-type]
        (PlanError, "give one of slots, a budget", lambda: replan(path, extra=0.1, slots=3)),
        (PlanError, "7 slots, but 6 positions", lambda: replan(path, slots=7)),
        (
            PlanError,
            "slots is 9; give a whole number 0..6",
            lambda: planner(Store.open(path)).plan("fit", slots=9),
        ),
        (
            PlanError,
            "slots is True; give a whole",
            lambda: planner(Store.open(path)).plan("fit", slots=True),
        ),
        (
            PlanError,
            "slots is 2.5; give a whole",
            lambda: planner(Store.open(path)).plan("fit", slots=2.5),
        ),  # type: ignore[arg-type]
        (
            PlanError,
            "extra_bytes is True; give",
            lambda: planner(Store.open(path)).plan("fit", extra_bytes=True),
        ),
        (
            PlanError,
            "extra_bytes is -1; give",
            lambda: planner(Store.open(path)).plan("fit", extra_bytes=-1),
        ),
        (PlanError, "slots is True; give a whole number", lambda: replan(path, slots=True)),
        (
            PlanError,
            "budget_bytes is True; give a whole number",
            lambda: replan(path, budget_bytes=True),
        ),
        (PlanError, "extra is True; give a share", lambda: replan(path, extra=True)),
        (
            PlanError,
            "traffic of 'ana' is True",
            lambda: replan(path, policy="fit", traffic={"ana": True}),
        ),
        (
            PlanError,
            "traffic is given for 'eve'",
            lambda: replan(path, policy="fit", traffic={"eve": 1.0}),
        ),
        (
            PlanError,
            "traffic of 'ana' is 0",
            lambda: replan(path, policy="fit", traffic={"ana": 0}),
        ),
        (
            PlanError,
            "traffic of 'ana' is nan",
            lambda: replan(path, policy="fit", traffic={"ana": float("nan")}),
        ),
        (PlanError, "traffic of 'ana' is 'much'", lambda: replan(path, traffic={"ana": "much"})),  # type: ignore[dict-item]
        (
            UnknownTenantError,
            "no tenant 'eve'",
            lambda: replan(path, calibration={"eve": CalibrationSet.of([[3]])}),
        ),
    ]
    for kind, message, attempt in refused:
        with pytest.raises(kind, match=message):
            attempt()
    assert Store.open(path).plan == before
    checkpoint = helpers.save(tiny(), tmp_path / "a")
    for what, options in [
        ("calibration is given for 'eve'", {"calibration": {"eve": CalibrationSet.of([[3]])}}),
        ("traffic is given for 'eve'", {"traffic": {"eve": 1.0}}),
    ]:
        with pytest.raises(StoreError, match=what):
            build_store(tmp_path / "new", {"a": checkpoint}, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()
