"""Policies: from distances, losses and a budget to a plan, its merged copies and its residuals. By
name, in POLICIES.

docs/consolidation.md says what each does and what the tables say of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeVar

import numpy as np

from common.dtypes import BY_NAME
from common.errors import PlanError
from common.plan.expert_math import plus
from common.plan.plan import MERGED, MISS, Plan
from common.plan.profile import Profile
from common.plan.residual import matrices
from common.planning.allocation import Allocation, Allocator
from common.planning.configurations import Config, mean, merged, owned
from common.planning.losses import Losses, measure_losses
from common.planning.measurements import Measurements, MeasurementsFile, key_of
from common.planning.merging import Sample, best_ridge
from common.planning.plan_builder import Chosen, build_plan, in_memory
from common.planning.policies import Policy, policy_named
from common.planning.position import Known, Matrix, PositionPlanner
from common.planning.residual_curves import PRICES, Curve, curves
from common.planning.round_robin import plan_round_robin
from common.planning.traffic import shares_of_traffic
from common.planning.workers import position_bytes, side_by_side
from common.progress import Progress, silent
from common.store.store import Store
from common.units import is_whole

Result = TypeVar("Result")

# Positions on which the ridge of fits is chosen.
RIDGE_POSITIONS = 6


@dataclass(frozen=True)
class Prediction:
    """losses: float64 [tenants], expected divergence in nats a token with calibration, else squared
    distance.

    unit: see `Losses.unit`. bound: no plan of the same candidates and bytes is predicted to have
    less than this (traffic-weighted mean).
    """

    losses: np.ndarray
    unit: str
    bound: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {"losses": self.losses.tolist(), "unit": self.unit, "bound": self.bound}


@dataclass(frozen=True)
class Outcome:
    """A plan with the weights that it needs beside the tenants' own, as `set_plan` of
    `common.store.change` takes them; or what `keep` of `Planner.plan` gave for them."""

    plan: Plan
    merged: Mapping[int, Mapping[str, Any]]
    records: Sequence[Any]
    prediction: Prediction


class Planner:
    """Plans for one store, any policy and budget; what does not depend on the budget is computed
    once.

    traffic: tenant -> requests beside a tenant that is not named, which counts as 1. profiles: of
        calibrated tenants.
    known: what was measured before; used if it rests on the same weights, profiles and traffic.
    file: where what is measured is written meanwhile, and looked for first.
    """

    def __init__(
        self,
        store: Store,
        profiles: Mapping[str, Profile] | None = None,
        traffic: Mapping[str, float] | None = None,
        progress: Progress = silent,
        known: Measurements | None = None,
        file: MeasurementsFile | None = None,
    ):
        self.store = store
        self.profiles = dict(profiles or {})
        self.progress = progress
        self.traffic = shares_of_traffic(store.tenants, traffic or {})
        self._key = key_of(store, self.profiles, self.traffic)
        self._file = file
        if file is not None and (found := file.read()) is not None and found.key == self._key:
            known = found
        if known is None or known.key != self._key:
            known = Measurements(self._key, measure_losses(store, self.profiles, progress))
        self.losses: Losses = known.losses
        spec = store.experts
        self._places = [
            (layer, e) for layer in range(spec.num_layers) for e in range(spec.num_experts)
        ]
        self._position_bytes = position_bytes(spec, len(store.tenants))
        self._itemsize = BY_NAME[store.dtype].itemsize
        self._chosen_ridge = known.ridge
        self._fitted = dict(
            known.fitted
        )  # position -> float64 [copies that are fitted, tenants], their losses
        self._spectra = dict(known.spectra)  # (curve set, position) -> of each tenant
        self._configs: dict[str, list[list[Config]]] = {}

    @property
    def unit(self) -> str:
        return self.losses.unit

    @property
    def measurements(self) -> Measurements:
        """All that was measured up to now, for a planner of the same store."""
        fitted, spectra = dict(self._fitted), dict(self._spectra)  # threads add to them
        return Measurements(self._key, self.losses, self._chosen_ridge, fitted, spectra)

    # Candidates.

    def _position(self, p: int) -> PositionPlanner:
        """Weights and samples of a position."""
        known = Known(self.store, self.profiles, self.losses, self.traffic)
        return PositionPlanner(known, self._places[p], lambda: self._ridge)

    def _candidates(self, policy: Policy, spectra: bool = False) -> list[list[Config]]:
        """Configurations of every position. Raises PlanError for a policy that shares nothing.

        spectra: measure them as well, while a position's weights and copies are in memory.
        """
        if policy.copies == "all":
            raise PlanError("policy 'all' shares nothing, so there is nothing to plan")
        if policy.copies not in self._configs:
            if (
                policy.copies == "fitted"
                and self.losses.sampled.any()
                and len(self.store.tenants) > 1
            ):
                if len(self._fitted) < len(self._places):
                    _ = self._ridge  # before the candidates, as a step of its own
            self._configs[policy.copies] = self._each_position(
                lambda p: self._of_position(policy.copies, p, spectra)
            )
        elif spectra:  # known of another policy, which may have needed none
            self._each_position(
                lambda p: self._measure_spectra(p, self._configs[policy.copies][p], None)
            )
        return self._configs[policy.copies]

    def _each_position(self, measure: Callable[[int], Result]) -> list[Result]:
        places, nbytes = range(len(self._places)), self._position_bytes
        found = []
        with self.progress("measuring candidates", len(places)) as advance:
            for one in side_by_side(measure, places, nbytes):
                found.append(one)
                advance()
                if self._file is not None:
                    self._file.keep(lambda: self.measurements)
        return found

    def _of_position(self, copies: str, p: int, spectra: bool) -> list[Config]:
        gram, count = self.losses.gram[:, *self._places[p]], len(self.store.tenants)
        if copies == "owned":
            found = [owned(gram, self.traffic)]
        elif copies == "mean":
            found = [mean(gram)]
        else:
            # A tenant's own as the copy is a candidate too: where the others differ from it by a
            # few components (a merged LoRA), residuals beside it are small.
            found = [merged(gram, self.traffic), owned(gram, self.traffic)]
        position = None
        if copies == "fitted" and self.losses.sampled[:, *self._places[p]].any() and count > 1:
            fitted = replace(found[0], curve=2, fitted=True)
            if p not in self._fitted:
                position = self._position(p)
                copy = position.copy(fitted)
                self._fitted[p] = np.array([position.loss(t, copy) for t in range(count)])
            found.append(replace(fitted, losses=self._fitted[p]))
        if spectra:
            self._measure_spectra(p, found, position)
        return found

    @property
    def _ridge(self) -> float:
        """How far fits are held to mixtures, chosen on a few positions spread over the model."""
        if self._chosen_ridge is None:
            self._chosen_ridge = self._choose_ridge()
        return self._chosen_ridge

    def _choose_ridge(self) -> float:
        count, everyone = len(self.store.tenants), range(len(self.store.tenants))
        spread = np.unique(np.linspace(0, len(self._places) - 1, RIDGE_POSITIONS).astype(int))
        mix = np.full(count, 1 / count)
        with self.progress("choosing how closely copies are fitted", len(spread)) as advance:

            def positions() -> Iterator[
                tuple[Mapping[int, Matrix], Mapping[int, Sample], np.ndarray]
            ]:
                for p in spread:  # one in memory at a time
                    position = self._position(int(p))
                    yield position.own, {t: position.weighted_sample(t) for t in everyone}, mix
                    advance()

            return best_ridge(self.store.experts, positions())

    def _measure_spectra(self, p: int, row: list[Config], position: PositionPlanner | None) -> None:
        """Spectra of what each tenant lacks beside the copy of each configuration of a position.

        Not beside a mixture where a copy was fitted: what serves tenants better leaves less for
        residuals too.
        """
        fitted = any(config.fitted for config in row)
        for config in row:
            if (config.curve, p) in self._spectra or (config.curve == 0 and fitted):
                continue
            position = position or self._position(p)
            copy = position.copy(config)
            self._spectra[config.curve, p] = [
                position.spectra(t, copy) for t in range(len(self.store.tenants))
            ]

    def _curves(self, policy: Policy) -> list[list[list[Curve]]] | None:
        if not policy.kinds.any:
            return None
        count = len(self.store.tenants)
        nothing = [Curve(np.zeros(len(PRICES)), np.ones(len(PRICES)))] * count
        known = [key for key in product(range(3), range(len(self._places))) if key in self._spectra]
        drawn = curves(
            [spectra for key in known for spectra in self._spectra[key]],
            policy.kinds,
            self._itemsize,
        )
        found = {key: drawn[i * count : (i + 1) * count] for i, key in enumerate(known)}
        return [[found.get((s, p), nothing) for p in range(len(self._places))] for s in range(3)]

    # Plans.

    def allocator(self, policy: str) -> Allocator:
        """Prices for a policy that uses extra bytes."""
        rule = policy_named(policy)
        configs = self._candidates(rule, spectra=rule.kinds.any)
        return Allocator(configs, self._curves(rule), self.traffic, self.store.copy_bytes)

    def plan(
        self,
        policy: str,
        slots: int | None = None,
        extra_bytes: int = 0,
        keep: Callable[[np.ndarray], Any] = in_memory,
    ) -> Outcome:
        """One copy of `slots` positions (None: all), and what the policy does with `extra_bytes`
        beside them.

        keep: takes each merged copy's matrices, float32 [out, in] rounded to the
        store's type, and each record, uint8, as they are made. All of a large model's copies do not
        fit in memory.

        Raises PlanError, and StoreError where a file of the store is damaged.
        """
        rule = policy_named(policy)
        spec = self.store.experts
        slots = spec.num_positions if slots is None else slots
        if not is_whole(slots) or not 0 <= slots <= spec.num_positions:
            raise PlanError(
                f"slots is {slots!r}; give a whole number 0..{spec.num_positions}, or None for all"
            )
        if not is_whole(extra_bytes) or extra_bytes < 0:
            raise PlanError(f"extra_bytes is {extra_bytes!r}; give a whole number of bytes from 0")
        if rule.copies == "paper":
            plan = plan_round_robin(self.store.distances.score(), self.store.tenants, slots)
            return Outcome(plan, {}, [], self.predict(plan))
        kept = self._kept_positions(rule, slots)
        allocator = (
            self.allocator(policy)
            if rule.uses_extra and extra_bytes > 0 and slots == len(self._places)
            else None
        )
        configs = self._candidates(rule)
        found = None
        if allocator is not None:
            found = allocator.allocate(slots * self.store.copy_bytes + extra_bytes)
        chosen = {p: self._chosen(p, configs[p], found) for p in kept}
        built = build_plan(
            policy,
            self.store,
            self.traffic,
            chosen,
            rule.kinds,
            self._position,
            self.progress,
            keep,
        )
        bound = None if found is None else found.bound
        prediction = Prediction(built.losses, self.unit, bound)
        return Outcome(built.plan, built.merged, built.records, prediction)

    def _chosen(self, p: int, configs: list[Config], found: Allocation | None) -> Chosen:
        """found: None where there are no bytes for residuals; then the least loss decides."""
        if found is None:
            best = min(configs, key=self._loss)
            return Chosen(best, np.full(len(self.traffic), np.inf))
        config = configs[int(found.chosen[p])]
        return Chosen(config, found.price[p], self._spectra.get((config.curve, p), ()))

    def _loss(self, config: Config) -> float:
        return float(config.losses @ self.traffic)

    def _kept_positions(self, rule: Policy, slots: int) -> list[int]:
        """Which positions are resident: those whose sharing costs least for every look-up that they
        save."""
        if slots == len(self._places):
            return list(range(slots))
        configs = self._candidates(rule)
        picks = np.einsum("tle,t->le", self.losses.frequency, self.traffic).reshape(-1)
        cost = [min(map(self._loss, row)) for row in configs]
        order = sorted(range(len(configs)), key=lambda p: (cost[p] / max(1e-12, picks[p]), p))
        return sorted(order[:slots])

    # Predictions.

    def predict(
        self,
        plan: Plan,
        merged: Mapping[int, Matrix] | None = None,
        records: Sequence[np.ndarray] = (),
        bound: float | None = None,
    ) -> Prediction:
        """What a plan costs each tenant, from the weights that it serves them with."""
        merged = merged or {}
        count, spec = len(plan.tenants), self.store.experts
        single = self.losses.single()
        total = np.zeros(count)
        with self.progress("predicting", len(self._places)) as advance:
            for p, (layer, expert) in enumerate(self._places):
                position = None
                for t in range(count):
                    slot = int(plan.serving[t, layer, expert])
                    if slot == MISS:
                        continue
                    owner = plan.copies[slot].owner
                    number = plan.residual_of(t, layer, expert)
                    if owner != MERGED and number is None:
                        total[t] += single[t, layer, expert, owner]
                        continue
                    position = position or self._position(p)
                    copy = merged[slot] if owner == MERGED else position.own[owner]
                    if number is not None:
                        residual, record = plan.residuals[number], records[number]
                        copy = plus(copy, matrices(residual, record, dict(spec.projections)))
                    total[t] += position.loss(t, copy)
                advance()
        return Prediction(total, self.unit, bound)
