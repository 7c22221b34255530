"""Bodies of OpenAI's Responses API, and the conversations that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError

from scripts.server.chat_requests import ChatRequest
from scripts.server.errors import ApiError
from scripts.server.refused_fields import Refused
from scripts.server.requests import Number
from scripts.server.taken import Taken

_NOT_KEPT = Refused("answers are not kept; send the whole conversation as input")

# Fields of vLLM's that mean here what they mean to `/v1/chat/completions`.
ALSO_OF_CHAT = (
    *("top_k", "min_p", "seed", "stop", "stop_token_ids", "include_stop_str_in_output"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens"),
    *("ignore_eos", "skip_special_tokens", "truncate_prompt_tokens", "priority", "deadline_ms"),
    *("cache_salt", "request_id", "structured_outputs", "chat_template_kwargs"),
    "include_reasoning",
)


class FunctionTool(Taken):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Taken):
    type: Literal["function"]
    name: str


class TextFormat(Taken):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Taken):
    format: TextFormat | None = None

    refused: ClassVar[Mapping[str, Refused]] = {
        "verbosity": Refused("the models do not know it; say it in a message", ("medium",))
    }
    within: ClassVar[str] = "text."


class ReasoningOptions(Taken):
    effort: str | None = None

    refused: ClassVar[Mapping[str, Refused]] = {
        "summary": Refused("reasoning is given whole", ("auto",)),
        "generate_summary": Refused("reasoning is given whole", ("auto",)),
    }
    within: ClassVar[str] = "reasoning."


class ResponsesRequest(Taken):
    """A conversation and how it goes on. Fields in ALSO_OF_CHAT are taken too."""

    model: str = Field(description="A tenant's name.", max_length=256)
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    instructions: str | None = Field(None, description="The system's message.")
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: Number | None = Field(None, ge=0)
    top_p: Number | None = None
    stream: bool | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None

    refused: ClassVar[Mapping[str, Refused]] = {
        "previous_response_id": _NOT_KEPT,
        "conversation": _NOT_KEPT,
        "background": _NOT_KEPT,
        "prompt": Refused("prompts are not kept; send them as input"),
        "include": Refused("answers hold nothing beside their items"),
        "truncation": Refused("input is not cut", ("disabled",)),
        "top_logprobs": Refused("use /v1/chat/completions", (0,)),
        "max_tool_calls": Refused("tools are called by whoever asks"),
        "context_management": Refused("conversations are taken as they are"),
        "moderation": Refused("nothing is moderated"),
    }

    def chat(self) -> ChatRequest:
        """What is asked of `/v1/chat/completions`. Raises ApiError, RequestValidationError."""
        asked: dict[str, Any] = {"model": self.model, "messages": self._messages()}
        for name, value in (
            ("max_completion_tokens", self.max_output_tokens),
            ("temperature", self.temperature),
            ("top_p", self.top_p),
            ("stream", self.stream),
            ("parallel_tool_calls", self.parallel_tool_calls),
            ("reasoning_effort", self.reasoning.effort if self.reasoning else None),
            ("response_format", self._format()),
        ):
            if value is not None:
                asked[name] = value
        if self.tools:
            asked["tools"] = [
                {"type": "function", "function": t.model_dump(exclude={"type"}, exclude_unset=True)}
                for t in self.tools
            ]
        choice = self.tool_choice
        if isinstance(choice, NamedTool):
            asked["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        elif choice is not None:
            asked["tool_choice"] = choice
        extra = self.model_extra or {}
        asked |= {name: extra[name] for name in ALSO_OF_CHAT if name in extra}
        try:
            return ChatRequest.model_validate(asked)
        except ValidationError as error:
            found = [e | {"loc": ("body", *e["loc"])} for e in error.errors()]
            raise RequestValidationError(found) from error

    def _format(self) -> dict[str, Any] | None:
        wanted = self.text.format if self.text else None
        if wanted is None or wanted.type != "json_schema":
            return None if wanted is None else {"type": wanted.type}
        schema = wanted.model_dump(exclude={"type"}, exclude_unset=True, by_alias=True)
        return {"type": "json_schema", "json_schema": {"name": "answer"} | schema}

    def _messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.instructions:
            found.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*found, {"role": "user", "content": self.input}]
        thought = ""
        for i, item in enumerate(self.input):
            kind = item.get("type", "message")
            if kind == "reasoning":
                thought = _thought(i, item)
                continue
            message = _message(i, kind, item)
            if thought and message["role"] == "assistant":
                message, thought = message | {"reasoning": thought}, ""
            before = found[-1] if found else {}
            if kind == "function_call" and before.get("role") == "assistant":
                before["tool_calls"] = before.get("tool_calls", []) + message["tool_calls"]
            else:
                found.append(message)
        return found


def _thought(number: int, item: Mapping[str, Any]) -> str:
    """The text of a reasoning item. Raises ApiError."""
    parts = item.get("content") or item.get("summary") or []
    texts = [p.get("text") for p in parts if isinstance(p, dict)] if parts else []
    if not isinstance(parts, list) or not all(isinstance(text, str) for text in texts):
        where = f"input[{number}].content"
        raise ApiError(400, f"{where}: give a list of parts that have a text", param=where)
    return "".join(map(str, texts))


def _message(number: int, kind: str, item: Mapping[str, Any]) -> dict[str, Any]:
    """An item of the input as chat has it. Raises ApiError."""
    try:
        if kind == "message":
            role = "system" if item["role"] == "developer" else item["role"]
            return {"role": role, "content": item["content"]}
        if kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        if kind == "function_call_output":
            return {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
    except KeyError as error:
        where = f"input[{number}].{error.args[0]}"
        raise ApiError(400, f"{where}: is missing in a {kind}; give it", param=where) from error
    raise ApiError(
        400,
        f"input[{number}].type: {kind!r} is not known; give message, reasoning, function_call or "
        "function_call_output",
        param=f"input[{number}].type",
    )
