"""What completions and chat have in common: limits, jobs, streams and usage."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from common.serving.request import Generation, Output
from scripts.server.answer_shapes import PromptTokensDetails, ScoredPrompt, Usage
from scripts.server.errors import ApiError
from scripts.server.front import arrival
from scripts.server.requests import Asked
from scripts.server.running import Job, Run
from scripts.server.service import Service
from scripts.server.streams import EventStream
from scripts.server.tokens import TokenTexts


class JSONModel(Response):
    """A Pydantic answer, without the fields that were not set."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        found: BaseModel = content
        return found.model_dump_json(exclude_unset=True).encode()


def check_number(body: Asked, service: Service, num_prompts: int) -> None:
    """Raises ApiError for more answers than one request may ask for."""
    asked, most = num_prompts * body.num_answers, service.settings.max_sequences
    if asked > most:
        raise ApiError(
            400,
            f"n: asks for {asked} answers (prompts times n), "
            f"this server gives at most {most} in one request; send several",
            param="n",
        )


def prompt_limit(body: Asked, service: Service, tenant: str, answer_limit: int) -> int | None:
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


def jobs_of(
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
        Job(tenant, prompt, p, body.priority or 0, deadline_s, body.cache_salt or "")
        for prompt in prompts
        for p in params
    ]


class AnswerTexts:
    """Names of the tokens of each answer, made when its first token comes: its prompt is then known
    to be sound."""

    def __init__(self, body: Asked, service: Service, jobs: Sequence[Job], echo: bool = False):
        """echo: the prompt's tokens are named first."""
        self._body, self._engine, self._jobs = body, service.require().engine, jobs
        self._echo = echo
        self._made: dict[int, TokenTexts] = {}

    def __getitem__(self, index: int) -> TokenTexts:
        if index not in self._made:
            job = self._jobs[index]
            self._made[index] = self._texts(job, () if self._echo else job.prompt)
        return self._made[index]

    def _texts(self, job: Job, before: Sequence[int]) -> TokenTexts:
        body = self._body
        as_ids = bool(body.return_tokens_as_token_ids)
        return TokenTexts(self._engine, job.tenant, before, body.skip_special, as_ids)

    def prompt(self, index: int, generation: Generation) -> ScoredPrompt:
        """What the request's `prompt_logprobs` asks for."""
        top = self._body.prompt_logprobs or 0
        texts = self._texts(self._jobs[index], ())
        return texts.prompt(generation.prompt_token_ids, generation.prompt_logprobs, top)


def usage_of(generations: Sequence[Generation], num_answers: int) -> Usage:
    """Each prompt counts once, however many answers it has: all but one find in the cache what
    that one computes."""
    each = [generations[i : i + num_answers] for i in range(0, len(generations), num_answers)]
    prompt = sum(len(answers[0].prompt_token_ids) for answers in each)
    cached = sum(min(g.num_cached_tokens for g in answers) for answers in each)
    completion = sum(len(g.token_ids) for g in generations)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


async def respond(
    body: Asked,
    request: Request,
    service: Service,
    jobs: Sequence[Job],
    whole: Callable[[Run], BaseModel],
    chunk: Callable[[int, Output, bool], bytes],
    last: Callable[[Run], bytes],
) -> Response:
    """Run the jobs; answer with `whole` of them at the end, or with a `chunk` for each output and
    perhaps a `last`, which are events of a stream.

    The status of a stream is sent with its first output, so that a request that is refused has its
    own status.
    """
    async with AsyncExitStack() as stack:
        run = await stack.enter_async_context(
            Run(service, jobs, arrival(request.scope).at, request.receive, bool(body.stream))
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
                yield chunk(index, output, index not in seen)
                seen.add(index)
                try:
                    index, output = await anext(run)
                except StopAsyncIteration:
                    break
            if body.want_usage:
                yield last(run)

        return EventStream(events(), stack.pop_all().aclose)
    raise AssertionError("unreachable")


def request_number(kind: str, body: Asked, request: Request) -> str:
    own = body.request_id or arrival(request.scope).request_id.removeprefix("req-")
    return f"{kind}-{own or uuid.uuid4().hex}"


def whole_output(generation: Generation) -> Output:
    """An answer as if it had come at once."""
    return Output(
        generation.token_ids,
        generation.text or "",
        generation.logprobs,
        generation,
        generation.prompt_logprobs,
    )
