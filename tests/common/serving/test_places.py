"""Who gets how many of a step's places, and whose prompts are read first."""

from __future__ import annotations

import math

from common import (
    SchedulerOptions,
)
from common.serving.fake import fake_engine
from tests.common.serving.requests import TENANTS, params


def test_places_are_shared_by_weight_and_limits_hold() -> None:
    weights, limits = {"a": 2.0}, {"d": 1}
    options = SchedulerOptions(
        max_num_seqs=12, prefill_chunk=64, weights=weights, limits=limits, max_interference=math.inf
    )
    engine, backend = fake_engine(TENANTS, options)
    for name in TENANTS:
        for _ in range(20):
            engine.submit(name, [1, 2], params(30, ignore_eos=True))
    for _ in range(40):
        engine.step()
    counts = [
        {n: sum(name == n for name, _ in step) for n in TENANTS} for step in backend.steps[20:40]
    ]
    for count in counts:
        assert sum(count.values()) == 12 and count["d"] == 1
        assert count["a"] in (5, 6) and {count["b"], count["c"]} <= {2, 3}


def test_service_is_shared_by_tokens_not_by_requests() -> None:
    """Long answers of one tenant count for what they are: the tenant of short ones is served more
    often."""
    engine, backend = fake_engine(
        TENANTS,
        SchedulerOptions(max_num_seqs=1, max_num_batched_tokens=64, max_interference=math.inf),
    )
    for _ in range(30):
        engine.submit("a", [1] * 2, params(40, ignore_eos=True))
        engine.submit("b", [2] * 2, params(4, ignore_eos=True))
    for _ in range(400):
        engine.step()
    served = [sum(1 for s in backend.steps for name, p in s if name == n) for n in "ab"]
    assert abs(served[0] - 400 + served[1]) <= 1
    assert served[1] >= 110  # its thirty requests need 120


def test_an_idle_tenant_saves_up_no_service() -> None:
    engine, backend = fake_engine(
        TENANTS, SchedulerOptions(max_num_seqs=2, max_interference=math.inf)
    )
    for _ in range(50):
        engine.submit("a", [1] * 4, params(20, ignore_eos=True))
    for _ in range(300):
        engine.step()
    for _ in range(50):
        engine.submit("b", [2] * 4, params(20, ignore_eos=True))
    begun = len(backend.steps)
    for _ in range(100):
        engine.step()
    both = [{name for name, _ in s} for s in backend.steps[begun + 1 :]]
    assert all(names == {"a", "b"} for names in both)
