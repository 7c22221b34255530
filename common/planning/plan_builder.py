"""From what was chosen for each position to a plan: copies' weights and residuals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from common.dtypes import BY_NAME
from common.plan.expert_math import plus
from common.plan.plan import MERGED, MISS, Copy, Plan
from common.plan.residual import Residual, join_parts
from common.planning.configurations import Config
from common.planning.position import Matrix, PositionPlanner
from common.planning.residual_curves import Kinds, choose
from common.planning.residual_fit import Spectrum
from common.planning.workers import position_bytes, side_by_side
from common.progress import Progress
from common.store.store import Store


@dataclass(frozen=True)
class Made:
    """A residual, its record, uint8 [bytes], and what it adds to a copy."""

    residual: Residual
    record: np.ndarray
    added: Matrix


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
    """A plan, its merged copies by slot, the records of its residuals in order, and what each
    tenant loses by it, float64 [tenants]."""

    plan: Plan
    merged: Mapping[int, Mapping[str, Any]]
    records: Sequence[Any]
    losses: np.ndarray


def in_memory(array: np.ndarray) -> np.ndarray:
    """Keeps what was made where it is."""
    return array


def build_plan(
    policy: str,
    store: Store,
    traffic: np.ndarray,
    chosen: Mapping[int, Chosen],
    kinds: Kinds,
    position: Callable[[int], PositionPlanner],
    progress: Progress,
    keep: Callable[[np.ndarray], Any] = in_memory,
) -> Built:
    """Make the copies and residuals of the positions in `chosen`; others stay without a copy.

    traffic: float64 [tenants]. position: weights and samples of a position by number. keep: takes
    each merged copy's matrices and each record as they are made, and gives what stands for them.
    """
    spec, names = store.experts, store.tenants
    shapes = dict(spec.projections)
    copies: list[Copy] = []
    merged: dict[int, Mapping[str, Any]] = {}
    residuals: list[Residual] = []
    records: list[Any] = []
    losses = np.zeros(len(names))
    serving = np.full((len(names), spec.num_layers, spec.num_experts), MISS, dtype=np.int32)

    def make(p: int) -> tuple[Matrix | None, dict[int, Made], np.ndarray]:
        place, of_position = divmod(p, spec.num_experts), partial(position, p)
        return _make(place, chosen[p], traffic, kinds, store.dtype, of_position)

    with progress("making copies", len(chosen)) as advance:
        made_all = side_by_side(make, list(chosen), position_bytes(spec, len(names)))
        for (p, choice), (weights, made, lost) in zip(chosen.items(), made_all, strict=True):
            place = divmod(p, spec.num_experts)
            losses += lost
            mix = choice.config.mix
            serving[:, *place] = len(copies)
            if weights is None:
                copies.append(Copy(*place, int(np.flatnonzero(mix)[0])))
            else:
                merged[len(copies)] = {name: keep(m) for name, m in weights.items()}
                of_tenants = () if choice.config.fitted else tuple(mix.tolist())
                copies.append(Copy(*place, MERGED, of_tenants))
            for one in made.values():
                assert len(one.record) == one.residual.nbytes(shapes)
                residuals.append(one.residual)
                records.append(keep(one.record))
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
    return Built(plan, merged, records, losses)


def _make(
    place: tuple[int, int],
    chosen: Chosen,
    traffic: np.ndarray,
    kinds: Kinds,
    dtype: str,
    position_of: Callable[[], PositionPlanner],
) -> tuple[Matrix | None, dict[int, Made], np.ndarray]:
    """Weights of a position's copy (None: a tenant's own), tenants' residuals, and what each tenant
    loses, float64 [tenants].

    Where samples determine a copy, it and its residuals are fitted to each other in turn: a copy
    need not serve what residuals add.
    """
    config, count = chosen.config, len(traffic)
    is_merged = len(np.flatnonzero(config.mix)) > 1 or (config.fitted and count > 1)
    if not is_merged and not np.isfinite(chosen.prices).any():
        return None, {}, config.losses
    position = position_of()

    def attempt(added: Mapping[int, Matrix]) -> tuple[Matrix, dict[int, Made], np.ndarray]:
        """A copy beside residuals, residuals fitted to this copy, and what each tenant loses."""
        copy = position.copy(config, added)
        made, losses = {}, np.zeros(count)
        for t in range(count):
            # A tenant's own copy was measured on all samples.
            losses[t] = position.loss(t, copy) if is_merged else config.losses[t]
            found = _residual(t, place, chosen, kinds, dtype, position, copy)
            if found is not None:
                # The spectrum is a prediction; what is kept must help.
                held_out = losses[t] if is_merged else position.loss(t, copy)
                left = position.loss(t, plus(copy, found.added))
                if left < held_out:
                    made[t], losses[t] = found, left
        return copy, made, losses

    copy, made, best = attempt({})
    if config.fitted and made:
        for _ in range(position.refits):
            other, found, losses = attempt({t: one.added for t, one in made.items()})
            if traffic @ losses >= traffic @ best:
                break
            copy, made, best = other, found, losses
    return copy if is_merged else None, made, best


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
    fitted = position.residual(tenant, copy, choices)
    if not fitted:
        return None
    parts = tuple(part for one in fitted.values() for part in one.parts)
    record = join_parts([data for one in fitted.values() for data in one.packed])
    added = {name: one.added.astype(np.float32, copy=False) for name, one in fitted.items()}
    return Made(Residual(tenant, *place, parts), record, added)
