"""Parts of residuals by tenant, layer and expert, and the Hugging Face models that a store's plan
serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import Store
from common.plan.residual import LOW_RANK, SIGN, Part
from tests.jax_engine.conftest import SwitchFamily
from tests.switch_models import (
    Model,
    oracle_of_store,
)

FORMS: dict[str, tuple[str, int, int]] = {
    "sign": (SIGN, 1, 1),
    "sign, 7 rows to a scale": (SIGN, 1, 7),
    "2 bits": (LOW_RANK, 2, 5),
    "4 bits": (LOW_RANK, 4, 17),
    "8 bits": (LOW_RANK, 8, 3),
    "16 bits": (LOW_RANK, 16, 2),
    "32 bits": (LOW_RANK, 32, 1),
}


def all_of(form: str, projections: Sequence[str] = ("up", "down")) -> Any:
    """Every tenant has one part of this form everywhere."""
    return lambda tenant, layer, expert: [Part(p, *FORMS[form]) for p in projections]


def mixed(tenant: int, layer: int, expert: int, gated: bool = False) -> list[Part]:
    """Tenants with other kinds and ranks, several parts a matrix, some projections alone; the first
    has none."""
    names = ("gate", "up", "down") if gated else ("up", "down")
    if tenant == 0 or (layer + expert) % 4 == 3:
        return []
    if tenant == 1:
        return [
            Part(names[0], SIGN, 1, 3),
            Part(names[-1], LOW_RANK, 4, 4 + expert),
            Part(names[0], LOW_RANK, 8, 2),
            Part(names[0], LOW_RANK, 2, 19),
            Part(names[-1], SIGN, 1, 1000),
        ][: 2 + expert]
    return [Part(names[(layer + expert) % len(names)], LOW_RANK, 16, 1 + expert)]


def served(family: SwitchFamily, store: Store) -> list[Model]:
    return [oracle_of_store(m, store, n) for m, n in zip(family.models, store.tenants, strict=True)]
