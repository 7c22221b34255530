"""Tenants in a store, beside their Hugging Face models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import Plan, Store, build_store, load_engine
from common.build.build import replan
from common.build.examples import CalibrationSet
from common.build.scoring import divergence
from common.plan.plan import MERGED
from common.planning.planner import Planner
from common.store.profiles import load_profile
from tests import helpers
from tests.helpers import prompts

SIZES = {
    "num_local_experts": 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 2,
}
EXTRA = 0.25


@dataclass
class Case:
    """Three calibrated tenants in a store, and their Hugging Face models."""

    path: Path
    models: list[Any]
    logits_of: Callable[[Any, list[list[int]]], list[np.ndarray]]  # by Hugging Face
    oracle: Callable[[Store, int], Any]  # the tenant's model with the weights that the store serves

    def plan(self, policy: str, **options: Any) -> Store:
        return replan(self.path, policy=policy, **options)

    def served(self, store: Store) -> list[list[np.ndarray]]:
        """Logits of every tenant on rows of its own, by the engine."""
        encoder_decoder = store.config(store.tenants[0]).is_encoder_decoder
        found = []
        with load_engine(store, dtype="float32") as engine:
            for t, name in enumerate(store.tenants):
                rows = rows_of(t)
                starts = [[0, *row[:5]] for row in rows] if encoder_decoder else None
                out = engine.logits(name, rows, starts)
                ends = [6] * len(rows) if encoder_decoder else [len(r) for r in rows]
                found.append([values[:n] for values, n in zip(out, ends, strict=True)])
        return found

    def divergences(self, store: Store) -> np.ndarray:
        """Mean divergence of every tenant from itself: float64 [tenants]."""
        own = [self.logits_of(m, rows_of(t)) for t, m in enumerate(self.models)]
        return np.array(
            [
                np.concatenate([divergence(a, b) for a, b in zip(mine, theirs, strict=True)]).mean()
                for mine, theirs in zip(own, self.served(store), strict=True)
            ]
        )


def rows_of(tenant: int) -> list[list[int]]:
    return prompts(50 + tenant, [24, 17, 24, 12])


def calibration(names: tuple[str, ...] = ("base", "ana", "bob")) -> dict[str, CalibrationSet]:
    return {n: CalibrationSet.texts(prompts(i, [30] * 12)) for i, n in enumerate(names)}


def check(store: Store, most_bytes: int) -> None:
    """What must hold of every plan."""
    plan = store.plan
    assert store.verify() == []
    assert Plan.from_json(plan.to_json()) == plan
    used = plan.num_slots * store.copy_bytes + store.residual_bytes
    assert used <= most_bytes
    assert set(store.manifest.merged) == {i for i, c in enumerate(plan.copies) if c.owner == MERGED}
    # No copy that serves nobody, and none twice.
    assert all(plan.users(slot) for slot in range(plan.num_slots))
    own = [(c.layer, c.expert, c.owner) for c in plan.copies if c.owner != MERGED]
    assert len(set(own)) == len(own)
    prediction = store.manifest.prediction
    assert prediction is not None
    losses = np.array(prediction["losses"])
    assert (
        losses.shape == (len(store.tenants),) and np.isfinite(losses).all() and (losses >= 0).all()
    )


def planner(
    store: Store, traffic: dict[str, float] | None = None, calibrated: bool = True
) -> Planner:
    profiles = {n: p for n in store.tenants if (p := load_profile(store, n))} if calibrated else {}
    return Planner(store, profiles, traffic)


def small(tmp_path: Path, models: dict[str, Any], **options: Any) -> Store:
    paths = {n: helpers.save(m, tmp_path / n) for n, m in models.items()}
    return build_store(tmp_path / "store", paths, **options)


def tiny(seed: int = 0) -> Any:
    return helpers.random_mixtral(
        seed,
        num_local_experts=3,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=1,
    )
