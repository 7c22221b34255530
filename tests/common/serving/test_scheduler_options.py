"""Options of the scheduler: what is wrong with one is said by name."""

from __future__ import annotations

import dataclasses
import math

import pytest

from common import (
    EngineError,
    SchedulerOptions,
    UnknownTenantError,
)
from common.serving.fake import fake_engine
from tests.common.serving.requests import TENANTS


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[
            (n, v)
            for n in ("max_num_seqs", "max_num_batched_tokens", "max_queue")
            for v in (0, -1, True, "4", None)
        ],
        *[
            (n, 0)
            for n in ("prefill_chunk", "max_model_len", "max_queue_per_tenant", "default_limit")
        ],
        ("weights", {"a": 0}),
        ("limits", {"a": 0}),
        ("max_interference", -0.1),
        ("max_interference", math.nan),
        ("max_interference", True),
        ("switch_share", 0),
    ],
)
def test_bad_options_are_named(option: str, value: object) -> None:
    name = option if option not in ("weights", "limits") else f"the {option[:-1]} of tenant 'a'"
    with pytest.raises(EngineError, match=f"{name} is .*; give"):
        SchedulerOptions(**{option: value})


def test_options_that_contradict_each_other_or_name_strangers() -> None:
    with pytest.raises(EngineError, match="max_num_batched_tokens is 4, fewer than max_num_seqs"):
        SchedulerOptions(max_num_seqs=8, max_num_batched_tokens=4)
    with pytest.raises(UnknownTenantError, match="no tenant 'x'"):
        fake_engine(TENANTS, SchedulerOptions(weights={"x": 1.0}))


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SchedulerOptions().max_queue = 1  # type: ignore[misc]
