"""Warming up runs steps of every size and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest

from common import (
    SchedulerOptions,
)
from common.serving.fake import answer, fake_engine
from tests.common.serving.requests import TENANTS, params


@pytest.mark.parametrize(
    ("most", "backend"),
    [(1, {}), (6, {}), (8, {"ready": 1}), (16, {"room": 120}), (4, {"room": 8})],
    ids=str,
)
def test_warming_up_leaves_nothing_behind(most: int, backend: dict[str, Any]) -> None:
    engine, fake = fake_engine(TENANTS, SchedulerOptions(max_num_seqs=most), **backend)
    engine.warm_up()
    assert fake.used == 0
    assert max(len(parts) for parts in fake.steps) <= most
    mixed = [parts for parts in fake.steps if len({tenant for tenant, _ in parts}) > 1]
    if not backend:
        # Every power of two that a step may hold, and all places at once; beside another tenant,
        # too.
        assert {1 << n for n in range(most.bit_length())} | {most} <= {
            len(parts) for parts in fake.steps
        }
        assert bool(mixed) == (most > 1)
    assert engine.stats()["tenants"]["a"]["generation_tokens"] == 0
    assert list(engine.generate("b", [3, 4], params(3)).token_ids) == answer("b", [3, 4], 3)
