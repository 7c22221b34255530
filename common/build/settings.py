"""How a store is planned, and how much memory that gives to what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from common.build.sources import Source
from common.dtypes import BY_NAME
from common.errors import PlanError
from common.planning.policies import DEFAULT_EXTRA, DEFAULT_POLICY, POLICIES, policy_named
from common.store.store import non_expert_bytes
from common.units import format_bytes, is_whole

Slots = int | Literal["all"] | None


@dataclass(frozen=True)
class PlanSettings:
    """How a store is planned; kept in its provenance, and applied again when a tenant is added or
    removed.

    slots, budget_bytes, extra: at most one of them; see `build_store`. traffic: tenant -> requests
        beside others' one.
    """

    policy: str = DEFAULT_POLICY
    slots: Slots = None
    budget_bytes: int | None = None
    extra: float | None = None
    traffic: Mapping[str, float] = field(default_factory=dict)

    def check(self) -> None:
        policy = policy_named(self.policy)
        if policy.copies == "all" and (self.slots, self.budget_bytes) not in (
            (None, None),
            ("all", None),
        ):
            raise PlanError(
                "policy 'all' keeps all that tenants have; leave slots and budget out, or choose "
                "another policy"
            )
        if sum(v is not None for v in (self.slots, self.budget_bytes, self.extra)) > 1:
            raise PlanError("give one of slots, a budget, and a share of extra bytes")
        if (
            self.slots is not None
            and self.slots != "all"
            and (not is_whole(self.slots) or int(self.slots) < 0)
        ):
            raise PlanError(f"slots is {self.slots!r}; give a whole number from 0, or 'all'")
        if self.budget_bytes is not None and not is_whole(self.budget_bytes):
            raise PlanError(f"budget_bytes is {self.budget_bytes!r}; give a whole number of bytes")
        if self.extra is not None:
            check_extra(self.extra)
            if self.extra > 0 and not policy.uses_extra:
                raise PlanError(
                    f"policy {self.policy!r} keeps one copy a position and has no use for extra "
                    "bytes; leave extra out, or choose one of: "
                    f"{', '.join(n for n, p in POLICIES.items() if p.uses_extra)}"
                )

    def to_json(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "slots": self.slots,
            "budget_bytes": self.budget_bytes,
            "extra": self.extra,
            "traffic": dict(self.traffic),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PlanSettings:
        return cls(
            value["policy"],
            value["slots"],
            value["budget_bytes"],
            value.get("extra"),
            value.get("traffic", {}),
        )


def check_extra(extra: Any) -> None:
    """Raises PlanError for what is no share of one model's expert bytes."""
    if isinstance(extra, bool) or not isinstance(extra, int | float) or not 0 <= extra < 1e6:
        raise PlanError(
            f"extra is {extra!r}; give a share of one model's expert bytes, such as 0.15"
        )


@dataclass(frozen=True)
class Amount:
    """slots: positions with a copy, None for everything that tenants have. extra_bytes: for more
    copies, residuals."""

    slots: int | None
    extra_bytes: int = 0


def resolve(settings: PlanSettings, sources: Sequence[Source], dtype: str) -> Amount:
    """How much memory there is for what. Raises PlanError if it cannot be had."""
    spec = sources[0].config.experts
    policy = policy_named(settings.policy)
    copy_bytes = spec.copy_elements * BY_NAME[dtype].itemsize
    if settings.budget_bytes is not None:
        largest = max(sources, key=lambda s: non_expert_bytes(s.family, s.config, dtype))
        fixed = non_expert_bytes(largest.family, largest.config, dtype)
        if settings.budget_bytes < fixed + copy_bytes:
            raise PlanError(
                f"budget of {format_bytes(settings.budget_bytes)} is too small for one tenant: "
                f"{largest.name!r} needs "
                f"{format_bytes(fixed)} for its non-expert weights and {format_bytes(copy_bytes)} "
                "for each expert; "
                f"give at least {fixed + copy_bytes} bytes"
            )
        room = settings.budget_bytes - fixed
        if room < spec.num_positions * copy_bytes:
            return Amount(room // copy_bytes)
        return Amount(
            spec.num_positions, room - spec.num_positions * copy_bytes if policy.uses_extra else 0
        )
    if settings.slots == "all" or policy.copies == "all":
        return Amount(None)
    if settings.slots is not None:
        if settings.slots > spec.num_positions:
            raise PlanError(
                f"{settings.slots} slots, but {spec.num_positions} positions; give "
                f"0..{spec.num_positions}, or 'all', "
                "or a share of extra bytes for more copies"
            )
        return Amount(settings.slots)
    extra = settings.extra
    if extra is None:
        extra = DEFAULT_EXTRA * len(sources) if policy.uses_extra and len(sources) > 1 else 0.0
    return Amount(spec.num_positions, int(extra * spec.num_positions * copy_bytes))
