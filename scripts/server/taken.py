"""What all of a request's objects have in common: strict types, and fields that are refused by
name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from scripts.server.refused_fields import Refused


class Taken(BaseModel):
    """Of requests. refused: fields that are refused unless they change nothing."""

    model_config = ConfigDict(extra="allow", strict=True)

    refused: ClassVar[Mapping[str, Refused]] = {}
    within: ClassVar[str] = ""
    """What stands before a field's name in errors."""

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        for name, refused in self.refused.items():
            if refused.applies((self.model_extra or {}).get(name)):
                raise ValueError(f"{self.within}{name}: {refused.why}; leave it out")
        return self
