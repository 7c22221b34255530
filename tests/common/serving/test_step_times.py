"""What a row adds to a step is found from steps as machines take them."""

from __future__ import annotations

import numpy as np
import pytest

from common.serving.step_times import FEWEST, WINDOW, StepTimes


def taken(
    row_s: float,
    *,
    noise: float = 0.0,
    rows: range = range(8, 29),
    stalls: int = 0,
    steps: int = WINDOW,
    seed: int = 0,
) -> StepTimes:
    """Steps of 60 ms, `row_s` a row and 2 ms a token of the prompts that some of them read."""
    rng = np.random.default_rng(seed)
    times = StepTimes()
    for i in range(steps):
        count, read = int(rng.integers(rows.start, rows.stop)), int(rng.choice([0, 0, 32, 64]))
        seconds = 0.06 + row_s * count + 0.002 * read
        seconds *= 1 + noise * rng.standard_normal()
        times.add(2, count, read, 20.0 if i % WINDOW < stalls else seconds)
    return times


def test_a_line_is_found_beside_prompts() -> None:
    times = taken(0.003)
    assert times.row_s == pytest.approx(0.003, rel=0.01)
    assert times.token_s == pytest.approx(0.002, rel=0.01)
    assert times.empty_s == pytest.approx(0.06, rel=0.02)
    assert times.seconds(2, 20, 24) == pytest.approx(0.06 + 0.06 + 0.048, rel=0.01)
    # On average 24 tokens are read beside 18 rows.
    assert times.read_per_row == pytest.approx(24 / 18, rel=0.15)


def test_what_a_tenant_adds_is_told_from_what_its_rows_add() -> None:
    """Where each brings one or two rows, rows come with tenants."""
    rng = np.random.default_rng(0)
    times = StepTimes()
    for _ in range(WINDOW):
        rows = rng.integers(1, 3, size=rng.integers(1, 5))
        seconds = 0.01 + 0.02 * len(rows) + 0.002 * rows.sum()
        times.add(len(rows), int(rows.sum()), 0, seconds * (1 + 0.05 * rng.standard_normal()))
    assert times.tenant_s == pytest.approx(0.02, rel=0.15)
    assert times.row_s == pytest.approx(0.002, abs=0.0015)
    assert times.seconds(3, 5) == pytest.approx(0.08, rel=0.03)
    # Five times as many rows as there ever were, of as many tenants.
    assert times.seconds(4, 32) == pytest.approx(0.154, rel=0.25)


def test_tenants_that_never_varied_cost_nothing_that_is_known() -> None:
    times = taken(0.003)
    assert times.tenant_s == 0
    assert times.seconds(0, 20) == times.seconds(4, 20)


def test_where_rows_cost_nothing_nothing_is_found() -> None:
    assert taken(0.0).row_s < 1e-5
    assert taken(-0.001).row_s == 0


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_hardly_varied_say_little(seed: int) -> None:
    """Noise of a tenth among steps of one size is not taken for what rows cost, nor is one step
    that took long."""
    times = taken(0.0, noise=0.1, rows=range(20, 21), seed=seed)
    assert times.row_s == 0.0
    times.add(2, 21, 0, 0.3)  # 0.2 s more than the others
    for _ in range(16):
        times.add(2, 20, 0, 0.1)
    assert 0 < times.row_s < 0.005


def test_nothing_is_said_of_few_steps_or_of_a_clock_that_stands() -> None:
    few = taken(0.003, steps=FEWEST - 1)
    assert few.row_s == few.empty_s == few.seconds(2, 4) == 0
    times = StepTimes()
    for rows in range(WINDOW):
        times.add(2, rows % 20, 0, 0.0)
    assert times.row_s == times.seconds(2, 4) == 0


def test_what_was_true_before_is_forgotten() -> None:
    times = taken(0.01)
    rng = np.random.default_rng(0)
    for _ in range(WINDOW):
        rows = int(rng.integers(1, 20))
        times.add(2, rows, 0, 0.05 + 0.001 * rows)
    assert times.row_s == pytest.approx(0.001, rel=0.05)


def test_a_step_costs_at_least_its_rows() -> None:
    """Extrapolated to few rows, a steep line would go below nothing."""
    times = StepTimes()
    for i in range(64):
        rows = 20 + i % 10
        times.add(2, rows, 0, 0.01 * (rows - 15))
    assert times.seconds(2, 4) == pytest.approx(4 * times.row_s)
