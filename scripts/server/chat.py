"""`/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from common.serving.request import Output
from scripts.server.answers import (
    AnswerTexts,
    check_number,
    jobs_of,
    prompt_limit,
    request_number,
    respond,
    usage_of,
    whole_output,
)
from scripts.server.chat_requests import ChatRequest
from scripts.server.conversation import prompt_ids, written
from scripts.server.dependencies import ERRORS, STREAMED, Caller, SharedService
from scripts.server.errors import ApiError
from scripts.server.front import arrival
from scripts.server.reasoning import END, Reasoning
from scripts.server.running import Run
from scripts.server.schema import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatMessage,
    Delta,
)
from scripts.server.service import Service
from scripts.server.tools import PARSERS
from scripts.server.tools.answer import Calling, ToolCall

router = APIRouter(prefix="/v1", responses=ERRORS)


@router.post(
    "/chat/completions",
    response_model=ChatAnswer,
    response_model_exclude_unset=True,
    responses=STREAMED,
)
async def chat(
    body: ChatRequest, request: Request, service: SharedService, caller: Caller
) -> Response:
    """Answer a conversation, which is written out by the tenant's own chat template."""
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
    number, created = request_number("chatcmpl", body, request), int(time.time())
    texts = AnswerTexts(body, service, jobs)

    def finish(out: ChatChoice | ChatChunkChoice, index: int, output: Output) -> None:
        """What choices of whole answers and of chunks have in common."""
        generation = output.generation
        out.logprobs = None
        if body.num_logprobs is not None:
            out.logprobs = texts[index].chat(output.logprobs, generation is not None)
        out.finish_reason = None if generation is None else generation.finish_reason
        if out.finish_reason == "stop" and calling:
            out.finish_reason = calling[index].finish_reason or "stop"
        out.stop_reason = None if generation is None else generation.stop_reason
        if body.return_token_ids:
            out.token_ids = list(output.token_ids)

    def split(index: int, text: str, over: bool) -> tuple[str, str]:
        """New text of an answer, as reasoning and what follows it."""
        return thinking[index].push(text, over) if thinking else ("", text)

    def whole(run: Run) -> ChatAnswer:
        choices = []
        for i, g in enumerate(run.generations):
            reasoning, text = split(i, g.text or "", over=True)
            message = ChatMessage(role="assistant", content=text, refusal=None)
            if reasoning:
                message.content = text or None
                if body.include_reasoning is not False:
                    message.reasoning = reasoning
            if calling:
                content, calls = calling[i].push(text, over=True)
                message.content = content or (None if calls or reasoning else "")
                if calls:
                    message.tool_calls = [_whole(call) for call in calls]
            choices.append(ChatChoice(index=i, message=message))
            finish(choices[-1], i, whole_output(g))
        out = ChatAnswer(
            id=number, object="chat.completion", created=created, model=tenant, choices=choices
        )
        out.usage, out.metrics = usage_of(run.generations, body.num_answers), run.metrics()
        if body.prompt_logprobs is not None:
            out.prompt_logprobs = texts.prompt(0, run.generations[0])
        asked_of_prompt(out)
        return out

    def asked_of_prompt(out: ChatAnswer | ChatChunk) -> None:
        if body.return_token_ids:
            out.prompt_token_ids = ids
        if body.return_prompt_text:
            out.prompt_text = prompt

    def piece(choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=number,
            object="chat.completion.chunk",
            created=created,
            model=tenant,
            choices=choices,
        )

    def chunk(index: int, output: Output, begins: bool) -> ChatChunk:
        # The role comes with the first text, so that chunks are as many as steps, and times between
        # them are true.
        over = output.generation is not None
        reasoning, content = split(index, output.text, over)
        calls: list[ToolCall] = []
        if calling:
            content, calls = calling[index].push(content, over)
        delta = Delta(role="assistant", content=content) if begins else Delta(content=content)
        if reasoning:
            delta.content = content or None
            if body.include_reasoning is not False:
                delta.reasoning = reasoning
        if calls:
            delta.tool_calls = calls
        choice = ChatChunkChoice(index=index, delta=delta)
        finish(choice, index, output)
        out = piece([choice])
        if begins:
            asked_of_prompt(out)
        return out

    def last(run: Run) -> ChatChunk:
        out = piece([])
        out.usage, out.metrics = usage_of(run.generations, body.num_answers), run.metrics()
        return out

    return await respond(body, request, service, jobs, whole, chunk, last)


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


def _whole(call: ToolCall) -> ToolCall:
    """As whole answers have it: without a place."""
    return ToolCall(id=call.id, type=call.type, function=call.function)


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
