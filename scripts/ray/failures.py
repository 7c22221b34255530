"""Errors as data: Ray wraps exceptions that a replica raises, and their fields would be lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.errors import MoetelError


@dataclass(frozen=True)
class Failure:
    """An error of ours, to be raised elsewhere."""

    kind: type[MoetelError]
    args: tuple[Any, ...]
    state: dict[str, Any]

    @classmethod
    def of(cls, error: MoetelError) -> Failure:
        return cls(type(error), error.args, dict(vars(error)))

    def error(self) -> MoetelError:
        found = self.kind.__new__(self.kind, *self.args)
        found.args = self.args
        vars(found).update(self.state)
        return found
