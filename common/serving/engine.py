"""The one Python interface to every engine.

An engine supplies a `Backend`: logits for sequences of tokens. Everything that a user sees
(checking of requests, sampling, stopping, text, results, statistics) is here and in the modules
that this one joins, once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from common.errors import (
    EngineError,
    MoetelError,
    RequestError,
    UnknownTenantError,
)
from common.sampling_params import SamplingParams
from common.serving.backend import Backend, Observer
from common.serving.checks import Prompt, check_request
from common.serving.request import Generation, Output, Request
from common.serving.scheduler_options import SchedulerOptions
from common.serving.scoring import logits_of
from common.serving.statistics import running
from common.serving.steps import Steps
from common.serving.store_texts import StoreTexts
from common.serving.warm_up import warm_up
from common.store import Store
from common.units import is_whole

GREEDY = SamplingParams()


class Engine(StoreTexts):
    """Answers for every tenant of a store.

    Make one with `load_engine`, and use it in a `with` statement or call `close()`. `generate`,
    `generate_batch` and `stream` run requests to their end. `submit`, `step` and `cancel` are what
    a server drives them with; `AsyncEngine` in common/serving/async_engine.py does so in a thread.
    An engine is for one thread at a time.
    """

    def __init__(self, store: Store, backend: Backend, options: SchedulerOptions | None = None):
        """Raises EngineError, or UnknownTenantError for options of a tenant that is not there."""
        super().__init__(store, options or SchedulerOptions())
        self.options.check_tenants(store.tenants)
        self._backend: Backend | None = backend
        self._steps = Steps(backend, self.options)
        self._leaving: set[str] = set()

    @property
    def max_batch_size(self) -> int:
        """Requests that advance in one step."""
        return self.options.max_num_seqs

    @property
    def tenants(self) -> tuple[str, ...]:
        """Names, without those that are being removed."""
        return tuple(t for t in self.store.tenants if t not in self._leaving)

    def warm_up(self, prompt_tokens: int = 24, new_tokens: int = 16) -> None:
        """Let the backend compile what usual steps need, so that first requests do not wait for it.

        Made-up prompts come, each time as many as are there already, while those answer, up to what
        a step may hold: of the first tenant alone, then beside one of the second. Other lengths and
        mixtures are compiled when they come. For when there are no requests; statistics leave it
        out.
        """
        backend = self._require_backend()
        warm_up(backend, self.store.tenants, self.max_batch_size, prompt_tokens, new_tokens)

    def generate(self, tenant: str, prompt: Prompt, params: SamplingParams = GREEDY) -> Generation:
        """Continue a prompt (text, or token ids) as the tenant would.

        Raises UnknownTenantError; RequestError for an empty or too long prompt, ids out of range,
        or text without a tokenizer.
        """
        return self.generate_batch([(tenant, prompt)], params)[0]

    def generate_batch(
        self,
        requests: Sequence[tuple[str, Prompt]],
        params: SamplingParams | Sequence[SamplingParams] = GREEDY,
    ) -> list[Generation]:
        """Answers in the order of the requests, (tenant, prompt) each, which are decoded together.

        `params` are one for all, or one for each. All are checked before the first is answered.
        """
        each = [params] * len(requests) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(requests):
            raise RequestError(
                f"{len(each)} sampling params for {len(requests)} requests; give one for all, or "
                "one for each"
            )
        made = [self._request(t, p, s) for (t, p), s in zip(requests, each, strict=True)]
        self._steps.run_alone(made)
        return [r.generation() for r in made]

    def stream(self, tenant: str, prompt: Prompt, params: SamplingParams = GREEDY) -> Iterator[str]:
        """Pieces of the answer's text as they become certain; no piece ends inside a character.

        The request is checked when this is called, not at the first piece. Raises RequestError
        without a tokenizer.
        """
        pieces: list[str] = []
        request = self._request(tenant, prompt, params)
        if request.stream is None:
            request.text.require("it has no text to stream; use generate()")
        request.on_output = lambda output: pieces.append(output.text)
        return self._stream(request, pieces)

    def _stream(self, request: Request, pieces: list[str]) -> Iterator[str]:
        self._steps.scheduler.add(request, bounded=False)
        try:
            while not request.done or pieces:
                while not pieces:
                    self.step()
                    if request.error is not None:
                        raise request.error
                yield from filter(None, pieces)
                pieces.clear()
        finally:
            self.cancel(request)

    # What a server drives.

    def submit(
        self,
        tenant: str,
        prompt: Prompt,
        params: SamplingParams = GREEDY,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        cache_salt: str = "",
        on_output: Callable[[Output], None] | None = None,
    ) -> Request:
        """Take a request, which `step` will advance together with all others that are there.

        Among a tenant's own requests a smaller `priority` goes first. What is not done after
        `deadline_s` seconds is ended. Only requests with the same `cache_salt` share what is in
        the prefix cache. `step` calls `on_output` with what is new. Raises as `generate` does, and
        OverloadedError where too many requests wait already.
        """
        options: dict[str, Any] = {"priority": priority, "deadline_s": deadline_s}
        options |= {"cache_salt": cache_salt, "on_output": on_output}
        request = self.check(tenant, prompt, params, **options)
        self.enqueue(request)
        return request

    def check(
        self,
        tenant: str,
        prompt: Prompt,
        params: SamplingParams = GREEDY,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        cache_salt: str = "",
        on_output: Callable[[Output], None] | None = None,
    ) -> Request:
        """Check what `submit` takes and turn it into tokens, for `enqueue`.

        It may run in another thread than the one that takes steps.
        """
        if not is_whole(priority):
            raise RequestError(f"priority is {priority!r}; give a whole number, smaller goes first")
        if deadline_s is not None and (isinstance(deadline_s, bool) or not deadline_s > 0):
            raise RequestError(f"deadline_s is {deadline_s!r}; give seconds above 0, or None")
        if not isinstance(cache_salt, str):
            raise RequestError(f"cache_salt is {cache_salt!r}; give text")
        request = self._request(tenant, prompt, params)
        request.priority, request.on_output, request.cache_salt = priority, on_output, cache_salt
        request.deadline = math.inf if deadline_s is None else request.taken_at + deadline_s
        return request

    def enqueue(self, request: Request) -> None:
        """Let a checked request wait for its turn. Raises OverloadedError, UnknownTenantError."""
        if request.tenant not in self.tenants:
            raise UnknownTenantError(request.tenant, self.tenants)
        self._steps.scheduler.add(request)

    def cancel(self, request: Request) -> None:
        """Forget a request and free its caches; nothing happens to one that is done."""
        self._steps.cancel(request)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self._steps.scheduler.has_work

    def step(self) -> bool:
        """Advance requests by one step; their `on_output` is called.

        Returns whether there was anything to do. A request that fails has `error` set and is
        forgotten.
        """
        self._require_backend()
        return self._steps.step()

    def fail_all(self, error: MoetelError) -> None:
        """End every request with an error."""
        self._steps.fail_all(error)

    def is_ready(self, tenant: str) -> bool:
        """Whether the device has the tenant's weights now. Any thread may ask."""
        return tenant in self._require_backend().ready_tenants

    def load(self) -> dict[str, Any]:
        """Numbers of requests that run and wait, in all and of each tenant, and bytes of caches."""
        caches = self._require_backend().stats()
        tenants = {n: running(self._steps.scheduler.requests(n)) for n in self.store.tenants}
        return {
            **{key: sum(t[key] for t in tenants.values()) for key in ("running", "waiting")},
            "tenants": tenants,
            **{key: caches[key] for key in ("kv_cache_bytes", "kv_cache_used_bytes")},
        }

    def update(self, store: Store) -> None:
        """Go on with a changed store: tenants added, tenants removed, another plan.

        To be called between two steps. Weights that did not change stay where they are, and so do
        requests. A tenant that is gone, or is another model now, must have none: see `retire`.

        Raises StoreError or EngineError, and then nothing has changed.
        """
        gone = self.store.departed(store)
        for name in gone:
            if self._steps.scheduler.requests(name):
                raise EngineError(
                    f"tenant {name!r} has requests; retire it and wait until they are done"
                )
        self._require_backend().update(store)
        super().update(store)
        for name in gone:
            self._steps.scheduler.forget_tenant(name)
            self._leaving.discard(name)

    def retire(self, tenant: str) -> bool:
        """Refuse new requests of a tenant. Returns whether all that it had are done."""
        if tenant not in self.store.tenants:
            raise UnknownTenantError(tenant, self.tenants)
        self._leaving.add(tenant)
        return not self._steps.scheduler.requests(tenant)

    def reinstate(self, tenant: str) -> None:
        """Take requests of a retired tenant again."""
        self._leaving.discard(tenant)

    def logits(
        self,
        tenant: str,
        input_ids: Any,
        decoder_input_ids: Any = None,
        attention_mask: Any = None,
    ) -> np.ndarray:
        """Logits at every position, for tests and scoring: float32 [batch, seq, vocab].

        Args:
            input_ids: int [batch, seq], or rows of different lengths.
            decoder_input_ids: int [batch, seq], for encoder-decoder families, whose logits are at
                its positions.
            attention_mask: int [batch, seq], 1 at the tokens, padding on either side. Padded
                positions are not computed and come back as 0.
        """
        backend = self._require_backend()
        if tenant not in self.tenants:
            raise UnknownTenantError(tenant, self.tenants)
        return logits_of(backend, self.store, tenant, input_ids, decoder_input_ids, attention_mask)

    def start_id(self, tenant: str) -> int:
        """The token that an encoder-decoder's answers begin with; RequestError for others."""
        found = self._require_backend().start_id(tenant) if tenant in self.tenants else None
        if found is None:
            raise RequestError(
                f"tenant {tenant!r} has no decoder start token; its answers go on from the prompt"
            )
        return found

    def observe(self, observer: Observer | None) -> None:
        """Show every layer's routing to `observer` from now on, None to stop; see `Observer`."""
        self._require_backend().observe(observer)

    def stats(self) -> dict[str, Any]:
        """What the engine holds and did: bytes by kind, hits, misses, fetches, reconfigurations.

        `products` says who multiplies: "own kernels (AVX2)", "own kernels (AVX-512)", "own kernels
        (AVX-512 bf16)", "torch" or "XLA". `tenants` has what each one's requests came to since the
        engine was loaded; `prefix_cache_queries` are tokens of prompts that were looked for in the
        prefix cache, and `prefix_cache_hits` those that were found.
        """
        return {
            **self._require_backend().stats(),
            "tenants": {name: self._steps.statistics.summary(name) for name in self.store.tenants},
            "preemptions": self._steps.scheduler.preemptions,
            "max_ready_tenants": self._require_backend().max_ready_tenants,
        }

    def close(self) -> None:
        """Free the device. The engine cannot be used afterwards."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _require_backend(self) -> Backend:
        if self._backend is None:
            raise EngineError("this engine is closed; load it again with load_engine()")
        return self._backend

    def _request(self, tenant: str, prompt: Prompt, params: SamplingParams) -> Request:
        taken_at = time.perf_counter()
        backend = self._require_backend()
        if tenant not in self.tenants:
            raise UnknownTenantError(tenant, self.tenants)
        config = self.store.config(tenant)
        length = min(backend.max_length(tenant), self.options.max_model_len or config.max_positions)
        return check_request(self.text(tenant), config, prompt, params, length, taken_at)
