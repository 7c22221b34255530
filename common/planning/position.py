"""One position while it is planned: its weights, samples and copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.dtypes import BY_NAME, to_float32, working
from common.plan.expert_math import forward, inner, inputs_and_output
from common.plan.profile import Profile
from common.planning.configurations import Config
from common.planning.losses import Losses
from common.planning.merging import Sample, Targets, fit_matrix, least_squares, mixture
from common.planning.residual_fit import Choice, Fitted, Spectrum, fit, spectra, spectrum
from common.planning.weighting import Weighting, plain, second_moments, weightings
from common.store.store import Store

Matrix = dict[str, np.ndarray]


# How often a copy is fitted anew beside the residuals that were fitted to it, as long as that
# helps. It helped by up to 6 % where samples are as many as inputs, by 2 % where they are a little
# fewer, and not at all where they are far fewer, as of large models
# (docs/results/2026-11-27-planning.md).
REFITS = 2


# Of each expert's samples every eighth is not fitted to, so that what is fitted can be judged:
# where there are fewer samples than inputs, as of large models, fits have next to no error on
# samples that they have seen.
HELD_OUT = 8


# How far the last projection that would serve a tenant best is held to its own, as a share of what
# one sample's moments add: the more samples, the less it is held. With little of it hundreds of
# samples are fitted too closely; what cross-validation over them chose was too little for other
# texts (docs/consolidation.md).
TARGET_RIDGE = 4.0


@dataclass(frozen=True)
class Known:
    """What planning one position rests on. traffic: float64 [tenants], shares of requests."""

    store: Store
    profiles: Mapping[str, Profile]
    losses: Losses
    traffic: np.ndarray


class PositionPlanner:
    """One position: every tenant's own weights (float32), samples and what they say."""

    def __init__(self, known: Known, place: tuple[int, int], ridge: Callable[[], float]):
        """ridge: how far fits are held to mixtures, asked for when a copy is fitted."""
        self._known, self._place, self._ridge = known, place, ridge
        self._spec = known.store.experts
        self.own = {
            t: known.store.own_expert(name, *place) for t, name in enumerate(known.store.tenants)
        }
        self._weighting: dict[int, dict[str, Weighting]] = {}
        self._targets: dict[int, Targets] = {}
        self._copies: dict[tuple[bool, tuple[float, ...]], Matrix] = {}

    def sample(self, tenant: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs float32 [n, H] and gates [n], n = 0 for a tenant that was not calibrated."""
        profile = self._known.profiles.get(self._known.store.tenants[tenant])
        if profile is None:
            return np.zeros((0, self._spec.hidden_size), np.float32), np.zeros(0, np.float32)
        return profile.sample(*self._place)

    def held_out(self, tenant: int) -> np.ndarray:
        """bool [n]: the samples that losses of weights are measured on; a lone one is fitted to as
        well."""
        count = len(self.sample(tenant)[0])
        return np.asarray(np.arange(count) % HELD_OUT == min(count, HELD_OUT) - 1)

    def fitted_to(self, tenant: int) -> np.ndarray:
        """bool [n]: the samples that copies and residuals are fitted to."""
        held = self.held_out(tenant)
        return ~held if len(held) > 1 else held

    @property
    def refits(self) -> int:
        """How often a fitted copy may be fitted anew: never where samples are fewer than inputs."""
        samples = sum(int(self.fitted_to(t).sum()) for t in self.own)
        return REFITS if samples >= self._spec.hidden_size else 0

    def seen(self, tenant: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and gates of the samples that are fitted to."""
        x, gates = self.sample(tenant)
        rows = self.fitted_to(tenant)
        return x[rows], gates[rows]

    def weighting(self, tenant: int) -> dict[str, Weighting]:
        if tenant not in self._weighting:
            before = self.targets(tenant).of_rows(self.fitted_to(tenant)).before
            seen = self.seen(tenant)
            self._weighting[tenant] = weightings(self._spec, self.own[tenant], *seen, before)
        return self._weighting[tenant]

    def copy(self, config: Config, added: Mapping[int, Matrix] | None = None) -> Matrix:
        """A copy's weights, rounded to the store's type; one tenant's own as they are.

        added: what tenants' residuals add to it.
        """
        mix, used = config.mix, np.flatnonzero(config.mix)
        if len(used) == 1 and not (config.fitted and len(self.own) > 1):
            return self.own[int(used[0])]
        if not added:  # several steps ask for it
            key = config.fitted, tuple(mix.tolist())
            if key not in self._copies:
                self._copies[key] = self._make(config, None)
            return self._copies[key]
        return self._make(config, added)

    def _make(self, config: Config, added: Mapping[int, Matrix] | None) -> Matrix:
        mix = config.mix
        if config.fitted:
            samples = {t: self.weighted_sample(t) for t in self.own}
            targets = {
                t: self.targets(t).of_rows(self.fitted_to(t))
                for t, s in samples.items()
                if len(s.x)
            }
            found = least_squares(self._spec, self.own, samples, mix, self._ridge(), added, targets)
        else:
            found = mixture(mix, self.own)
        dtype = BY_NAME[self._known.store.dtype]
        return {name: to_float32(m.astype(dtype)) for name, m in found.items()}

    def weighted_sample(self, tenant: int) -> Sample:
        """What is fitted to, weighted by what an error costs."""
        x, gates = self.seen(tenant)
        scale = self._known.losses.scale[tenant, *self._place] * self._known.traffic[tenant]
        return Sample(x, gates.astype(np.float64) ** 2 * scale)

    def _last_target(self, tenant: int, weights: Matrix) -> tuple[np.ndarray, Weighting]:
        """The last projection [out, in] that would serve the tenant best behind the others of
        `weights`, and how errors of it count. Behind the tenant's own it is the tenant's own;
        behind others it also mends their errors."""
        last = inputs_and_output(self._spec)[1]
        x, gates = self.seen(tenant)
        if not len(x):
            return self._own(tenant, last), plain(self.own[tenant][last].shape)
        hidden, squared = inner(self._spec, x, weights), gates.astype(np.float64) ** 2
        ridge = (
            TARGET_RIDGE * hidden.shape[1] / len(x)
        )  # `fit_matrix` takes shares of the mean diagonal of all moments
        found = fit_matrix(
            [hidden],
            [self.targets(tenant).output[self.fitted_to(tenant)]],
            [squared],
            self._own(tenant, last),
            ridge,
        )
        return found, Weighting(
            np.ones(len(found)), second_moments(hidden, squared), found.shape[1]
        )

    def spectra(self, tenant: int, copy: Matrix) -> list[Spectrum]:
        """What residuals of each projection could gain for a tenant beside a copy; totals add up to
        its loss.

        The last projection can win back what a better one behind the copy's others would; the
        others the rest.
        """
        names, last = inputs_and_output(self._spec)
        whole = self.loss(tenant, copy)
        if whole <= 0:  # its own
            return [Spectrum(shape, np.zeros(1), 0.0, 0.0) for _, shape in self._spec.projections]
        target, weighting = self._last_target(tenant, copy)
        found = {last: spectrum(target - copy[last], weighting)}
        differences = [self._own(tenant, n) - copy[n] for n in names]
        of_names = spectra(differences, [self.weighting(tenant)[n] for n in names])
        found |= dict(zip(names, of_names, strict=True))
        rest = whole
        if len(self.sample(tenant)[0]):
            rest = min(
                whole, self.loss(tenant, {**copy, last: target.astype(np.float32, copy=False)})
            )
            found[last] = found[last].scaled(whole - rest)
            parts = sum(found[n].total for n in names)
        else:
            parts = sum(s.total for s in found.values())
            found[last] = found[last].scaled(whole * found[last].total / max(1e-300, parts))
        for n in names:
            found[n] = found[n].scaled(rest * found[n].total / max(1e-300, parts))
        return [found[name] for name, _ in self._spec.projections]

    def residual(self, tenant: int, copy: Matrix, choices: Sequence[Choice]) -> dict[str, Fitted]:
        """What a tenant adds to projections of a copy, in their order; the last one's is fitted
        behind the others as they then are."""
        names, last = inputs_and_output(self._spec)
        by_name = dict(zip([name for name, _ in self._spec.projections], choices, strict=True))
        served = dict(copy)
        made: dict[str, Fitted] = {}
        for name in (*names, last):
            if by_name[name] == Choice():
                continue
            if name == last:
                target, weighting = self._last_target(tenant, served)
            else:
                target, weighting = self._own(tenant, name), self.weighting(tenant)[name]
            made[name] = fit(target - copy[name], weighting, name, by_name[name])
            served[name] = copy[name] + made[name].added.astype(np.float32, copy=False)
        return {name: made[name] for name, _ in self._spec.projections if name in made}

    def _own(self, tenant: int, name: str) -> np.ndarray:
        """A projection of the tenant's own, in the type in which it is compared."""
        matrix = self.own[tenant][name]
        return matrix.astype(working(matrix.size), copy=False)

    def targets(self, tenant: int) -> Targets:
        """What the tenant's own expert makes of its samples."""
        if tenant not in self._targets:
            self._targets[tenant] = Targets.of(self._spec, self.sample(tenant)[0], self.own[tenant])
        return self._targets[tenant]

    def loss(self, tenant: int, weights: Matrix) -> float:
        """What serving a tenant with any weights costs it, in the unit of the losses; of
        samples that nothing was fitted to."""
        losses = self._known.losses
        scale = float(losses.scale[tenant, *self._place])
        own = self.own[tenant]
        if not losses.sampled[tenant, *self._place]:
            return scale * sum(
                float(((weights[n].astype(np.float64) - own[n]) ** 2).sum()) for n in own
            )
        x, gates = self.sample(tenant)
        held = self.held_out(tenant)
        squared = gates.astype(np.float64) ** 2
        scale *= float(
            squared.sum() / max(1e-300, squared[held].sum())
        )  # they stand for all samples
        error = (forward(self._spec, x[held], weights) - self.targets(tenant).output[held]) * gates[
            held, None
        ]
        return scale * float((error.astype(np.float64) ** 2).sum())
