"""A store of small tenants for the commands that plan."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from common import build_store
from tests import helpers


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tenants and their base, planned by the paper's rule."""
    root = tmp_path_factory.mktemp("plan")
    base = helpers.random_mixtral(
        0,
        num_local_experts=3,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=1,
    )
    models = {"base": base, "ana": helpers.tuned(base, 1), "bob": helpers.tuned(base, 2)}
    paths = {n: helpers.save(m, root / n) for n, m in models.items()}
    return build_store(root / "store", paths, policy="round_robin").path


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "store")
    return tmp_path / "store"
