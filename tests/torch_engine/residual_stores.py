"""Stores whose plan has residuals and merged copies, and the ways to multiply by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.plan.residual import LOW_RANK, LOW_RANK_BITS, SIGN, Part
from common.store import Store
from common.store.change import set_plan
from tests import helpers

WAYS: list[dict[str, Any]] = [
    {"products": "auto"},  # our own kernels, where they work
    {"products": "plain"},
    {"experts": "grouped", "products": "plain"},
]
PROJECTIONS = ("gate", "down", "up")
EVERY_KIND = [
    (SIGN, 1, 1),
    (SIGN, 1, 5),
    (SIGN, 1, 1000),
    *((LOW_RANK, bits, 3) for bits in LOW_RANK_BITS),
]

CASES: dict[str, Callable[[int, int, int], Sequence[Part]]] = {
    "one v for gate and up": lambda t, _l, e: [
        Part("gate", LOW_RANK, 8, 2 + e),
        Part("up", SIGN, 1, 1),
        Part("up", LOW_RANK, 8, 2 + e, 0),
    ],
    "sign everywhere": lambda t, _l, _e: [Part(p, SIGN, 1, 1) for p in PROJECTIONS],
    "scales for 7 rows": lambda t, _l, _e: [Part(p, SIGN, 1, 7) for p in PROJECTIONS],
    "a scale for all rows": lambda t, _l, _e: [Part(p, SIGN, 1, 10**6) for p in PROJECTIONS],
    **{
        f"low rank, {bits} bits": lambda t, _l, e, bits=bits: [
            Part(p, LOW_RANK, bits, 1 + e) for p in PROJECTIONS
        ]
        for bits in LOW_RANK_BITS
    },
    "several parts": lambda t, _l, _e: [
        Part("down", LOW_RANK, 8, 2),
        Part("gate", SIGN, 1, 4),
        Part("gate", LOW_RANK, 4, 5),
        Part("down", LOW_RANK, 2, 11),
        Part("gate", LOW_RANK, 16, 1),
    ],
    "some projections, tenants and experts": lambda t, layer, e: (
        [Part(PROJECTIONS[(t + e) % 3], *EVERY_KIND[(2 * t + e) % len(EVERY_KIND)])]
        if (t + layer + e) % 2
        else []
    ),
    "one layer alone": lambda t, layer, _e: [Part("up", SIGN, 1, 2)] if layer == 1 else [],
}


def prepared(
    path: Path, paths: dict[str, Path], case: str, slots: Any = None, merged: bool = True
) -> Store:
    """A store whose plan has residuals and, on every second copy, merged weights."""
    store = helpers.build_round_robin(path, paths, slots=slots)
    plan, means = helpers.with_merged(store, range(0, store.plan.num_slots, 2) if merged else ())
    plan, records = helpers.with_residuals(plan, dict(store.experts.projections), CASES[case])
    return set_plan(path, plan, merged=means, records=records)
