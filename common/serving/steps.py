"""Requests advance step by step, chosen by the scheduler and computed by the backend."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from common.errors import DeadlineError, EngineError, MoetelError
from common.serving.backend import Backend, Part, Step
from common.serving.request import Output, Request
from common.serving.sampling import TokenLogprob, log_probabilities, sample
from common.serving.scheduler import NoRoomError, Scheduler
from common.serving.scheduler_options import SchedulerOptions
from common.serving.statistics import Statistics


class Steps:
    """All requests of an engine, and what became of them."""

    def __init__(self, backend: Backend, options: SchedulerOptions):
        self._backend = backend
        self.scheduler = Scheduler(backend, options)
        self.statistics = Statistics()

    def run_alone(self, requests: Sequence[Request]) -> None:
        """Run requests to their end.

        Nobody waits for one of them alone, so throughput is what counts.
        """
        try:
            for request in requests:
                self.scheduler.add(request, bounded=False)
            while any(not r.done for r in requests):
                self.step(alone=True)
                for request in requests:
                    if request.error is not None:
                        raise request.error
        finally:
            for request in requests:
                self.cancel(request)

    def cancel(self, request: Request) -> None:
        """Forget a request and free its caches; nothing happens to one that is done."""
        if not request.done:
            request.abort()
            self.statistics.count_end(request, "abort")
        self.scheduler.remove(request)

    def step(self, *, alone: bool = False) -> bool:
        """Advance requests by one step; their `on_output` is called. Returns whether there was
        anything to do.

        A request that fails has `error` set and is forgotten. alone: prompts are read in as large
        pieces as a step takes, for callers that wait for all answers together.
        """
        for request in self.scheduler.expired(time.perf_counter()):
            self._expire(request)
        try:
            parts = self.scheduler.next(time.perf_counter(), alone=alone)
        except NoRoomError as error:
            self._fail(error.request, error)
            return True
        if not parts:
            return False
        parts = [(r, self._with_choice(r, part)) for r, part in parts]
        try:
            step = self._backend.step([part for _, part in parts])
        except Exception as error:
            for request, _ in parts:
                self._fail(
                    request,
                    EngineError(f"a step of the engine failed ({type(error).__name__}: {error})"),
                )
            raise
        now = time.perf_counter()
        self.scheduler.done(parts, step, now)
        for number, ((request, part), hits, misses) in enumerate(
            zip(parts, step.hits.tolist(), step.misses.tolist(), strict=True)
        ):
            counts = self.statistics.of(request.tenant)
            counts["hits"] += hits
            counts["misses"] += misses
            counts["read_tokens"] += part.read
            request.hits += hits
            request.misses += misses
            if request.first_at is None:
                request.reconfiguration_s += step.reconfiguration_s.get(request.tenant, 0.0)
            if (found := step.prompt_logprobs.get(number)) is not None:
                read = len(request.prompt) + len(request.token_ids) - request.unread
                request.take_prompt(found, read - part.read)
            if request.unread == 0:
                self._take(request, *self._chosen(request, part, step, number), now)
        self.statistics.count_step(step, self.scheduler.flooding)
        return True

    def _with_choice(self, request: Request, part: Part) -> Part:
        """A part that says how its token is chosen, where more than the winner has to be known."""
        if not part.want_logits:
            return part
        return replace(part, want_logits=not self._backend.chooses, choice=request.choice())

    def _chosen(
        self, request: Request, part: Part, step: Step, number: int
    ) -> tuple[int, TokenLogprob | None]:
        """The next token of a part."""
        choice, logits = part.choice, step.logits[number]
        if choice is None:
            forced = request.forced
            return int(step.token_ids[number]) if forced is None else forced, None
        if logits is None:
            return int(step.token_ids[number]), step.logprobs.get(number)
        token_id = sample(logits, choice)
        top = choice.params.logprobs
        return token_id, None if top is None else log_probabilities(logits, token_id, top)

    def _take(
        self, request: Request, token_id: int, logprob: TokenLogprob | None, now: float
    ) -> None:
        """Give a request its next token."""
        counts = self.statistics.of(request.tenant)
        if request.first_at is None:
            counts["prompt_tokens"] += len(request.prompt)
            if self._backend.prefix_block is not None and request.shares_prefix:
                counts["prefix_cache_queries"] += len(request.prompt)
                counts["prefix_cache_hits"] += request.num_cached_tokens
        try:
            output = request.take(token_id, logprob, now)
        except MoetelError as error:
            self._fail(request, error)
            return
        counts["generation_tokens"] += 1
        if request.done:
            self.scheduler.remove(request)
            self.statistics.count_end(request, str(request.finish_reason))
        if request.on_output is not None:
            request.on_output(output)

    def _expire(self, request: Request) -> None:
        output = request.abort()
        done = len(request.token_ids)
        self._fail(
            request,
            DeadlineError(
                f"the deadline passed after {done} tokens of the answer; give it longer, or ask "
                "for fewer tokens",
                output.generation,
            ),
        )

    def _fail(self, request: Request, error: MoetelError) -> None:
        request.error = error
        if not request.done:
            request.abort()
        self.scheduler.remove(request)
        self.statistics.count_end(
            request, "deadline" if isinstance(error, DeadlineError) else "error"
        )
        if request.on_output is not None:
            request.on_output(Output((), "", (), request.generation()))

    def fail_all(self, error: MoetelError) -> None:
        """End every request with an error."""
        for request in self.scheduler.requests():
            self._fail(request, error)
