"""How bounds of options are stated: once, beside the option, for Python, flags and HTTP schema.

The bounds themselves are in common/sampling_params.py, common/serving/scheduler_options.py and the
engines' options.py. An option is a field of a frozen dataclass made with `bounded`; `check_bounds`
checks them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np

from common.units import is_whole

Options = TypeVar("Options")


@dataclass(frozen=True)
class Bound:
    """What the value of an option may be.

    Args:
        whole: whether only whole numbers are allowed.
        low, high: the least and the largest value, both allowed.
        above: the value must be larger than this one.
        choices: values that are allowed; the only ones unless it may be a number too.
        optional: whether None is allowed.
        note: what messages add, such as the meaning of a bound.
    """

    whole: bool = False
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[Any, ...] = ()
    optional: bool = False
    note: str = ""

    def allows(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if any(type(value) is type(one) and value == one for one in self.choices):
            return True
        if self.choices and not self.whole:
            return False
        if not (is_whole(value) if self.whole else _is_number(value)):
            return False
        return (
            not math.isnan(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
        )

    @property
    def words(self) -> str:
        """`give a whole number from 1 to 20, or None`."""
        if self.choices and not self.whole:
            return f"choose one of {', '.join(map(str, self.choices))}"
        parts = ["a whole number" if self.whole else "a number"]
        if self.above is not None:
            parts.append(f"above {self.above:g}")
            parts += [] if self.high is None else [f"and at most {self.high:g}"]
        elif self.low is not None:
            parts.append(f"from {self.low:g}")
            parts += [] if self.high is None else [f"to {self.high:g}"]
        return "give " + " ".join(parts) + self.note + (", or None" if self.optional else "")

    @property
    def schema(self) -> dict[str, float]:
        """The bound as arguments of pydantic's `Field`."""
        given = {"ge": self.low, "le": self.high, "gt": self.above}
        return {name: value for name, value in given.items() if value is not None}


COUNT = Bound(whole=True, low=1)
COUNT_OR_NONE = Bound(whole=True, low=1, optional=True)


def bounded(default: Any, bound: Bound) -> Any:
    """A dataclass field with a bound."""
    return field(default=default, metadata={"bound": bound})


def bound_of(options: type, name: str) -> Bound:
    """The bound of an option."""
    bound: Bound = next(f for f in fields(options) if f.name == name).metadata["bound"]
    return bound


def check_bounds(options: Any, error: type[Exception]) -> None:
    """Raise `error` for the first option out of its bound."""
    for one in fields(options):
        bound: Bound | None = one.metadata.get("bound")
        value = getattr(options, one.name)
        if bound is not None and not bound.allows(value):
            raise error(f"{one.name} is {value!r}; {bound.words}")


def make_options(kind: type[Options], values: Mapping[str, Any], error: type[Exception]) -> Options:
    """Options of a class by name. Raises `error` for what the class does not have or allow."""
    known = sorted(f.name for f in fields(kind))  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise error(f"{kind.__name__} has no option {unknown[0]!r}; it has: {', '.join(known)}")
    made = kind(**values)
    check_bounds(made, error)
    return made


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.floating) and not isinstance(value, bool)
