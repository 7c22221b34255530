"""Fields of requests that offer tools, in OpenAI's words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from common.structured_outputs import StructuredOutputs
from scripts.server.taken import Taken


class Function(Taken):
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")
    strict: bool | None = None


class Tool(Taken):
    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As it was sent, for templates."""
        return self.model_dump(exclude_unset=True)


class NamedFunction(Taken):
    name: str = Field(max_length=64)


class NamedTool(Taken):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def structure_of_calls(
    tools: Sequence[Tool], choice: ToolChoice, parallel: bool
) -> StructuredOutputs | None:
    """What an answer has to be: a named tool's arguments, a list of calls if one is required, or
    anything. Raises RequestError."""
    if isinstance(choice, NamedTool):
        named = next(t.function for t in tools if t.function.name == choice.function.name)
        return StructuredOutputs(json=json.dumps(_schema(named)))
    if choice != "required":
        return None
    one = [
        {
            "type": "object",
            "properties": {"name": {"const": t.function.name}, "parameters": _schema(t.function)},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for t in tools
    ]
    calls: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": one}}
    return StructuredOutputs(json=json.dumps(calls if parallel else calls | {"maxItems": 1}))


def _schema(function: Function) -> dict[str, Any]:
    return function.parameters or {"type": "object"}
