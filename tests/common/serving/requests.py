"""Requests to an engine over the fake backend, and steps until all are answered."""

from __future__ import annotations

from typing import Any

from common import (
    SamplingParams,
)
from common.serving.block_pool import BlockPool
from common.serving.engine import Engine

TENANTS = ("a", "b", "c", "d")


def params(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, **more)


def finish(engine: Engine, most: int = 10_000) -> None:
    for _ in range(most):
        if not engine.step():
            return
    raise AssertionError(f"not done after {most} steps")


def check_integrity(pool: BlockPool) -> None:
    """Every block is empty, idle or used, and what is known of it is known both ways."""
    used = {block for block, users in enumerate(pool._users) if users}
    places = [*pool._empty, *pool._idle, *used]
    assert sorted(places) == list(range(pool.num_blocks))
    assert min(pool._users) >= 0
    assert {block: digest for digest, block in pool._blocks.items()} == pool._digests
    assert set(pool._idle) <= set(pool._digests) and not set(pool._empty) & set(pool._digests)
