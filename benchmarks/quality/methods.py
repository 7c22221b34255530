"""Ways to serve tenants from less memory: policies, merging baselines, one model for all.

A method is a policy of `moetel build` (with @EXTRA, a share of one model's expert memory), `alone`,
`base` (the base answers for all), `round_robin_one_model` (the paper's rule without
reconfiguration: shared experts, the first tenant's other layers for all), a merging method (one
model for all) or a merging method with `_experts` behind its name (experts merged, every tenant
keeps its other layers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality import merging
from common.planning.policies import KNOWN_POLICIES
from scripts.quality.task import TaskError

PLANNED = {name: policy for name, policy in KNOWN_POLICIES.items() if name != "all"}
"""The policies that plan; nothing shared is the method `alone`."""


@dataclass(frozen=True)
class Method:
    """A way to serve the tenants. Written NAME[@EXTRA][:option=value,...].

    extra: for policies: memory beyond one model's experts, as a share of them; None: what `moetel
        build` takes.
    options: of `merging.Recipe` for merging methods; for policies slots, and calibrated (0: from
        weights alone).
    """

    name: str
    extra: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Method:
        """Raises TaskError for a name that is not known and a value that is no number."""
        match = re.fullmatch(r"(?P<name>\w+)(?:@(?P<extra>[^:]+))?(?::(?P<options>.+))?", text)
        if not match:
            raise TaskError(f"method {text!r}: write NAME, NAME@EXTRA or NAME:option=value,...")
        if match["name"] not in names():
            raise TaskError(f"no method {match['name']!r}; there is: {', '.join(names())}")
        options: dict[str, Any] = {}
        for part in (match["options"] or "").split(",") if match["options"] else ():
            key, equals, value = part.partition("=")
            if not equals:
                raise TaskError(
                    f"method {text!r}: option {part!r} has no value; write option=value"
                )
            options[key] = (
                value if value == "all" else _number(value, f"method {text!r}: option {key}")
            )
        extra = (
            None
            if match["extra"] is None
            else float(_number(match["extra"], f"method {text!r}: extra"))
        )
        found = cls(match["name"], extra, options)
        found.check()
        return found

    @property
    def label(self) -> str:
        """For tables: `auto + 15 %`, `ties, density 0.2`."""
        text = self.name.replace("_", " ")
        if self.extra is not None:
            text += f" + {100 * self.extra:.4g} %"
        return ", ".join([text, *(f"{k} {v}" for k, v in self.options.items())])

    def recipe(self) -> merging.Recipe | None:
        """How to merge, None for methods that do not."""
        name = self.name.removesuffix("_experts")
        return merging.Recipe.of(name, self.options) if name in merging.METHODS else None

    @property
    def calibrates(self) -> bool:
        """Whether the plan depends on calibration, where there is one."""
        return (
            self.name in PLANNED
            and self.name != "round_robin"
            and bool(self.options.get("calibrated", True))
        )

    def check(self) -> None:
        """Raises TaskError or PlanError for options that the method does not take."""
        if self.name in PLANNED:
            known: tuple[str, ...] = ("slots", "calibrated")
        elif self.recipe() is not None:
            known = tuple(self.options)  # checked by the recipe
        else:
            known = ()
        for option in self.options:
            if option not in known:
                raise TaskError(
                    f"method {self.name!r} has no option {option!r}; it has: "
                    f"{', '.join(known) or 'none'}"
                )
        if self.extra is not None and (
            self.name not in PLANNED or (self.extra and not PLANNED[self.name].uses_extra)
        ):
            users = ", ".join(name for name, policy in PLANNED.items() if policy.uses_extra)
            raise TaskError(
                f"method {self.name!r} has no use for extra memory; leave @ out, or take one of: "
                f"{users}"
            )


def names() -> tuple[str, ...]:
    """Every method that `Method.parse` knows; policies are those of `moetel build`."""
    return (
        "alone",
        "base",
        *PLANNED,
        "round_robin_one_model",
        *merging.METHODS,
        *(f"{m}_experts" for m in merging.METHODS),
    )


def usual_methods(extra: Sequence[float], with_base: bool) -> list[Method]:
    """The paper's rule, the merging baselines, and every other policy: without extra memory, and
    with each share of it where the policy has a use for it.

    Policies with residuals are what the policy without is, if they have no extra memory: left out.
    """
    found = [Method("round_robin"), Method("round_robin_one_model")]
    found += [Method(m) for m in merging.METHODS if with_base or m not in merging.NEED_BASE]
    for name, policy in PLANNED.items():
        if name != "round_robin" and not policy.kinds.any:
            found.append(Method(name, 0.0 if policy.uses_extra else None))
        if policy.uses_extra:
            found += [Method(name, share) for share in extra or (None,)]
    return found


def _number(text: str, what: str) -> float | int:
    try:
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError:
        raise TaskError(f"{what} is {text!r}; give a number") from None
