"""Stores of every kind of plan, and a tenant that is to join them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common import (
    Store,
    build_store,
)
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
    "several copies": {"policy": "medoid", "extra": 1.0},
    "merged": {"policy": "merge", "extra": 0.5},
    "residuals": {"policy": "residual"},
    "signs in bfloat16": {"policy": "sign", "extra": 0.15, "dtype": "bfloat16"},
}


@pytest.fixture(params=PLANS)
def store(request: pytest.FixtureRequest, family: Family, tmp_path: Path) -> Store:
    return build_store(tmp_path / "store", family.paths, **PLANS[request.param])
