"""Checkpoints that do not fit the tenants of a test's family, or hold what is no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import checkpoints
from tests.common.conftest import Family


def other(tmp_path: Path, **changes: Any) -> Path:
    return checkpoints.save(checkpoints.random_mixtral(9, **changes), tmp_path / "other")


def poisoned(family: Family, tmp_path: Path, name: str, value: float) -> Path:
    return checkpoints.save(
        family.models[0].changed(name, lambda w: w.put(7, value)), tmp_path / "poisoned"
    )


EXPERTS = "model.layers.1.block_sparse_moe.experts.0.w2.weight"
