"""The planning policies by name."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.errors import PlanError
from common.planning.residual_curves import Kinds


@dataclass(frozen=True)
class Policy:
    """How a policy chooses.

    copies: "paper" (round robin), "all" (every tenant its own), "owned" (some tenants' own),
        "mean", "merged" (the mixture with the least loss) or "fitted" (least squares on calibration
        inputs; the mixture without them).
    kinds: residuals that it may use.
    """

    summary: str
    copies: str
    kinds: Kinds = field(default_factory=lambda: Kinds((), False))

    @property
    def uses_extra(self) -> bool:
        """Whether bytes beyond one copy a position are of use to it."""
        return self.kinds.any


POLICIES: dict[str, Policy] = {
    "round_robin": Policy(
        "the paper's rule: one tenant's copy a position, owners in turn", "paper"
    ),
    "fit": Policy("copies fitted to the outputs of all tenants' experts", "fitted"),
    "residual": Policy(
        "fit, and residuals of any kind and precision where they pay", "fitted", Kinds()
    ),
    "all": Policy("every tenant's own copies; nothing is shared but what is identical", "all"),
}
"""What users choose from."""

KNOWN_POLICIES = POLICIES | {
    "medoid": Policy("of tenants' own copies the one that serves the others best", "owned"),
    "mean": Policy("the plain mean of the tenants' experts", "mean"),
    "merge": Policy("the mixture of tenants' experts with the least loss", "merged"),
    "sign": Policy(
        "fit, and residuals of one sign bit a weight where they pay",
        "fitted",
        Kinds((), True),
    ),
    "low_rank": Policy(
        "fit, and low-rank residuals in 16 bits where they pay", "fitted", Kinds((16,), False)
    ),
}
"""With those that evaluations compare them with, and that older stores name."""


DEFAULT_POLICY = "residual"


# Extra bytes for each tenant where none are asked for, as a share of one model's expert bytes: 15 %
# for four tenants.
DEFAULT_EXTRA = 0.0375


def policy_named(name: str) -> Policy:
    """A policy that users, evaluations or older stores name. Raises PlanError for another one."""
    if name not in KNOWN_POLICIES:
        raise PlanError(f"no policy {name!r}; there is: {', '.join(POLICIES)}")
    return KNOWN_POLICIES[name]
