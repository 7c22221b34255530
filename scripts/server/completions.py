"""`/v1/completions`."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from common.errors import TenantUnavailableError
from common.serving.request import Generation, Output
from scripts.server.answer_shapes import (
    CompletionAnswer,
    CompletionChoice,
)
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
from scripts.server.conversation import echoed, prompt_ids
from scripts.server.dependencies import ERRORS, STREAMED, Caller, SharedService
from scripts.server.errors import ApiError
from scripts.server.front import arrival
from scripts.server.requests import Asked, CompletionRequest
from scripts.server.running import Run
from scripts.server.service import Service
from scripts.server.streams import event
from scripts.server.tokens import joined

router = APIRouter(prefix="/v1", responses=ERRORS)


DEFAULT_MAX_TOKENS = 16
"""Of completions, as OpenAI's and vLLM's; a chat answer may fill the context."""


def _require_text(body: Asked, service: Service, tenant: str) -> None:
    """Raises TenantUnavailableError if the request needs text that the tenant should have and has
    not."""
    why = service.require().engine.unavailable.get(tenant)
    if why is not None and body.stop:
        raise TenantUnavailableError(tenant, why)


@router.post(
    "/completions",
    response_model=CompletionAnswer,
    response_model_exclude_unset=True,
    responses=STREAMED,
)
async def complete(
    body: CompletionRequest, request: Request, service: SharedService, caller: Caller
) -> Response:
    """Continue a prompt as a tenant would."""
    tenant = service.resolve(body.model, caller)
    service.count(caller, tenant)
    check_number(body, service, len(body.prompts))
    has_text = await service.has_tokenizer(tenant)
    _require_text(body, service, tenant)
    limit = body.answer_limit or DEFAULT_MAX_TOKENS
    prompts, echoes = await asyncio.to_thread(_prompts, body, service, tenant, limit)
    jobs = jobs_of(body, service, tenant, prompts, limit, arrival(request.scope).at)
    number, created = request_number("cmpl", body, request), int(time.time())
    with_ids = body.return_token_ids or not has_text  # without a tokenizer the ids are all there is
    texts = AnswerTexts(body, service, jobs, echo=bool(body.echo))

    def choice(
        index: int, output: Output, generation: Generation | None, begins: bool
    ) -> CompletionChoice:
        if body.is_prompt_alone:
            output = Output((), "", prompt_logprobs=output.prompt_logprobs)
        text = (echoes[index // body.num_answers] if begins else "") + output.text
        logprobs = None
        if body.num_logprobs is not None:
            before = None
            if body.echo and begins:
                ids, found = jobs[index].prompt, output.prompt_logprobs
                before = texts[index].echo(ids, found, body.num_logprobs)
            logprobs = texts[index].completion(output.logprobs, generation is not None)
            logprobs = logprobs if before is None else joined(before, logprobs)
        out = CompletionChoice(
            index=index, text=text, logprobs=logprobs, finish_reason=None, stop_reason=None
        )
        if generation is not None:
            out.finish_reason, out.stop_reason = generation.finish_reason, generation.stop_reason
            if body.is_prompt_alone:
                out.finish_reason, out.stop_reason = "length", None
            if body.prompt_logprobs is not None:
                out.prompt_logprobs = texts.prompt(index, generation)
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
        out.usage, out.metrics = usage_of(run.generations, body.num_answers), run.metrics()
        if body.is_prompt_alone:
            out.usage.completion_tokens, out.usage.total_tokens = 0, out.usage.prompt_tokens
        return out

    return await respond(
        body,
        request,
        service,
        jobs,
        whole=lambda run: closed(
            run, [choice(i, whole_output(g), g, True) for i, g in enumerate(run.generations)]
        ),
        chunk=lambda i, output, begins: event(
            answer([choice(i, output, output.generation, begins)])
        ),
        last=lambda run: event(closed(run, [])),
    )


def _prompts(
    body: CompletionRequest, service: Service, tenant: str, answer_limit: int
) -> tuple[list[list[int]], list[str]]:
    """Token ids of each prompt, and the text that stands before its answers. For a thread: long
    texts take a while."""
    engine = service.require().engine
    limit = prompt_limit(body, service, tenant, answer_limit)
    side = body.truncation_side or "left"
    ids, echoes = [], []
    for prompt in body.prompts:
        found = prompt_ids(
            engine, tenant, prompt, body.add_special_tokens is not False, limit, side
        )
        ids.append(found)
        if not body.echo:
            echoes.append("")
        elif isinstance(prompt, str) and limit is None and body.logprobs is None:
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
