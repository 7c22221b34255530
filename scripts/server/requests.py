"""What the routes take, in OpenAI's and vLLM's words; FastAPI makes the OpenAPI page of it.

Types are strict ("5" is no number). Names that nobody's schema has are let through, as vLLM does.
Fields of their schemas that are not here are in `refused_fields.py`: those that would change an
answer are refused by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from common.bounds import bound_of
from common.sampling_params import SamplingParams
from common.structured_outputs import StructuredOutputs
from scripts.server.refused_fields import (
    REFUSED,
    REFUSED_COMPLETION,
    REFUSED_STREAM,
    Refused,
)
from scripts.server.structured import ResponseFormat, StructuredOutputsField, structure_of
from scripts.server.taken import Taken

TokenId = Annotated[int, Field(ge=0, le=2**31)]


StopText = Annotated[str, Field(min_length=1, max_length=1024)]


Texts = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=2048)]


TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]


TokenIdLists = Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=2048)]


Number = Annotated[float, Field(allow_inf_nan=False)]


# Bounds of lists that each token of an answer is compared with.
MAX_STOPS = 64


MAX_STOP_TOKENS = 1024


MAX_BIASES = 1024


MENDS = {
    "prompt": "give text, a list of texts, a list of token ids, or a list of lists of token ids; "
    "none of them empty",
    "stop": f"give a text or a list of at most {MAX_STOPS} texts, none of them empty",
    "input": "give text, or a list of items",
    "content": "give text, or a list of parts of type text",
}
"""Instead of what Pydantic says of each form that a field may have."""


def bounded_by(name: str) -> Any:
    """The bound of an option of `SamplingParams`, for a field's type."""
    return Field(**bound_of(SamplingParams, name).schema)  # type: ignore[call-overload]


class StreamOptions(Taken):
    include_usage: bool | None = Field(
        None, description="End the stream with a chunk that holds usage and metrics."
    )

    refused: ClassVar[Mapping[str, Refused]] = REFUSED_STREAM
    within: ClassVar[str] = "stream_options."


class Asked(Taken, ABC):
    """What completions and chat have in common."""

    model: str = Field(description="A tenant's name.", max_length=256)
    max_tokens: Annotated[int, bounded_by("max_new_tokens")] | None = Field(
        None, description="Most new tokens."
    )
    temperature: Number | None = Field(
        None,
        ge=0,
        description="0 is greedy. Default: of the tenant's generation_config.json, else 1.",
    )
    top_p: Annotated[Number, bounded_by("top_p")] | None = None
    top_k: Annotated[int, bounded_by("top_k")] | None = Field(
        None, description="0 or -1: all. (vLLM)"
    )
    min_p: Annotated[Number, bounded_by("min_p")] | None = Field(None, description="(vLLM)")
    n: int | None = Field(None, ge=1, le=128, description="Answers for each prompt.")
    best_of: int | None = Field(None, description="Refused, unless it is n.")
    stop: (
        StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOPS)] | None
    ) = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKENS)] | None
    ) = Field(None, description="(vLLM)")
    include_stop_str_in_output: bool | None = Field(
        None, description="Keep what ends the answer in it. (vLLM)"
    )
    skip_special_tokens: bool | None = Field(
        None, description="Leave special tokens out of the text. (vLLM)"
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Makes sampling repeatable.")
    presence_penalty: Annotated[Number, bounded_by("presence_penalty")] | None = None
    frequency_penalty: Annotated[Number, bounded_by("frequency_penalty")] | None = None
    repetition_penalty: Number | None = Field(None, gt=0, le=100, description="(vLLM)")
    logit_bias: Annotated[dict[str, Number], Field(max_length=MAX_BIASES)] | None = Field(
        None, description="Token id, as text, to what is added to its logit."
    )
    min_tokens: Annotated[int, bounded_by("min_tokens")] | None = Field(None, description="(vLLM)")
    ignore_eos: bool | None = Field(
        None, description="Go on after the end-of-sequence token. (vLLM)"
    )
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        lt=2**31,
        description="Keep so many tokens of the prompt; -1: what leaves room to answer. (vLLM)",
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="Where they are cut off; left unless given. (vLLM)"
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Add the tokenizer's special tokens; default: to prompts, not to "
        "conversations. (vLLM)",
    )
    priority: int | None = Field(
        None,
        ge=-(2**31),
        lt=2**31,
        description="Smaller goes first among the tenant's own requests. (vLLM)",
    )
    deadline_ms: Number | None = Field(
        None, gt=0, le=1e9, description="Give up, with 408, if not done by then."
    )
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=1024,
        description="Only requests with the same salt share what is in the prefix cache. (vLLM)",
    )
    request_id: str | None = Field(
        None, min_length=1, max_length=128, description="Becomes the answer's id. (vLLM)"
    )
    return_token_ids: bool | None = Field(None, description="(vLLM)")
    return_tokens_as_token_ids: bool | None = Field(
        None, description="Log probabilities name tokens as token_id:N. (vLLM)"
    )
    prompt_logprobs: Annotated[int, bounded_by("prompt_logprobs")] | None = Field(
        None,
        description="Give the log probability of each token of the prompt, and so many of the most "
        "probable ones. Not with stream. (vLLM)",
    )
    response_format: ResponseFormat | None = Field(
        None, description="json_object, or json_schema: the answer is JSON, of the schema."
    )
    structured_outputs: StructuredOutputsField | None = Field(
        None, description="One of json, regex, choice, grammar, json_object. (vLLM)"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")

    refused: ClassVar[Mapping[str, Refused]] = REFUSED

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only for streams; set stream to true or leave it out")
        if self.response_format is not None and self.structured_outputs is not None:
            raise ValueError("structured_outputs: response_format is there too; leave one out")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs: not in streams; leave out stream or prompt_logprobs")
        if any(not i.isascii() or not i.isdigit() or len(i) > 9 for i in self.logit_bias or {}):
            raise ValueError('logit_bias: names are token ids, written as "123"')
        if (
            self.min_tokens
            and self.answer_limit is not None
            and self.min_tokens > self.answer_limit
        ):
            raise ValueError(
                f"min_tokens: is {self.min_tokens}, above the most tokens asked for, "
                f"{self.answer_limit}"
            )
        if self.best_of is not None and self.best_of != self.num_answers:
            raise ValueError("best_of: answers are not ranked; leave it out and ask for n answers")
        return self

    @property
    def answer_limit(self) -> int | None:
        return self.max_tokens

    @property
    def num_answers(self) -> int:
        """For each prompt."""
        return self.n or 1

    @property
    def want_usage(self) -> bool:
        """In a stream."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def skip_special(self) -> bool:
        """Whether special tokens are left out of the text."""
        return self.skip_special_tokens is not False

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same of the prompt's tokens, for whatever field of the answer."""
        return self.prompt_logprobs

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """How many of the most probable tokens to give with each token; None: no log
        probabilities."""

    def structure(self) -> StructuredOutputs | None:
        """What the answer has to be. Raises RequestError."""
        return structure_of(self.response_format, self.structured_outputs)

    def params(
        self, max_new_tokens: int, answer: int, defaults: Mapping[str, int | float]
    ) -> SamplingParams:
        """The engine's options for answer number `answer` of a prompt. Raises RequestError.

        defaults: what the tenant's generation_config.json says, by name of `SamplingParams`; where
        it is silent too, OpenAI's apply. Its `max_new_tokens` bounds what the request asks for.
        """

        def chosen(name: str, otherwise: float) -> Any:
            value = getattr(self, name)
            return defaults.get(name, otherwise) if value is None else value

        # The same seed would give n times the same answer.
        seed = None if self.seed is None else (self.seed + answer) % 2**64
        return SamplingParams(
            max_new_tokens=min(max_new_tokens, int(defaults.get("max_new_tokens", max_new_tokens))),
            temperature=chosen("temperature", 1.0),
            top_k=chosen("top_k", 0),
            top_p=chosen("top_p", 1.0),
            min_p=chosen("min_p", 0.0),
            seed=seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=chosen("repetition_penalty", 1.0),
            logit_bias={int(i): b for i, b in self.logit_bias.items()} if self.logit_bias else None,
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
            structured_outputs=self.structure(),
            skip_special_tokens=self.skip_special,
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
        )


class CompletionRequest(Asked):
    prompt: str | Texts | TokenIds | TokenIdLists = Field(
        description="Text, texts, token ids, or lists of token ids.", union_mode="left_to_right"
    )
    max_tokens: int | None = Field(
        None, ge=0, description="Most new tokens; 0 only with echo: the prompt alone."
    )
    logprobs: Annotated[int, bounded_by("logprobs")] | None = Field(
        None, description="So many of the most probable tokens too."
    )
    echo: bool | None = Field(
        None, description="Put the prompt before the answer, in text and logprobs."
    )

    refused: ClassVar[Mapping[str, Refused]] = REFUSED_COMPLETION

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: is 0, which is for echo; ask for at least one token")
        return self

    @property
    def is_prompt_alone(self) -> bool:
        """Whether nothing of an answer is given. It has a token all the same, which nobody sees."""
        return self.max_tokens == 0

    @property
    def answer_limit(self) -> int | None:
        return 1 if self.is_prompt_alone else self.max_tokens

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((n for n in asked if n is not None), default=None)


class LoadTenantRequest(Taken):
    tenant_name: str = Field(min_length=1, max_length=256)
    tenant_path: str = Field(
        min_length=1, max_length=4096, description="A checkpoint directory on the server."
    )


class UnloadTenantRequest(Taken):
    tenant_name: str = Field(min_length=1, max_length=256)
