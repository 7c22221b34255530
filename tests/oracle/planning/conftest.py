"""Three calibrated tenants in a store, of each family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import Store, build_store
from common.build.examples import CalibrationSet, Example
from tests import helpers, switch_models
from tests.helpers import hf_logits, prompts, rest_slow
from tests.oracle.planning.case import SIZES, Case, calibration

SWITCH = {"num_experts": 3, "d_model": 24, "d_ff": 40}


def _mixtral(root: Path) -> Case:
    base = helpers.random_mixtral(0, **SIZES)
    models = [base, helpers.tuned(base, 1, 0.03), helpers.tuned(base, 2, 0.03)]
    paths = {
        n: helpers.save(m, root / n) for n, m in zip(("base", "ana", "bob"), models, strict=True)
    }
    build_store(root / "store", paths, policy="medoid", extra=0, calibration=calibration())

    def logits_of(model: Any, rows: list[list[int]]) -> list[np.ndarray]:
        return [hf_logits(model, [row])[0] for row in rows]

    return Case(
        root / "store",
        models,
        logits_of,
        lambda store, t: helpers.oracle_of_store(store, models, t),
    )


def _switch(root: Path, gated: bool) -> Case:
    pytest.importorskip("jax")
    base = switch_models.random_switch(0, gated=gated, **SWITCH)
    models = [base, switch_models.tuned(base, 1, 0.03), switch_models.tuned(base, 2, 0.03)]
    paths = {
        n: helpers.save(m, root / n) for n, m in zip(("base", "ana", "bob"), models, strict=True)
    }
    sets = {
        n: CalibrationSet(tuple(Example(p, p[:12]) for p in prompts(i, [20] * 40)))
        for i, n in enumerate(("base", "ana", "bob"))
    }
    build_store(root / "store", paths, policy="medoid", extra=0, calibration=sets)

    def logits_of(model: Any, rows: list[list[int]]) -> list[np.ndarray]:
        return [switch_models.hf_logits(model, [row], [[0, *row[:5]]])[0] for row in rows]

    def oracle(store: Store, t: int) -> Any:
        return switch_models.oracle_of_store(models[t], store, store.tenants[t])

    return Case(root / "store", models, logits_of, oracle)


@pytest.fixture(scope="module", params=rest_slow(["mixtral", "switch", "gated switch"]))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    return _mixtral(root) if request.param == "mixtral" else _switch(root, "gated" in request.param)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return _mixtral(tmp_path_factory.mktemp("mixtral"))
