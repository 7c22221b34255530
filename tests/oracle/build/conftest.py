"""Tenants with examples to calibrate them on, of each family."""

from __future__ import annotations

import pytest

from common import build_store
from common.build.examples import CalibrationSet, Example
from tests import helpers, switch_models
from tests.helpers import prompts
from tests.oracle.build.case import NAMES, SIZES, Case


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("mixtral")
    base = helpers.random_mixtral(0, **SIZES)
    models = [base, helpers.tuned(base, 1), helpers.tuned(base, 2)]
    paths = {n: helpers.save(m, root / n) for n, m in zip(NAMES, models, strict=True)}
    sets = {n: CalibrationSet.texts(prompts(i, [20, 9, 14])) for i, n in enumerate(NAMES)}
    build_store(root / "store", paths, policy="round_robin")
    return Case(root, paths, models, sets)


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Case:
    pytest.importorskip("jax")
    root = tmp_path_factory.mktemp("switch")
    base = switch_models.random_switch(0, num_experts=3, d_model=16, d_ff=24)
    models = [base, switch_models.tuned(base, 1)]
    paths = {n: helpers.save(m, root / n) for n, m in zip(NAMES, models, strict=False)}
    sets = {
        n: CalibrationSet(
            tuple(
                Example(p, p[:k]) for p, k in zip(prompts(i, [20, 9, 14]), (6, 0, 9), strict=True)
            )
        )
        for i, n in enumerate(paths)
    }
    build_store(root / "store", paths, policy="round_robin")
    return Case(root, paths, models, sets)
