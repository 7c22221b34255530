"""Round robin, the rule of the paper: each position keeps one tenant's copy.

Source: Algorithm 1 of arXiv 2505.06481.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from common.errors import PlanError
from common.plan.plan import MISS, Copy, Plan


def plan_round_robin(
    distance: ArrayLike, tenants: Sequence[str] | int, slots: int | None = None
) -> Plan:
    """The paper's layout: one copy a position, most similar positions first, owners in turn
    (Algorithm 1).

    Positions are sorted by score ascending, stable, ties in row-major order; position number i of
    that order gets the copy of tenant i mod T, for i < slots.

    Args:
        distance: [layers, experts], a position's score: the sum over all pairs of tenants.
        tenants: their names in order, or their number.
        slots: number of resident copies, at most layers * experts; None: every position.

    Raises PlanError for a score that is not a number or slots out of range.
    """
    score = np.asarray(distance, dtype=np.float64)
    if score.ndim != 2 or score.size == 0:
        raise PlanError(f"distance is {list(score.shape)}, expected [layers, experts]")
    if not np.isfinite(score).all():
        layer, expert = np.argwhere(~np.isfinite(score))[0]
        raise PlanError(
            f"distance at position ({layer}, {expert}) is {score[layer, expert]}; are the weights "
            "finite?"
        )
    names = (
        tuple(f"tenant{i}" for i in range(tenants)) if isinstance(tenants, int) else tuple(tenants)
    )
    if not names:
        raise PlanError("a plan needs at least one tenant")
    if len(set(names)) != len(names):
        raise PlanError(f"tenant names repeat: {', '.join(names)}")
    num_slots = score.size if slots is None else slots
    if not 0 <= num_slots <= score.size:
        raise PlanError(
            f"{num_slots} slots; this policy keeps at most one copy of each of the {score.size} "
            "positions, "
            f"so give 0..{score.size}, or 'all' to share nothing"
        )
    order = np.argsort(score, axis=None, kind="stable")[:num_slots]
    layers, experts = np.unravel_index(order, score.shape)
    copies = tuple(
        Copy(int(layer), int(expert), i % len(names))
        for i, (layer, expert) in enumerate(zip(layers, experts, strict=True))
    )
    serving = np.full((len(names), *score.shape), MISS, dtype=np.int32)
    serving[:, layers, experts] = np.arange(num_slots, dtype=np.int32)
    return Plan("round_robin", names, score.shape[0], score.shape[1], copies, serving)
