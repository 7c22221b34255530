"""`/v1/models`, `/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from common.errors import TenantUnavailableError
from common.serving.request import Generation, Output
from scripts.server.conversation import echoed, prompt_ids, written
from scripts.server.dependencies import ERRORS, Caller, SharedService
from scripts.server.errors import ApiError
from scripts.server.front import arrival
from scripts.server.requests import Asked, ChatRequest, CompletionRequest
from scripts.server.running import Job, Run
from scripts.server.schema import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatMessage,
    CompletionAnswer,
    CompletionChoice,
    Delta,
    Model,
    ModelList,
    Usage,
)
from scripts.server.service import Service
from scripts.server.streams import EventStream, event
from scripts.server.tokens import TokenTexts

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
        id=tenant,
        created=service.started_at,
        root=tenant,
        parent=None,
        max_model_len=service.max_model_len(tenant),
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


def _check_number(body: Asked, service: Service, num_prompts: int) -> None:
    """Raises ApiError for more answers than one request may ask for."""
    asked, most = num_prompts * body.num_answers, service.settings.max_sequences
    if asked > most:
        raise ApiError(
            400,
            f"n: asks for {asked} answers (prompts times n), "
            f"this server gives at most {most} in one request; send several",
            param="n",
        )


def _prompt_limit(body: Asked, service: Service, tenant: str, answer_limit: int) -> int | None:
    """Tokens that prompts are cut to, None: they are not."""
    asked = body.truncate_prompt_tokens
    if asked is None:
        return None
    context = service.max_model_len(tenant)
    if asked > context:
        raise ApiError(
            400,
            f"truncate_prompt_tokens: is {asked}, above the context of {context} tokens",
            param="truncate_prompt_tokens",
        )
    if asked >= 0:
        return asked
    if service.require().engine.store.config(tenant).is_encoder_decoder:
        return context
    return context - (answer_limit if answer_limit < context else 1)


def _require_text(body: Asked, service: Service, tenant: str) -> None:
    """Raises TenantUnavailableError if the request needs text that the tenant should have and has
    not."""
    why = service.require().engine.unavailable.get(tenant)
    if why is not None and body.stop:
        raise TenantUnavailableError(tenant, why)


def _jobs(
    body: Asked,
    service: Service,
    tenant: str,
    prompts: Sequence[list[int]],
    limit: int,
    arrived_at: float,
) -> list[Job]:
    deadline_s = None
    if body.deadline_ms is not None:
        deadline_s = max(1e-3, body.deadline_ms / 1e3 - (time.perf_counter() - arrived_at))
    defaults = service.sampling_defaults(tenant)
    params = [body.params(limit, answer, defaults) for answer in range(body.num_answers)]
    return [
        Job(tenant, prompt, p, body.priority or 0, deadline_s) for prompt in prompts for p in params
    ]


class _Texts:
    """Names of the tokens of each answer, made when its first token comes: its prompt is then known
    to be sound."""

    def __init__(self, body: Asked, service: Service, jobs: Sequence[Job]):
        self._body, self._engine, self._jobs = body, service.require().engine, jobs
        self._made: dict[int, TokenTexts] = {}

    def __getitem__(self, index: int) -> TokenTexts:
        if index not in self._made:
            job, body = self._jobs[index], self._body
            self._made[index] = TokenTexts(
                self._engine,
                job.tenant,
                job.prompt,
                body.skip_special,
                bool(body.return_tokens_as_token_ids),
            )
        return self._made[index]


def _usage(generations: Sequence[Generation], num_answers: int) -> Usage:
    """Each prompt counts once, however many answers it has."""
    prompt = sum(len(g.prompt_token_ids) for g in generations[::num_answers])
    completion = sum(len(g.token_ids) for g in generations)
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )


async def _respond(
    body: Asked,
    request: Request,
    service: Service,
    jobs: Sequence[Job],
    whole: Callable[[Run], BaseModel],
    chunk: Callable[[int, Output, bool], BaseModel],
    last: Callable[[Run], BaseModel],
) -> Response:
    """Run the jobs; answer with `whole` of them at the end, or with a `chunk` for each output and
    perhaps a `last`.

    The status of a stream is sent with its first output, so that a request that is refused has its
    own status.
    """
    async with AsyncExitStack() as stack:
        run = await stack.enter_async_context(
            Run(service, jobs, arrival(request.scope).at, request.receive)
        )
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


def _number(kind: str, body: Asked, request: Request) -> str:
    own = body.request_id or arrival(request.scope).request_id.removeprefix("req-")
    return f"{kind}-{own or uuid.uuid4().hex}"


# Completions.


@router.post(
    "/completions",
    response_model=CompletionAnswer,
    response_model_exclude_unset=True,
    responses={
        200: {
            "content": {"text/event-stream": {}},
            "description": "An answer, or a stream of such chunks.",
        }
    },
)
async def complete(
    body: CompletionRequest, request: Request, service: SharedService, caller: Caller
) -> Response:
    """Continue a prompt as a tenant would."""
    tenant = service.resolve(body.model, caller)
    service.count(caller, tenant)
    _check_number(body, service, len(body.prompts))
    has_text = await service.has_tokenizer(tenant)
    _require_text(body, service, tenant)
    limit = body.answer_limit or DEFAULT_MAX_TOKENS
    prompts, echoes = await asyncio.to_thread(_prompts, body, service, tenant, limit)
    jobs = _jobs(body, service, tenant, prompts, limit, arrival(request.scope).at)
    number, created = _number("cmpl", body, request), int(time.time())
    with_ids = body.return_token_ids or not has_text  # without a tokenizer the ids are all there is
    texts = _Texts(body, service, jobs)

    def choice(
        index: int, output: Output, generation: Generation | None, begins: bool
    ) -> CompletionChoice:
        text = (echoes[index // body.num_answers] if begins else "") + output.text
        logprobs = None
        if body.num_logprobs is not None:
            logprobs = texts[index].completion(output.logprobs, generation is not None)
        out = CompletionChoice(
            index=index, text=text, logprobs=logprobs, finish_reason=None, stop_reason=None
        )
        if generation is not None:
            out.finish_reason, out.stop_reason = generation.finish_reason, generation.stop_reason
        if with_ids:
            out.token_ids = list(output.token_ids)
            if generation is not None:
                out.prompt_token_ids = list(generation.prompt_token_ids)
        return out

    def answer(choices: list[CompletionChoice]) -> CompletionAnswer:
        return CompletionAnswer(
            id=number, object="text_completion", created=created, model=tenant, choices=choices
        )

    def closed(run: Run, choices: list[CompletionChoice]) -> CompletionAnswer:
        out = answer(choices)
        out.usage, out.metrics = _usage(run.generations, body.num_answers), run.metrics()
        return out

    return await _respond(
        body,
        request,
        service,
        jobs,
        whole=lambda run: closed(
            run, [choice(i, _whole(g), g, True) for i, g in enumerate(run.generations)]
        ),
        chunk=lambda i, output, begins: answer([choice(i, output, output.generation, begins)]),
        last=lambda run: closed(run, []),
    )


def _prompts(
    body: CompletionRequest, service: Service, tenant: str, answer_limit: int
) -> tuple[list[list[int]], list[str]]:
    """Token ids of each prompt, and the text that stands before its answers. For a thread: long
    texts take a while."""
    engine = service.require().engine
    limit = _prompt_limit(body, service, tenant, answer_limit)
    side = body.truncation_side or "left"
    ids, echoes = [], []
    for prompt in body.prompts:
        found = prompt_ids(
            engine, tenant, prompt, body.add_special_tokens is not False, limit, side
        )
        ids.append(found)
        if not body.echo:
            echoes.append("")
        elif isinstance(prompt, str) and limit is None:
            echoes.append(prompt)
        elif engine.text(tenant).has_tokenizer or tenant in engine.unavailable:
            echoes.append(echoed(engine, tenant, found, body.skip_special))
        else:
            raise ApiError(
                400,
                f"echo: tenant {tenant!r} has no tokenizer, so its prompts have no text; leave it "
                "out",
                param="echo",
            )
    return ids, echoes


def _whole(generation: Generation) -> Output:
    """An answer as if it had come at once."""
    return Output(generation.token_ids, generation.text or "", generation.logprobs, generation)


# Chat.


@router.post(
    "/chat/completions",
    response_model=ChatAnswer,
    response_model_exclude_unset=True,
    responses={
        200: {
            "content": {"text/event-stream": {}},
            "description": "An answer, or a stream of chunks.",
        }
    },
)
async def chat(
    body: ChatRequest, request: Request, service: SharedService, caller: Caller
) -> Response:
    """Answer a conversation, which is written out by the tenant's own chat template."""
    tenant = service.resolve(body.model, caller)
    service.count(caller, tenant)
    _check_number(body, service, 1)
    await service.has_tokenizer(tenant)
    prompt, ids = await asyncio.to_thread(_conversation, body, service, tenant)
    limit = body.answer_limit or service.max_model_len(tenant)
    jobs = _jobs(body, service, tenant, [ids], limit, arrival(request.scope).at)
    number, created = _number("chatcmpl", body, request), int(time.time())
    texts = _Texts(body, service, jobs)

    def finish(out: ChatChoice | ChatChunkChoice, index: int, output: Output) -> None:
        """What choices of whole answers and of chunks have in common."""
        generation = output.generation
        out.logprobs = None
        if body.num_logprobs is not None:
            out.logprobs = texts[index].chat(output.logprobs, generation is not None)
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
        out = ChatAnswer(
            id=number, object="chat.completion", created=created, model=tenant, choices=choices
        )
        out.usage, out.metrics = _usage(run.generations, body.num_answers), run.metrics()
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
        delta = (
            Delta(role="assistant", content=output.text) if begins else Delta(content=output.text)
        )
        choice = ChatChunkChoice(index=index, delta=delta)
        finish(choice, index, output)
        out = piece([choice])
        if begins:
            asked_of_prompt(out)
        return out

    def last(run: Run) -> ChatChunk:
        out = piece([])
        out.usage, out.metrics = _usage(run.generations, body.num_answers), run.metrics()
        return out

    return await _respond(body, request, service, jobs, whole, chunk, last)


def _conversation(body: ChatRequest, service: Service, tenant: str) -> tuple[str, list[int]]:
    """The conversation as the tenant's template writes it, and its token ids. For a thread."""
    engine = service.require().engine
    text = written(engine, tenant, body)
    limit = _prompt_limit(body, service, tenant, body.answer_limit or 1)
    return text, prompt_ids(
        engine,
        tenant,
        text,
        bool(body.add_special_tokens),
        limit,
        body.truncation_side or "left",
        "messages",
    )
