"""Where memory goes: how many copies of each position, whose or of what mixture, and which tenants
keep residuals.

Every position has a few candidates for its copy, each with a loss for every tenant. Beside a copy
every tenant has a curve: how much of its loss is left for how many bytes of residual. At a
price of mu loss a byte each position has a best choice of its own, found by looking at all of its
configurations; mu is then lowered, by bisection, until the budget is used. This is Lagrangian
relaxation of a multiple-choice knapsack: what it finds is the best of all plans with as many bytes,
and what another plan could gain with the bytes that are left over is at most mu times these
(Everett 1963, theorem 1; bounds are given in `Allocation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import PlanError
from common.planning.configurations import Config
from common.planning.residual_curves import PRICES, Curve, lower_envelope


@dataclass(frozen=True)
class Allocation:
    """chosen: int [positions], which configuration. price: float64 [positions, tenants], at which
    each residual is chosen (relative to its loss; infinite: none).

    losses: float64 [positions, tenants], predicted; nbytes: copies and residuals; bound: no plan of
    these configurations and curves within the budget has less (traffic-weighted) loss than this.
    """

    chosen: np.ndarray
    price: np.ndarray
    losses: np.ndarray
    nbytes: int
    bound: float


class Allocator:
    """Prices configurations and residuals of all positions.

    configs: of each position. curves: sets of [positions][tenants], as configs name them; None:
    without residuals. traffic: float64 [tenants].
    """

    def __init__(
        self,
        configs: Sequence[Sequence[Config]],
        curves: Sequence[Sequence[Sequence[Curve]]] | None,
        traffic: np.ndarray,
        copy_bytes: int,
    ):
        self._traffic = traffic
        # Positions may have fewer than others (nothing is fitted where nobody has samples): their
        # first one stands in, and as the first of equals is taken, its repetitions never are.
        most = max(map(len, configs))
        configs = [[*row, *[row[0]] * (most - len(row))] for row in configs]
        self._losses = np.array(
            [[c.losses for c in row] for row in configs]
        )  # [positions, configs, tenants]
        self._copy_bytes = float(copy_bytes)
        self._set = np.array([[c.curve for c in row] for row in configs])
        self._curves = None
        self._point = np.zeros(0)
        if curves is not None:
            # [sets, positions, tenants, prices + 1], the last one for: no residual.
            nbytes, left = (
                np.array(
                    [
                        [[np.append(getattr(c, name), end) for c in row] for row in one]
                        for one in curves
                    ]
                )
                for name, end in (("nbytes", 0.0), ("left", 1.0))
            )
            self._point = lower_envelope(nbytes, left)
            self._curves = nbytes, left

    def at(self, mu: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
        """Best choice at a price: chosen [positions], price index [positions, tenants], losses
        [positions, tenants], bytes [positions], and the Lagrangian's value without the budget's
        term."""
        weighted = self._losses * self._traffic
        if self._curves is None:
            index = np.full(self._losses.shape, len(PRICES))
            nbytes, left = np.zeros(self._losses.shape), self._losses
        else:
            with np.errstate(divide="ignore", over="ignore"):
                relative = np.where(weighted > 0, mu / np.maximum(weighted, 1e-300), np.inf)
            # Of a curve's points one of the two with the nearest prices is best.
            above = np.searchsorted(PRICES, relative)
            sets = self._set[:, :, None]
            places = (
                np.arange(len(weighted))[:, None, None],
                np.arange(weighted.shape[2])[None, None],
            )
            nearest = []
            for point in (above, np.maximum(above - 1, 0)):
                nbytes = self._curves[0][sets, *places, point]
                left = self._curves[1][sets, *places, point] * self._losses
                nearest.append((nbytes, left, left * self._traffic + mu * nbytes))
            lower = nearest[1][2] < nearest[0][2]
            index = self._point[sets, *places, np.where(lower, np.maximum(above - 1, 0), above)]
            nbytes, left = (
                np.where(lower, b, a) for a, b in zip(nearest[0][:2], nearest[1][:2], strict=True)
            )
        value = (left * self._traffic).sum(axis=2) + mu * (self._copy_bytes + nbytes.sum(axis=2))
        chosen = value.argmin(axis=1)
        rows = np.arange(len(chosen))
        total = self._copy_bytes + nbytes[rows, chosen].sum(axis=1)
        return (
            chosen,
            index[rows, chosen],
            left[rows, chosen],
            total,
            float(value[rows, chosen].sum()),
        )

    def allocate(self, budget: int) -> Allocation:
        """The best use of `budget` bytes for copies and residuals.

        Raises PlanError if one copy a position does not fit.
        """
        least = int(self._copy_bytes * len(self._losses))
        if budget < least:
            raise PlanError(
                f"{budget} bytes are less than one copy of each position takes ({least})"
            )
        low, high = 1e-30, 1e30  # too dear at high, over the budget at low
        if self.at(low)[3].sum() <= budget:
            high = low
        else:
            for _ in range(200):
                middle = float(np.sqrt(low * high))
                if self.at(middle)[3].sum() <= budget:
                    high = middle
                else:
                    low = middle
                if high / low < 1 + 1e-9:
                    break
        chosen, index, losses, nbytes, value = self.at(high)
        bound = max(0.0, value - high * budget)
        # Bytes that are left go, position by position, to what the next lower price would buy: in
        # order of gain a byte as far as they reach, then to the one that still fits and gains most.
        # So more bytes never gain less.
        after = self.at(min(low, high / 2**0.5))
        gain = ((losses - after[2]) * self._traffic).sum(axis=1)
        more = after[3] - nbytes
        order = np.argsort(-gain / np.maximum(more, 1e-9), kind="stable")
        order = order[gain[order] > 0]
        spare = budget - nbytes.sum()
        reached = int(np.searchsorted(np.cumsum(np.maximum(more[order], 0)), spare, side="right"))
        taken, rest = order[:reached], order[reached:]
        rest = rest[more[rest] <= spare - np.maximum(more[taken], 0).sum()]
        if len(rest):
            taken = np.append(taken, rest[gain[rest].argmax()])
        for mine, theirs in zip((chosen, index, losses, nbytes), after[:4], strict=True):
            mine[taken] = theirs[taken]
        prices = np.append(PRICES, np.inf)[index]
        return Allocation(chosen, prices, losses, int(nbytes.sum()), bound)
