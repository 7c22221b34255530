"""The simulation runs, and what it is to show holds: exact, as its time is virtual."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import fairness
from common.serving.scheduler_options import SchedulerOptions
from scripts.load.traffic import Load, make_trace

ARITHMETIC, LITTLE, NOTHING, TENANTS = (
    fairness.Steps(*seconds) for seconds in fairness.KINDS.values()
)


def options(bound: float = SchedulerOptions.max_interference) -> SchedulerOptions:
    return SchedulerOptions(max_queue=10**9, max_interference=bound)


def test_a_lone_request_takes_its_steps() -> None:
    steps = fairness.Steps(1.0, 0.5, 0.25, noise=0.0)
    calls = make_trace({"a": 100}, Load(input_len=8, output_len=5), 1.0, num_requests=1).calls
    (answer,) = fairness.simulate(calls, options(), steps)
    assert answer.ttft_s == pytest.approx(1.0 + 0.5 + 8 * 0.25)
    assert answer.e2el_s == pytest.approx(answer.ttft_s + 4 * 1.5)


def test_saturation_is_what_full_steps_give() -> None:
    # A request takes a step for its prompt, in which its first token comes, and one for each token
    # after that.
    found = fairness.saturation(options(math.inf), fairness.Steps(1.0, 0.1, 0.0, noise=0.0))
    assert found == pytest.approx(32 / 4.2 / 25, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps", [ARITHMETIC, LITTLE], ids=["rows cost arithmetic", "rows cost a little"]
)
def test_a_flood_moves_the_others_little_and_nobody_else_pays(steps: fairness.Steps) -> None:
    unbound, bound = options(math.inf), options()
    best = fairness.saturation(unbound, steps)
    assert fairness.saturation(bound, steps) > 0.97 * best
    moved = {}
    for some in (unbound, bound):
        found = [fairness.flooded(some, steps, 0.7 * best, 60.0, seed) for seed in range(6)]
        moved[some.max_interference] = float(np.median([m for m, _ in found]))
        assert np.mean([given for _, given in found]) > 0.22 * best
    assert moved[math.inf] > 1.35
    assert moved[0.1] < 1.2
    for skew, load in ((0.0, 0.7), (1.2, 0.85)):
        a, b = (
            np.mean(
                [fairness.latency(some, steps, load * best, 60.0, seed, skew) for seed in range(4)]
            )
            for some in (bound, unbound)
        )
        assert a < (1.01 if not skew else 1.15) * b


@pytest.mark.slow
def test_where_tenants_cost_most_a_flood_brings_many_rows_to_few_steps() -> None:
    best = fairness.saturation(options(math.inf), TENANTS)
    found = [fairness.flooded(options(), TENANTS, 0.7 * best, 60.0, seed) for seed in range(6)]
    assert np.median([m for m, _ in found]) < 1.2
    # As it pays for its part in few steps, what makes steps a tenth longer gives it more than its
    # share.
    assert np.mean([given for _, given in found]) > 0.27 * best
    popular = [
        np.mean(
            [
                fairness.latency(options(bound), TENANTS, 0.85 * best, 60.0, seed, 1.2)
                for seed in range(6)
            ]
        )
        for bound in (0.1, math.inf)
    ]
    assert popular[0] < 1.1 * popular[1]


@pytest.mark.slow
def test_where_rows_cost_nothing_a_flood_takes_what_is_free() -> None:
    best = fairness.saturation(options(math.inf), NOTHING)
    for bound in (math.inf, 0.1):
        moved, given = fairness.flooded(options(bound), NOTHING, 0.7 * best, 40.0, 0)
        assert moved < 1.05 and given > 0.4 * best


@pytest.mark.slow
def test_a_batch_at_once_is_a_flood_until_the_device_could_have_answered_it() -> None:
    best = fairness.saturation(options(math.inf), LITTLE)
    moved = [
        fairness.flooded(options(b), LITTLE, 0.7 * best, 400.0, 0, round(100 * best))[0]
        for b in (math.inf, 0.1)
    ]
    assert moved[0] > 1.25
    assert moved[1] < 1.16


@pytest.mark.slow
def test_the_tables(tmp_path: Path) -> None:
    small = ["--seeds=2", "--num-requests=40", "--steps", "0.05", "0.002", "0.0001", "0.01"]
    (rows,) = fairness.main(
        [*small, f"--json={tmp_path / 'rows.json'}", f"--markdown={tmp_path / 'table.md'}"]
    )
    assert [row["max_interference"] for row in rows] == ["inf", "0.1"]
    assert json.loads((tmp_path / "rows.json").read_text())[0]["rows"][0]["flood"]["median"] > 1
    assert "| inf |" in (tmp_path / "table.md").read_text()
