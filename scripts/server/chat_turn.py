"""A conversation's next turn, whichever route asks for it: its prompt, its jobs, and its text told
apart as reasoning, content and calls of tools."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from fastapi import Request

from scripts.server.answers import check_number, jobs_of, prompt_limit
from scripts.server.chat_requests import ChatRequest
from scripts.server.conversation import prompt_ids, written
from scripts.server.errors import ApiError
from scripts.server.front import arrival
from scripts.server.reasoning import END, Reasoning
from scripts.server.running import Job
from scripts.server.service import Access, Service
from scripts.server.tools import PARSERS
from scripts.server.tools.answer import Calling, ToolCall


@dataclass(frozen=True)
class Turn:
    """What is asked of the engine. prompt: as the template wrote it; ids: its tokens; jobs: one for
    each answer. calling, thinking: of each answer, or empty."""

    tenant: str
    prompt: str
    ids: list[int]
    jobs: list[Job]
    calling: list[Calling]
    thinking: list[Reasoning]

    def split(self, index: int, text: str, over: bool) -> tuple[str, str, list[ToolCall]]:
        """More of an answer's text, the last if it is over: reasoning, content and calls."""
        reasoning = ""
        if self.thinking:
            reasoning, text = self.thinking[index].push(text, over)
        if not self.calling:
            return reasoning, text, []
        return reasoning, *self.calling[index].push(text, over)

    def finish_reason(self, index: int, reason: str) -> str:
        """In OpenAI's words, of an answer that ended for a reason of ours."""
        if reason == "stop" and self.calling:
            return self.calling[index].finish_reason or reason
        return reason


async def next_turn(body: ChatRequest, request: Request, service: Service, caller: Access) -> Turn:
    """Raises ApiError, and what the engine refuses."""
    tenant = service.resolve(body.model, caller)
    service.count(caller, tenant)
    check_number(body, service, 1)
    await service.has_tokenizer(tenant)
    prompt, ids = await asyncio.to_thread(_conversation, body, service, tenant)
    limit = body.answer_limit or service.max_model_len(tenant)
    jobs = jobs_of(body, service, tenant, [ids], limit, arrival(request.scope).at)
    calling = _calling(body, service)
    if calling and body.calls == "auto" and PARSERS[_parser_of(service)].special:
        jobs = [replace(j, params=replace(j.params, skip_special_tokens=False)) for j in jobs]
    thinking = _thinking(body, service, prompt)
    if thinking and not thinking[0].ended:
        jobs = [replace(j, params=j.params.structured_behind(END)) for j in jobs]
    return Turn(tenant, prompt, ids, jobs, calling, thinking)


def _thinking(body: ChatRequest, service: Service, prompt: str) -> list[Reasoning]:
    """What tells each answer's reasoning; none where the server was told no format."""
    name = service.settings.reasoning_parser
    if name is not None:
        return [Reasoning(name, prompt) for _ in range(body.num_answers)]
    if body.include_reasoning is False:
        raise ApiError(
            400,
            "include_reasoning: reasoning is not told apart from the answer; start the server with "
            "--reasoning-parser, or leave it out",
            param="include_reasoning",
        )
    return []


def _calling(body: ChatRequest, service: Service) -> list[Calling]:
    """What becomes of each answer's text where tools may be called; none where they may not.

    Raises ApiError.
    """
    if body.calls == "none":
        return []
    if body.calls == "auto":
        _parser_of(service)
    parallel, parser = body.parallel_tool_calls is not False, service.settings.tool_call_parser
    return [
        Calling(body.tools or (), body.calls, parallel, parser) for _ in range(body.num_answers)
    ]


def _parser_of(service: Service) -> str:
    """The format of calls. Raises ApiError."""
    if service.settings.tool_call_parser is None:
        raise ApiError(
            400,
            "tool_choice: auto needs a server that knows the format of calls; start it with "
            f"--tool-call-parser ({', '.join(PARSERS)}), or ask for required or none",
            param="tool_choice",
        )
    return service.settings.tool_call_parser


def _conversation(body: ChatRequest, service: Service, tenant: str) -> tuple[str, list[int]]:
    """The conversation as the tenant's template writes it, and its token ids. For a thread."""
    engine = service.require().engine
    text = written(engine, tenant, body)
    limit = prompt_limit(body, service, tenant, body.answer_limit or 1)
    return text, prompt_ids(
        engine,
        tenant,
        text,
        bool(body.add_special_tokens),
        limit,
        body.truncation_side or "left",
        "messages",
    )
