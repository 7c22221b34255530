"""Stores of every kind of plan, and a tenant that is to join them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import (
    Store,
    build_store,
)
from common.plan.plan import plan_all
from common.store.change import set_plan
from tests import checkpoints
from tests.common.conftest import Family


@pytest.fixture(scope="module")
def newcomer(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fourth tenant of the family, nearest to ana."""
    return checkpoints.save(
        checkpoints.tuned(family.models[1], 7, 0.02), tmp_path_factory.mktemp("newcomer") / "cy"
    )


# Plans of every kind: how to build each.
PLANS: dict[str, dict[str, Any]] = {
    "paper": {"policy": "round_robin"},
    "misses": {"policy": "round_robin", "slots": 5},
    "nothing shared": {"slots": "all"},
    "several copies": {"slots": "all"},
    "merged": {"policy": "merge"},
    "residuals": {"policy": "residual"},
    "signs in bfloat16": {"policy": "sign", "extra": 0.15, "dtype": "bfloat16"},
}


@pytest.fixture(params=PLANS)
def store(request: pytest.FixtureRequest, family: Family, tmp_path: Path) -> Store:
    found = build_store(tmp_path / "store", family.paths, **PLANS[request.param])
    if request.param == "several copies":  # two at each position, one of them for two tenants
        shape = (3, found.experts.num_layers, found.experts.num_experts)
        contents = np.broadcast_to(np.array([0, 1, 0])[:, None, None], shape)
        return set_plan(found.path, plan_all(contents, found.tenants))
    return found
