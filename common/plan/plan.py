"""From distances and a budget to a plan: which copies are resident, and which of them serves whom.

`plan_round_robin` is Algorithm 1 of arXiv 2505.06481; `plan_all` shares nothing but what is
identical.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from common.errors import PlanError
from common.plan.residual import Residual

MISS = -1


MERGED = -2
"""Owner of a copy that is no tenant's own: made from several tenants' weights, or one's that is no
tenant any more."""


@dataclass(frozen=True)
class Copy:
    """One resident copy: what tenant number `owner` has at (layer, expert), or merged weights.

    Attributes:
        owner: -2 (`MERGED`) for merged weights.
        mix: of a weighted sum of tenants' weights, the weight of each tenant; else empty.
    """

    layer: int
    expert: int
    owner: int
    mix: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Plan:
    """Which copies are resident and which copy serves each tenant at each position. Immutable.

    Attributes:
        tenants: in the order that they were built; `owner` and the first axis of `serving` index
            them.
        copies: the resident copies; a copy's index is its slot in the whole pool.
        serving: int32 [tenants, layers, experts], index into `copies`, -1 where the tenant misses.
        residuals: what tenants add to the copies that serve them, at most one for a tenant and
            position.
    """

    policy: str
    tenants: tuple[str, ...]
    num_layers: int
    num_experts: int
    copies: tuple[Copy, ...]
    serving: np.ndarray
    residuals: tuple[Residual, ...] = ()

    def __post_init__(self) -> None:
        serving = np.array(self.serving, dtype=np.int32)
        expected = (len(self.tenants), self.num_layers, self.num_experts)
        if serving.shape != expected:
            raise PlanError(
                f"serving is {serving.shape}, expected [tenants, layers, experts] = {expected}"
            )
        for i, copy in enumerate(self.copies):
            if not (
                0 <= copy.layer < self.num_layers
                and 0 <= copy.expert < self.num_experts
                and (0 <= copy.owner < len(self.tenants) or copy.owner == MERGED)
            ):
                raise PlanError(f"copy {i} {copy} lies outside {expected}")
            if copy.mix and (copy.owner != MERGED or len(copy.mix) != len(self.tenants)):
                raise PlanError(
                    f"copy {i} {copy} mixes {len(copy.mix)} tenants of {len(self.tenants)}"
                )
        if serving.size and (serving.min() < MISS or serving.max() >= len(self.copies)):
            raise PlanError(f"serving names a copy outside 0..{len(self.copies) - 1}")
        places = np.array([(c.layer, c.expert) for c in self.copies], dtype=np.int64).reshape(-1, 2)
        served = np.argwhere(serving != MISS)
        wrong = (places[serving[tuple(served.T)]] != served[:, 1:]).any(axis=1)
        if wrong.any():
            tenant, layer, expert = served[wrong][0]
            copy = self.copies[serving[tenant, layer, expert]]
            raise PlanError(
                f"tenant {self.tenants[tenant]!r} at {(int(layer), int(expert))} is served by "
                f"{copy}"
            )
        self._check_residuals(serving)
        serving.setflags(write=False)
        object.__setattr__(self, "serving", serving)

    def _check_residuals(self, serving: np.ndarray) -> None:
        places: set[tuple[int, int, int]] = set()
        for residual in self.residuals:
            place = (residual.tenant, residual.layer, residual.expert)
            inside = all(0 <= i < n for i, n in zip(place, serving.shape, strict=True))
            if not inside or serving[place] == MISS:
                raise PlanError(
                    f"a residual for (tenant, layer, expert) {place}, which no copy serves"
                )
            if place in places:
                raise PlanError(f"two residuals for (tenant, layer, expert) {place}")
            if not residual.parts:
                raise PlanError(f"the residual for (tenant, layer, expert) {place} has no parts")
            for part in residual.parts:
                part.check()
            places.add(place)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(
            (self.policy, self.tenants, self.copies, self.serving.tobytes(), self.residuals)
        )

    @property
    def num_slots(self) -> int:
        """Number of resident copies."""
        return len(self.copies)

    @property
    def owner(self) -> np.ndarray:
        """int [layers, experts]: whose copy is resident, -1: none, -2 (`MERGED`): a merged one.

        Raises PlanError if a position has several copies; `copies` and `serving` are the general
        form.
        """
        owner = np.full((self.num_layers, self.num_experts), MISS, dtype=np.int64)
        for copy in self.copies:
            if owner[copy.layer, copy.expert] != MISS:
                raise PlanError(
                    f"position {(copy.layer, copy.expert)} has several copies, so it has no one "
                    "owner; "
                    "use plan.copies and plan.serving"
                )
            owner[copy.layer, copy.expert] = copy.owner
        return owner

    @property
    def copies_per_position(self) -> np.ndarray:
        """int [layers, experts]: number of resident copies."""
        count = np.zeros((self.num_layers, self.num_experts), dtype=np.int64)
        for copy in self.copies:
            count[copy.layer, copy.expert] += 1
        return count

    def users(self, slot: int) -> tuple[int, ...]:
        """The tenants that a copy serves."""
        copy = self.copies[slot]
        return tuple(
            int(t) for t in np.flatnonzero(self.serving[:, copy.layer, copy.expert] == slot)
        )

    def weights_of(self, tenant: int, layer: int, expert: int) -> int:
        """The tenant whose weights answer for `tenant` at a position: the copy's owner, or itself
        on a miss.

        `MERGED` for a merged copy. Residuals are not considered; `Store.served_expert` has the
        weights themselves.
        """
        slot = int(self.serving[tenant, layer, expert])
        return tenant if slot == MISS else self.copies[slot].owner

    def residual_of(self, tenant: int, layer: int, expert: int) -> int | None:
        """Index into `residuals` of what a tenant adds at a position, None if nothing."""
        return self._residual_numbers.get((tenant, layer, expert))

    @cached_property
    def _residual_numbers(self) -> dict[tuple[int, int, int], int]:
        return {(r.tenant, r.layer, r.expert): i for i, r in enumerate(self.residuals)}

    @property
    def num_misses(self) -> int:
        """Number of (tenant, position) pairs that no resident copy serves."""
        return int((self.serving == MISS).sum())

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` makes an equal plan."""
        return {
            "policy": self.policy,
            "tenants": list(self.tenants),
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "copies": [
                [c.layer, c.expert, c.owner, *([list(c.mix)] if c.mix else [])] for c in self.copies
            ],
            "serving": self.serving.tolist(),
            "residuals": [r.to_json() for r in self.residuals],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """Raises PlanError if the object is not a plan."""
        try:
            return cls(
                policy=str(value["policy"]),
                tenants=tuple(value["tenants"]),
                num_layers=int(value["num_layers"]),
                num_experts=int(value["num_experts"]),
                copies=tuple(
                    Copy(
                        int(c[0]),
                        int(c[1]),
                        int(c[2]),
                        tuple(float(w) for w in c[3]) if len(c) > 3 else (),
                    )
                    for c in value["copies"]
                ),
                serving=np.array(value["serving"], dtype=np.int32).reshape(
                    len(value["tenants"]), int(value["num_layers"]), int(value["num_experts"])
                ),
                residuals=tuple(Residual.from_json(r) for r in value.get("residuals", ())),
            )
        except (KeyError, TypeError, IndexError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"not a plan: {type(error).__name__}: {error}") from error


def plan_all(contents: ArrayLike, tenants: Sequence[str]) -> Plan:
    """Every tenant keeps its own copies; copies that are bit for bit the same are kept once.

    Args:
        contents: int [tenants, layers, experts]; equal numbers at a position mean equal weights.
        tenants: their names, in order.
    """
    groups = np.asarray(contents)
    if groups.ndim != 3 or groups.shape[0] != len(tenants):
        raise PlanError(
            f"contents is {list(groups.shape)}, expected [{len(tenants)} tenants, layers, experts]"
        )
    _, num_layers, num_experts = groups.shape
    copies: list[Copy] = []
    serving = np.full(groups.shape, MISS, dtype=np.int32)
    for layer in range(num_layers):
        for expert in range(num_experts):
            slot_of_content: dict[int, int] = {}
            for tenant in range(len(tenants)):
                content = int(groups[tenant, layer, expert])
                if content not in slot_of_content:
                    slot_of_content[content] = len(copies)
                    copies.append(Copy(layer, expert, tenant))
                serving[tenant, layer, expert] = slot_of_content[content]
    return Plan("all", tuple(tenants), num_layers, num_experts, tuple(copies), serving)
