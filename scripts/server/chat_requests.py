"""Bodies of requests about conversations and tokens, with the fields that are supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from common.sampling_params import MAX_LOGPROBS
from common.structured_outputs import StructuredOutputs
from scripts.server.refused_fields import (
    REFUSED_CHAT,
    REFUSED_TEMPLATE,
    Refused,
)
from scripts.server.requests import Asked, TokenId
from scripts.server.taken import Taken
from scripts.server.tools.requested_tools import NamedTool, Tool, ToolChoice, structure_of_calls


class TextPart(Taken):
    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(Taken):
    """Of an assistant's turn that a client sends back."""

    type: Literal["refusal"]
    refusal: str


Part = str | TextPart | RefusalPart


class Message(Taken):
    role: str = Field(
        min_length=1,
        max_length=64,
        description="system, user, assistant, or what the template knows.",
    )
    content: str | Annotated[list[Part], Field(fail_fast=True, max_length=1024)] | None = None


class Conversation(Taken):
    """What chat templates are given."""

    messages: (
        Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)] | None
    ) = None
    add_generation_prompt: bool | None = Field(
        None,
        description="Begin the assistant's turn; default: yes, unless the last message goes on. "
        "(vLLM)",
    )
    continue_final_message: bool | None = Field(
        None, description="Go on with the last message. (vLLM)"
    )
    documents: Annotated[list[dict[str, Any]], Field(max_length=1024)] | None = Field(
        None, description="For templates that read documents. (vLLM)"
    )
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] | None = Field(
        None, description="Variables of the template. (vLLM)"
    )
    reasoning_effort: str | None = Field(
        None, max_length=64, description="A variable of the template. (vLLM)"
    )
    tools: Annotated[list[Tool], Field(max_length=128)] | None = Field(
        None, description="Functions that the answer may call; the template writes them out."
    )

    refused: ClassVar[Mapping[str, Refused]] = REFUSED_TEMPLATE

    @model_validator(mode="after")
    def _check_conversation(self) -> Self:
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError(
                "add_generation_prompt: begins another turn than continue_final_message goes on "
                "with; choose one"
            )
        return self


class ChatRequest(Conversation, Asked):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Most new tokens; goes before max_tokens."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Only with logprobs.")
    return_prompt_text: bool | None = Field(
        None, description="Give the written conversation too. (vLLM)"
    )

    tool_choice: ToolChoice | None = Field(
        None, description="auto (the default where there are tools), none, required, or one tool."
    )
    parallel_tool_calls: bool | None = Field(None, description="Whether several may be called.")

    include_reasoning: bool | None = Field(
        None, description="Whether reasoning is given, if the server tells it apart. (vLLM)"
    )

    refused: ClassVar[Mapping[str, Refused]] = REFUSED_CHAT

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        if self.tool_choice in (None, "none", "auto"):
            return self
        names = [tool.function.name for tool in self.tools or ()]
        if not names:
            raise ValueError("tool_choice: there are no tools; give tools, or leave it out")
        choice = self.tool_choice
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ValueError(
                f"tool_choice: there is no tool {choice.function.name!r}; there is: "
                + ", ".join(names)
            )
        if super().structure() is not None:
            raise ValueError(
                "tool_choice: the answer cannot be a call and of another structure; leave out "
                "response_format and structured_outputs"
            )
        return self

    @property
    def calls(self) -> ToolChoice:
        """How tools may be called."""
        return (self.tool_choice or "auto") if self.tools else "none"

    def structure(self) -> StructuredOutputs | None:
        parallel = self.parallel_tool_calls is not False
        asked = structure_of_calls(self.tools or (), self.calls, parallel)
        return super().structure() if asked is None else asked

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise ValueError(
                "add_generation_prompt: an answer begins the assistant's turn; leave it out, or "
                "set "
                "continue_final_message to go on with the last message, or write the prompt with "
                "/tokenize and send it "
                "to /v1/completions"
            )
        if self.top_logprobs and not self.logprobs:
            raise ValueError(
                "top_logprobs: only with logprobs; set logprobs to true or leave it out"
            )
        return self

    @property
    def answer_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Conversation):
    """prompt or messages."""

    model: str = Field(max_length=256)
    prompt: str | None = None
    add_special_tokens: bool | None = Field(
        None, description="Default: to prompts, not to conversations."
    )
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        if self.messages is None:
            for name in Conversation.model_fields:
                if name != "messages" and getattr(self, name) not in (None, False, [], {}):
                    raise ValueError(
                        f"{name}: this is for conversations; give messages or leave it out"
                    )
        return self


class DetokenizeRequest(Taken):
    model: str = Field(max_length=256)
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
