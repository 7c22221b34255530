"""From what was chosen for each position to a plan: copies' weights and residuals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from common.dtypes import BY_NAME
from common.plan.expert_math import plus
from common.plan.plan import MERGED, MISS, Copy, Plan
from common.plan.residual import Residual, join_parts, matrices
from common.planning.configurations import Config
from common.planning.position import REFITS, Matrix, PositionPlanner
from common.planning.residual_curves import Kinds, choose
from common.planning.residual_fit import Spectrum
from common.progress import Progress
from common.store.store import Store

Made = tuple[Residual, np.ndarray]
"""A residual and its record, uint8 [bytes]."""


@dataclass(frozen=True)
class Chosen:
    """What was chosen for one position.

    prices: float64 [tenants], loss a byte at which each residual is worth it; infinite: none.
    spectra: of each tenant's projections beside the copy; empty: no residuals.
    """

    config: Config
    prices: np.ndarray
    spectra: Sequence[Sequence[Spectrum]] = ()


@dataclass(frozen=True)
class Built:
    """A plan, its merged copies by slot, and the records of its residuals in order."""

    plan: Plan
    merged: Mapping[int, Matrix]
    records: Sequence[np.ndarray]


def build_plan(
    policy: str,
    store: Store,
    traffic: np.ndarray,
    chosen: Mapping[int, Chosen],
    kinds: Kinds,
    position: Callable[[int], PositionPlanner],
    progress: Progress,
) -> Built:
    """Make the copies and residuals of the positions in `chosen`; others stay without a copy.

    traffic: float64 [tenants]. position: weights and samples of a position by number.
    """
    spec, names = store.experts, store.tenants
    shapes = dict(spec.projections)
    copies: list[Copy] = []
    merged: dict[int, Matrix] = {}
    residuals: list[Residual] = []
    records: list[np.ndarray] = []
    serving = np.full((len(names), spec.num_layers, spec.num_experts), MISS, dtype=np.int32)
    with progress("making copies", len(chosen)) as advance:
        for p, choice in chosen.items():
            place = divmod(p, spec.num_experts)
            weights, made = _make(place, choice, traffic, kinds, store.dtype, partial(position, p))
            mix = choice.config.mix
            serving[:, *place] = len(copies)
            if weights is None:
                copies.append(Copy(*place, int(np.flatnonzero(mix)[0])))
            else:
                merged[len(copies)] = weights
                of_tenants = () if choice.config.fitted else tuple(mix.tolist())
                copies.append(Copy(*place, MERGED, of_tenants))
            for residual, record in made.values():
                assert len(record) == residual.nbytes(shapes)
                residuals.append(residual)
                records.append(record)
            advance()
    plan = Plan(
        policy,
        names,
        spec.num_layers,
        spec.num_experts,
        tuple(copies),
        serving,
        tuple(residuals),
    )
    return Built(plan, merged, records)


def _make(
    place: tuple[int, int],
    chosen: Chosen,
    traffic: np.ndarray,
    kinds: Kinds,
    dtype: str,
    position_of: Callable[[], PositionPlanner],
) -> tuple[Matrix | None, dict[int, Made]]:
    """Weights of a position's copy (None: a tenant's own), and tenants' residuals.

    A fitted copy and residuals are fitted to each other in turn: a copy need not serve what
    residuals add.
    """
    config, count = chosen.config, len(traffic)
    is_merged = len(np.flatnonzero(config.mix)) > 1 or (config.fitted and count > 1)
    if not is_merged and not np.isfinite(chosen.prices).any():
        return None, {}
    position = position_of()
    shapes = {name: m.shape for name, m in position.own[0].items()}

    def attempt(added: Mapping[int, Matrix]) -> tuple[Matrix, dict[int, Made], float]:
        """A copy beside residuals, residuals fitted to this copy, and what all of it costs."""
        copy = position.copy(config, added)
        made, cost = {}, 0.0
        for t in range(count):
            loss = position.loss(t, copy)
            found = _residual(t, place, chosen, kinds, dtype, position, copy)
            if found is not None:
                # The spectrum is a prediction; what is kept must help.
                left = position.loss(t, plus(copy, matrices(*found, shapes)))
                if left < loss:
                    made[t], loss = found, left
            cost += float(traffic[t]) * loss
        return copy, made, cost

    copy, made, best = attempt({})
    if config.fitted and made:
        adds = {t: matrices(*one, shapes) for t, one in made.items()}
        for _ in range(REFITS):
            other, found, cost = attempt(adds)
            if cost >= best:
                break
            copy, made, best = other, found, cost
            adds = {t: matrices(*one, shapes) for t, one in made.items()}
    return copy if is_merged else None, made


def _residual(
    tenant: int,
    place: tuple[int, int],
    chosen: Chosen,
    kinds: Kinds,
    dtype: str,
    position: PositionPlanner,
    copy: Matrix,
) -> Made | None:
    price = float(chosen.prices[tenant])
    if not np.isfinite(price) or chosen.config.losses[tenant] <= 0 or not chosen.spectra:
        return None
    spectra = chosen.spectra[tenant]
    total = sum(s.total for s in spectra)
    if total <= 0:  # nothing was to be won beside the copy that its curve was drawn beside
        return None
    scaled = [s.scaled(s.total / total) for s in spectra]
    choices = choose(scaled, price, kinds, BY_NAME[dtype].itemsize)
    parts, packed = position.residual(tenant, copy, choices)
    if not parts:
        return None
    return Residual(tenant, *place, tuple(parts)), join_parts(packed)
