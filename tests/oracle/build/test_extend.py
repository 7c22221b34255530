"""Tenants that come and go, as engines and Hugging Face's models see it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import MixtralForCausalLM

from common import Store, build_store, extend_store, load_engine, remove_tenant
from common.build.beside import BESIDE
from common.build.build import replan
from common.build.examples import CalibrationSet
from common.plan.plan import MISS
from common.store.change import set_plan
from scripts import cli
from tests import helpers, switch_models
from tests.conftest import Family
from tests.served import Experts, check, equal, own, served, squared


@pytest.fixture(scope="module")
def newcomer(
    family: Family, tmp_path_factory: pytest.TempPathFactory
) -> tuple[MixtralForCausalLM, Path]:
    """A fourth tenant of the family, nearest to ana."""
    model = helpers.tuned(family.models[1], 7, 0.02)
    return model, helpers.save(model, tmp_path_factory.mktemp("newcomer") / "cy")


def test_a_tenant_beside_the_papers_plan_answers_right(
    family: Family, newcomer: tuple[Any, Path], tmp_path: Path
) -> None:
    store = build_store(tmp_path / "store", family.paths, policy="round_robin", slots=5)
    grown = extend_store(store.path, "cy", newcomer[1], extra=0.2)
    rows = helpers.prompts(3, [9])
    with load_engine(grown, spare_slots=2) as engine:
        expected = helpers.hf_logits(
            helpers.oracle_of_store(grown, [*family.models, newcomer[0]], 3), rows
        )
        helpers.assert_close(engine.logits("cy", rows), expected)


@pytest.mark.slow
def test_what_was_measured_and_asked_of_others_stays(
    family: Family, newcomer: tuple[Any, Path], tmp_path: Path
) -> None:
    examples = {
        n: CalibrationSet.texts(helpers.prompts(i, [20] * 4)) for i, n in enumerate(("base", "bob"))
    }
    traffic = {"ana": 3.0, "bob": 2.0}
    store = build_store(tmp_path / "store", family.paths, calibration=examples, traffic=traffic)
    assert store.manifest.prediction is not None and store.manifest.prediction["unit"] == "nats"
    old = store.manifest.prediction["losses"]
    grown = extend_store(store.path, "cy", newcomer[1])
    check(grown)
    # Nats of a tenant that was never run are not known.
    assert grown.manifest.prediction == {"losses": [*old, None], "unit": "nats", "bound": None}
    assert grown.manifest.calibration == store.manifest.calibration
    assert grown.manifest.provenance["settings"] == store.manifest.provenance["settings"]
    assert cli.main(["inspect", str(store.path)]) == 0
    shrunk = remove_tenant(store.path, "bob", keep_plan=True)
    check(shrunk)
    assert shrunk.manifest.calibration == {"base": store.manifest.calibration["base"]}
    assert shrunk.manifest.provenance["settings"]["traffic"] == {"ana": 3.0}
    assert shrunk.manifest.prediction == {
        "losses": [old[0], old[1], None],
        "unit": "nats",
        "bound": None,
    }
    again = replan(store.path)
    assert again.manifest.provenance["settings"]["traffic"] == {"ana": 3.0}
    # A plan that is given is for all tenants.
    extend_store(store.path, "bob", family.paths["bob"])
    plan = replace(
        again.plan,
        tenants=(*again.plan.tenants, "bob"),
        residuals=(),
        copies=(),
        serving=np.full((4, 2, 4), MISS),
    )
    assert BESIDE not in set_plan(store.path, plan).manifest.provenance


def test_switch_tenants_come_and_go(tmp_path: Path) -> None:
    base = switch_models.random_switch(0, gated=True)
    models = [base, *(switch_models.tuned(base, i, 0.03) for i in (1, 2))]
    paths = [helpers.save(m, tmp_path / f"checkpoint-{i}") for i, m in enumerate(models)]
    store = build_store(tmp_path / "store", {"a": paths[0], "b": paths[1]})
    before = served(store, "b")
    grown = extend_store(store.path, "c", paths[2], extra=0.2)
    bare = squared(
        own(grown, "c"),
        [_copy(grown, "c", i, e) for i, e in np.ndindex(*grown.plan.serving.shape[1:])],
    )
    assert squared(own(grown, "c"), served(grown, "c")) < 0.8 * bare
    shrunk = remove_tenant(store.path, "a", keep_plan=True)
    check(shrunk)
    assert equal(served(shrunk, "b"), before) and equal(served(shrunk, "c"), served(grown, "c"))


def _copy(store: Store, name: str, layer: int, expert: int) -> Experts:
    slot = int(store.plan.serving[store.tenants.index(name), layer, expert])
    return {p: ref.read() for p, ref in store.slot_refs(slot).items()}
