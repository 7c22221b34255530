"""`/v1/chat/completions`."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from common.serving.request import Output
from scripts.server.answer_shapes import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatMessage,
    Delta,
)
from scripts.server.answers import (
    AnswerTexts,
    request_number,
    respond,
    usage_of,
    whole_output,
)
from scripts.server.chat_requests import ChatRequest
from scripts.server.chat_turn import next_turn
from scripts.server.dependencies import ERRORS, STREAMED, Caller, SharedService
from scripts.server.running import Run
from scripts.server.streams import event
from scripts.server.tools.answer import ToolCall

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
    turn = await next_turn(body, request, service, caller)
    tenant, jobs = turn.tenant, turn.jobs
    number, created = request_number("chatcmpl", body, request), int(time.time())
    texts = AnswerTexts(body, service, jobs)

    def finish(out: ChatChoice | ChatChunkChoice, index: int, output: Output) -> None:
        """What choices of whole answers and of chunks have in common."""
        generation = output.generation
        out.logprobs = None
        if body.num_logprobs is not None:
            out.logprobs = texts[index].chat(output.logprobs, generation is not None)
        out.finish_reason = out.stop_reason = None
        if generation is not None:
            out.finish_reason = turn.finish_reason(index, generation.finish_reason)
            out.stop_reason = generation.stop_reason
        if body.return_token_ids:
            out.token_ids = list(output.token_ids)

    def whole(run: Run) -> ChatAnswer:
        choices = []
        for i, g in enumerate(run.generations):
            reasoning, content, calls = turn.split(i, g.text or "", over=True)
            nothing = None if calls or reasoning else ""
            message = ChatMessage(role="assistant", content=content or nothing, refusal=None)
            if reasoning and body.include_reasoning is not False:
                message.reasoning = reasoning
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
            out.prompt_token_ids = turn.ids
        if body.return_prompt_text:
            out.prompt_text = turn.prompt

    def piece(choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=number,
            object="chat.completion.chunk",
            created=created,
            model=tenant,
            choices=choices,
        )

    def chunk(index: int, output: Output, begins: bool) -> bytes:
        # The role comes with the first text, so that chunks are as many as steps, and times between
        # them are true.
        over = output.generation is not None
        reasoning, content, calls = turn.split(index, output.text, over)
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
        return event(out)

    def last(run: Run) -> bytes:
        out = piece([])
        out.usage, out.metrics = usage_of(run.generations, body.num_answers), run.metrics()
        return event(out)

    return await respond(body, request, service, jobs, whole, chunk, last)


def _whole(call: ToolCall) -> ToolCall:
    """As whole answers have it: without a place."""
    return ToolCall(id=call.id, type=call.type, function=call.function)
