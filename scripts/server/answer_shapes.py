"""What the routes answer, in OpenAI's and vLLM's words. Fields that were not set are left out.

Requests are in requests.py and chat_requests.py.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from scripts.server.tools.answer import ToolCall


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorBody


class PromptTokensDetails(BaseModel):
    """cached_tokens: those that were found in the cache, and not computed again."""

    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class RequestMetrics(BaseModel):
    """Milliseconds on the server's clock, from the moment that the request arrived; null where
    nothing was measured.

    Of a request with several answers: the first token of any, the longest wait, the mean over all.
    """

    time_to_first_token_ms: float | None = None
    queue_time_ms: float | None = None
    generation_time_ms: float | None = Field(
        default=None, description="From the first token to the last."
    )
    mean_itl_ms: float | None = Field(default=None, description="Between a token and the next.")
    tokens_per_second: float | None = Field(
        default=None, description="New tokens over the time from leaving the queue."
    )
    reconfiguration_ms: float = 0.0
    expert_hits: int = 0
    expert_misses: int = 0


class CompletionLogprobs(BaseModel):
    """null stands for a prompt's first token, which nothing stands before."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """rank: 1 for the most probable token."""

    logprob: float
    rank: int
    decoded_token: str


ScoredPrompt = list[dict[str, PromptLogprob] | None]
"""For each token of a prompt: its own id and those of the most probable ones in its place."""


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: ScoredPrompt | None = None


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
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None
    reasoning: str | None = None


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
    prompt_text: str | None = None
    prompt_logprobs: ScoredPrompt | None = None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning: str | None = None


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
    prompt_text: str | None = None


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
    """unavailable: tenants that cannot be asked, as far as the caller may know them; left out if
    there are none."""

    status: str
    unavailable: list[str] | None = None


class TenantLoad(BaseModel):
    running: int
    waiting: int


class Load(BaseModel):
    """server_load: requests that are being answered or wait, as vLLM's."""

    server_load: int
    running: int
    waiting: int
    tenants: dict[str, TenantLoad]
