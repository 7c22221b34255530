"""Fields of requests that say what an answer has to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from common.structured_outputs import StructuredOutputs
from scripts.server.refused_fields import Refused
from scripts.server.taken import Taken

_OTHER_FORM = Refused("grammars have no such form here")


class JSONSchema(Taken):
    """OpenAI's `json_schema`. `strict` changes nothing: answers keep to the schema in any case."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Taken):
    """OpenAI's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = Field(None, description="With type json_schema.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("response_format.json_schema: goes with the type json_schema")
        return self


class StructuredOutputsField(Taken):
    """vLLM's."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = Field(None, max_length=2**16)
    choice: list[str] | None = Field(None, max_length=2048)
    grammar: str | None = Field(None, max_length=2**20)
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None

    refused: ClassVar[Mapping[str, Refused]] = {
        "structural_tag": _OTHER_FORM,
        "whitespace_pattern": Refused("use disable_any_whitespace"),
        "disable_additional_properties": Refused("write additionalProperties into the schema"),
        "disable_fallback": Refused("there is one library"),
    }
    within: ClassVar[str] = "structured_outputs."


def structure_of(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputsField | None
) -> StructuredOutputs | None:
    """What one of them asks for. Raises RequestError."""
    if response_format is not None and response_format.type != "text":
        if response_format.json_schema is None:
            return StructuredOutputs(json_object=True)
        return StructuredOutputs(json=response_format.json_schema.schema_ or {})
    if structured_outputs is None:
        return None
    own = structured_outputs
    return StructuredOutputs(
        own.json_,
        own.regex,
        own.choice,
        own.grammar,
        own.json_object,
        bool(own.disable_any_whitespace),
    )
