"""Requests to an engine over the fake backend, and steps until all are answered."""

from __future__ import annotations

from typing import Any

from common import (
    SamplingParams,
)
from common.serving.engine import Engine

TENANTS = ("a", "b", "c", "d")


def params(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, **more)


def finish(engine: Engine, most: int = 10_000) -> None:
    for _ in range(most):
        if not engine.step():
            return
    raise AssertionError(f"not done after {most} steps")
