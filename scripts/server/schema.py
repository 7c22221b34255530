"""What the routes take and give, in OpenAI's and vLLM's words; FastAPI makes the OpenAPI page of it.

Types are strict ("5" is no number), names that mean nothing here are let through, as vLLM does. Fields of theirs that
would change an answer and that Moetel does not have are refused, so that nobody takes an answer for what it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from common.sampling import MAX_LOGPROBS, SamplingParams

TokenId = Annotated[int, Field(ge=0, le=2**31)]
Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=2048)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
TokenIdLists = Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=2048)]
Number = Annotated[float, Field(allow_inf_nan=False)]

# Bounds of lists that each token of an answer is compared with.
MAX_STOPS = 64
MAX_STOP_TOKENS = 1024
MAX_BIASES = 1024

MENDS = {
    "prompt": "give text, a list of texts, a list of token ids, or a list of lists of token ids; none of them empty",
    "stop": f"give a text or a list of at most {MAX_STOPS} texts, none of them empty",
    "content": "give text, or a list of parts of type text",
}
"""Instead of what Pydantic says of each form that a field may have."""


class Taken(BaseModel):
    """Of requests."""

    model_config = ConfigDict(extra="allow", strict=True)


class StreamOptions(Taken):
    include_usage: bool | None = Field(None, description="End the stream with a chunk that holds usage and metrics.")


class Asked(Taken):
    """What completions and chat have in common."""

    model: str = Field(description="A tenant's name.", max_length=256)
    max_tokens: int | None = Field(None, ge=1, description="Most new tokens.")
    temperature: Number | None = Field(None, ge=0, description="0 is greedy. Default 1, as OpenAI's.")
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1: all. (vLLM)")
    min_p: Number | None = Field(None, ge=0, le=1, description="(vLLM)")
    n: int | None = Field(None, ge=1, le=128, description="Answers for each prompt.")
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKENS)] | None = Field(
        None, description="(vLLM)"
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Makes sampling repeatable.")
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    repetition_penalty: Number | None = Field(None, gt=0, le=100, description="(vLLM)")
    logit_bias: Annotated[dict[str, Number], Field(max_length=MAX_BIASES)] | None = Field(
        None, description="Token id, as text, to what is added to its logit."
    )
    min_tokens: int | None = Field(None, ge=0, description="(vLLM)")
    ignore_eos: bool | None = Field(None, description="Go on after the end-of-sequence token. (vLLM)")
    priority: int | None = Field(
        None, ge=-(2**31), lt=2**31, description="Smaller goes first among the tenant's own requests. (vLLM)"
    )
    deadline_ms: Number | None = Field(None, gt=0, le=1e9, description="Give up, with 408, if not done by then.")
    return_token_ids: bool | None = Field(None, description="(vLLM)")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    user: str | None = Field(None, description="Taken and not used.")

    refused: ClassVar[Mapping[str, str]] = {
        "prompt_logprobs": "log probabilities of prompts are not offered",
        "use_beam_search": "beam search is not offered",
        "guided_json": "constrained output is not offered",
        "guided_regex": "constrained output is not offered",
        "guided_choice": "constrained output is not offered",
        "guided_grammar": "constrained output is not offered",
        "structured_outputs": "constrained output is not offered",
        "bad_words": "bad_words is not offered; use logit_bias",
        "allowed_token_ids": "allowed_token_ids is not offered; use logit_bias",
    }

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, why in self.refused.items():
            if getattr(self, name, None):
                raise ValueError(f"{name}: {why}; leave it out")
        kind = getattr(self, "response_format", None)
        if kind and not (isinstance(kind, dict) and kind.get("type") == "text"):
            raise ValueError("response_format: constrained output is not offered; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only for streams; set stream to true or leave it out")
        if any(not i.isascii() or not i.isdigit() or len(i) > 9 for i in self.logit_bias or {}):
            raise ValueError('logit_bias: names are token ids, written as "123"')
        if self.min_tokens and self.answer_limit is not None and self.min_tokens > self.answer_limit:
            raise ValueError(f"min_tokens: is {self.min_tokens}, above the most tokens asked for, {self.answer_limit}")
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
    def num_logprobs(self) -> int | None:
        """How many of the most probable tokens to give with each token; None: no log probabilities."""
        raise NotImplementedError

    def params(self, max_new_tokens: int, answer: int) -> SamplingParams:
        """The engine's options for answer number `answer` of a prompt. Raises RequestError."""
        # The same seed would give n times the same answer.
        seed = None if self.seed is None else (self.seed + answer) % 2**64
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            seed=seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias={int(i): b for i, b in self.logit_bias.items()} if self.logit_bias else None,
            logprobs=self.num_logprobs,
        )


class CompletionRequest(Asked):
    prompt: Text | Texts | TokenIds | TokenIdLists = Field(
        description="Text, texts, token ids, or lists of token ids.", union_mode="left_to_right"
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="So many of the most probable tokens too.")
    echo: bool | None = Field(None, description="Put the prompt's text before the answer.")
    best_of: int | None = Field(None, description="Refused, unless it is n.")
    suffix: str | None = Field(None, description="Refused.")

    refused: ClassVar[Mapping[str, str]] = {**Asked.refused, "suffix": "the models only go on from a prompt"}

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.best_of is not None and self.best_of != self.num_answers:
            raise ValueError("best_of: answers are not ranked; leave it out and ask for n answers")
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs: those of the prompt are not offered; leave out echo or logprobs")
        return self

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


class TextPart(Taken):
    type: Literal["text"]
    text: str


class Message(Taken):
    role: str = Field(min_length=1, max_length=64, description="system, user, assistant, or what the template knows.")
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=1024)] | None = None

    def for_template(self) -> dict[str, Any]:
        """As a chat template reads it; parts become one text."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content or ""}


class ChatRequest(Asked):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    max_completion_tokens: int | None = Field(None, ge=1, description="Most new tokens; goes before max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Only with logprobs.")

    refused: ClassVar[Mapping[str, str]] = {
        **Asked.refused,
        "tools": "tools are not offered",
        "functions": "functions are not offered",
        "audio": "audio is not offered",
        "echo": "echo is for /v1/completions",
        "chat_template": "the tenant's own template is used",
        "chat_template_kwargs": "the tenant's own template is used as it is",
        "continue_final_message": "the conversation must be the assistant's turn to begin",
    }

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs; set logprobs to true or leave it out")
        return self

    @property
    def answer_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Taken):
    """prompt or messages."""

    model: str = Field(max_length=256)
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        return self


class DetokenizeRequest(Taken):
    model: str = Field(max_length=256)
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class LoadTenantRequest(Taken):
    tenant_name: str = Field(min_length=1, max_length=256)
    tenant_path: str = Field(min_length=1, max_length=4096, description="A checkpoint directory on the server.")


class UnloadTenantRequest(Taken):
    tenant_name: str = Field(min_length=1, max_length=256)


# What comes back. Fields that were not set are left out.


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorBody


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class RequestMetrics(BaseModel):
    """Milliseconds on the server's clock, from the moment that the request arrived; null where nothing was measured.

    Of a request with several answers: the first token of any, the longest wait, the mean over all.
    """

    time_to_first_token_ms: float | None = None
    queue_time_ms: float | None = None
    generation_time_ms: float | None = Field(default=None, description="From the first token to the last.")
    mean_itl_ms: float | None = Field(default=None, description="Between a token and the next.")
    tokens_per_second: float | None = Field(
        default=None, description="New tokens over the time from leaving the queue."
    )
    reconfiguration_ms: float = 0.0
    expert_hits: int = 0
    expert_misses: int = 0


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionAnswer(BaseModel):
    """Also each chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    metrics: RequestMetrics | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprobs]


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    metrics: RequestMetrics | None = None
    prompt_token_ids: list[int] | None = None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunk(BaseModel):
    """One of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    metrics: RequestMetrics | None = None
    prompt_token_ids: list[int] | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "moetel"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(BaseModel):
    prompt: str


class TenantChanged(BaseModel):
    tenant_name: str
    status: Literal["loaded", "unloaded"]


class Version(BaseModel):
    version: str


class State(BaseModel):
    status: str


class TenantLoad(BaseModel):
    running: int
    waiting: int


class Load(BaseModel):
    """server_load: requests that are being answered or wait, as vLLM's."""

    server_load: int
    running: int
    waiting: int
    tenants: dict[str, TenantLoad]
