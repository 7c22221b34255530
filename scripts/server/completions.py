"""`/v1/models`, `/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from common.errors import MoetelError, RequestError
from common.request import Generation, Output
from scripts.server.dependencies import ERRORS, Caller, SharedService
from scripts.server.errors import ApiError
from scripts.server.front import arrival
from scripts.server.running import Job, Run
from scripts.server.schema import (
    Asked,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatMessage,
    ChatRequest,
    CompletionAnswer,
    CompletionChoice,
    CompletionRequest,
    Delta,
    Model,
    ModelList,
    Usage,
)
from scripts.server.service import Service
from scripts.server.streams import EventStream, event
from scripts.server.tokens import TokenTexts

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1", responses=ERRORS)

DEFAULT_MAX_TOKENS = 16
"""Of completions, as OpenAI's and vLLM's; a chat answer may fill the context."""


class JSONModel(Response):
    """A Pydantic answer, without the fields that were not set."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        found: BaseModel = content
        return found.model_dump_json(exclude_unset=True).encode()


# Models.


def _model(service: Service, tenant: str) -> Model:
    # The root is the name, not the path that the checkpoint came from, which is nobody's business.
    return Model(
        id=tenant, created=service.started_at, root=tenant, parent=None, max_model_len=service.max_model_len(tenant)
    )


@router.get("/models")
async def list_models(service: SharedService, caller: Caller) -> ModelList:
    """The tenants that this key may use."""
    service.require()
    return ModelList(data=[_model(service, name) for name in service.visible(caller)])


@router.get("/models/{model}")
async def get_model(model: str, service: SharedService, caller: Caller) -> Model:
    """One of them."""
    return _model(service, service.resolve(model, caller))


# What both kinds of answer need.


async def chat_ids(service: Service, tenant: str, messages: Sequence[dict[str, Any]]) -> list[int]:
    """The conversation in the tenant's template. Raises RequestError."""
    engine = service.require().engine
    try:
        return await asyncio.to_thread(engine.apply_chat_template, tenant, messages)
    except MoetelError:
        raise
    except Exception as error:  # templates are programs of the checkpoint's and raise whatever they like
        log.info("chat template of %s: %s: %s", tenant, type(error).__name__, error)
        raise RequestError(
            f"messages: the chat template of tenant {tenant!r} does not take this conversation ({error}); "
            "mend its roles and their order"
        ) from error


def _jobs(
    body: Asked, service: Service, tenant: str, prompts: Sequence[str | list[int]], limit: int, arrived_at: float
) -> list[Job]:
    most = service.settings.max_sequences
    if len(prompts) * body.num_answers > most:
        raise ApiError(
            400,
            f"n: asks for {len(prompts) * body.num_answers} answers (prompts times n), "
            f"this server gives at most {most} in one request; send several",
            param="n",
        )
    deadline_s = None
    if body.deadline_ms is not None:
        deadline_s = max(1e-3, body.deadline_ms / 1e3 - (time.perf_counter() - arrived_at))
    params = [body.params(limit, answer) for answer in range(body.num_answers)]
    return [Job(tenant, prompt, p, body.priority or 0, deadline_s) for prompt in prompts for p in params]


def _usage(generations: Sequence[Generation], num_answers: int) -> Usage:
    """Each prompt counts once, however many answers it has."""
    prompt = sum(len(g.prompt_token_ids) for g in generations[::num_answers])
    completion = sum(len(g.token_ids) for g in generations)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


async def _respond(
    body: Asked,
    request: Request,
    service: Service,
    jobs: Sequence[Job],
    whole: Callable[[Run], BaseModel],
    chunk: Callable[[int, Output, bool], BaseModel],
    last: Callable[[Run], BaseModel],
) -> Response:
    """Run the jobs; answer with `whole` of them at the end, or with a `chunk` for each output and perhaps a `last`.

    The status of a stream is sent with its first output, so that a request that is refused has its own status.
    """
    async with AsyncExitStack() as stack:
        run = await stack.enter_async_context(Run(service, jobs, arrival(request.scope).at, request.receive))
        if not body.stream:
            async for _ in run:
                pass
            return JSONModel(whole(run))
        first = await anext(run)

        async def events() -> AsyncGenerator[bytes]:
            seen: set[int] = set()
            index, output = first
            while True:
                yield event(chunk(index, output, index not in seen))
                seen.add(index)
                try:
                    index, output = await anext(run)
                except StopAsyncIteration:
                    break
            if body.want_usage:
                yield event(last(run))

        return EventStream(events(), stack.pop_all().aclose)
    raise AssertionError("unreachable")


def _number(kind: str, request: Request) -> str:
    return f"{kind}-{arrival(request.scope).request_id.removeprefix('req-') or uuid.uuid4().hex}"


# Completions.


@router.post(
    "/completions",
    response_model=CompletionAnswer,
    response_model_exclude_unset=True,
    responses={200: {"content": {"text/event-stream": {}}, "description": "An answer, or a stream of such chunks."}},
)
async def complete(body: CompletionRequest, request: Request, service: SharedService, caller: Caller) -> Response:
    """Continue a prompt as a tenant would."""
    tenant = service.resolve(body.model, caller)
    service.count(caller, tenant)
    engine = service.require().engine
    prompts = body.prompts
    jobs = _jobs(body, service, tenant, prompts, body.answer_limit or DEFAULT_MAX_TOKENS, arrival(request.scope).at)
    has_text = await service.has_tokenizer(tenant)
    echoes = [await _text_of(service, tenant, p) if body.echo else "" for p in prompts]
    number, created = _number("cmpl", request), int(time.time())
    with_ids = body.return_token_ids or not has_text  # without a tokenizer the ids are all there is
    texts = [TokenTexts(engine, tenant) for _ in jobs]

    def choice(index: int, output: Output, generation: Generation | None, begins: bool) -> CompletionChoice:
        text = (echoes[index // body.num_answers] if begins else "") + output.text
        logprobs = texts[index].completion(output.logprobs) if body.num_logprobs is not None else None
        out = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=None, stop_reason=None)
        if generation is not None:
            out.finish_reason, out.stop_reason = generation.finish_reason, generation.stop_reason
        if with_ids:
            out.token_ids = list(output.token_ids)
            if generation is not None:
                out.prompt_token_ids = list(generation.prompt_token_ids)
        return out

    def answer(choices: list[CompletionChoice]) -> CompletionAnswer:
        return CompletionAnswer(id=number, object="text_completion", created=created, model=tenant, choices=choices)

    def closed(run: Run, choices: list[CompletionChoice]) -> CompletionAnswer:
        out = answer(choices)
        out.usage, out.metrics = _usage(run.generations, body.num_answers), run.metrics()
        return out

    return await _respond(
        body,
        request,
        service,
        jobs,
        whole=lambda run: closed(run, [choice(i, _whole(g), g, True) for i, g in enumerate(run.generations)]),
        chunk=lambda i, output, begins: answer([choice(i, output, output.generation, begins)]),
        last=lambda run: closed(run, []),
    )


async def _text_of(service: Service, tenant: str, prompt: str | list[int]) -> str:
    """A prompt's text, for echo."""
    if isinstance(prompt, str):
        return prompt
    engine = service.require().engine
    if not engine.has_tokenizer(tenant):
        raise ApiError(
            400, f"echo: tenant {tenant!r} has no tokenizer, so its prompts have no text; leave it out", param="echo"
        )
    return await asyncio.to_thread(engine.detokenize, tenant, prompt)


def _whole(generation: Generation) -> Output:
    """An answer as if it had come at once."""
    return Output(generation.token_ids, generation.text or "", generation.logprobs, generation)


# Chat.


@router.post(
    "/chat/completions",
    response_model=ChatAnswer,
    response_model_exclude_unset=True,
    responses={200: {"content": {"text/event-stream": {}}, "description": "An answer, or a stream of chunks."}},
)
async def chat(body: ChatRequest, request: Request, service: SharedService, caller: Caller) -> Response:
    """Answer a conversation, which is written out by the tenant's own chat template."""
    tenant = service.resolve(body.model, caller)
    service.count(caller, tenant)
    engine = service.require().engine
    await service.has_tokenizer(tenant)
    ids = await chat_ids(service, tenant, [m.for_template() for m in body.messages])
    limit = body.answer_limit or service.max_model_len(tenant)
    jobs = _jobs(body, service, tenant, [ids], limit, arrival(request.scope).at)
    number, created = _number("chatcmpl", request), int(time.time())
    texts = [TokenTexts(engine, tenant) for _ in jobs]

    def finish(out: ChatChoice | ChatChunkChoice, index: int, output: Output) -> None:
        """What choices of whole answers and of chunks have in common."""
        out.logprobs = texts[index].chat(output.logprobs) if body.num_logprobs is not None else None
        generation = output.generation
        out.finish_reason = None if generation is None else generation.finish_reason
        out.stop_reason = None if generation is None else generation.stop_reason
        if body.return_token_ids:
            out.token_ids = list(output.token_ids)

    def whole(run: Run) -> ChatAnswer:
        choices = []
        for i, g in enumerate(run.generations):
            message = ChatMessage(role="assistant", content=g.text or "", refusal=None)
            choices.append(ChatChoice(index=i, message=message))
            finish(choices[-1], i, _whole(g))
        out = ChatAnswer(id=number, object="chat.completion", created=created, model=tenant, choices=choices)
        out.usage, out.metrics = _usage(run.generations, body.num_answers), run.metrics()
        if body.return_token_ids:
            out.prompt_token_ids = ids
        return out

    def piece(choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(id=number, object="chat.completion.chunk", created=created, model=tenant, choices=choices)

    def chunk(index: int, output: Output, begins: bool) -> ChatChunk:
        # The role comes with the first text, so that chunks are as many as steps, and times between them are true.
        delta = Delta(role="assistant", content=output.text) if begins else Delta(content=output.text)
        choice = ChatChunkChoice(index=index, delta=delta)
        finish(choice, index, output)
        out = piece([choice])
        if body.return_token_ids and begins:
            out.prompt_token_ids = ids
        return out

    def last(run: Run) -> ChatChunk:
        out = piece([])
        out.usage, out.metrics = _usage(run.generations, body.num_answers), run.metrics()
        return out

    return await _respond(body, request, service, jobs, whole, chunk, last)
