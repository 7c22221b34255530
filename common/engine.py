"""The one Python interface to every engine.

An engine supplies a `Backend`: logits for sequences of tokens. Everything that a user sees
(checking of requests, sampling, stopping, text, results, statistics) is here and in the modules
that this one joins, once.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from common.backend import Backend, Batch, Observer, Part, Row, Step
from common.consolidation import Plan
from common.detokenizer import CleanUp, IncrementalDecoder
from common.errors import (
    CheckpointError,
    DeadlineError,
    EngineError,
    MoetelError,
    RequestError,
    TenantUnavailableError,
    UnknownTenantError,
)
from common.families.shape import Decoder, EncoderDecoder
from common.generation import GenerationConfig
from common.request import FinishReason, Generation, Output, Request, Timings
from common.sampling import SamplingParams
from common.scheduler import NoRoomError, Scheduler, SchedulerOptions
from common.store import Store
from common.text import TenantText
from common.units import is_whole

__all__ = [
    "BACKENDS",
    "Backend",
    "Batch",
    "Engine",
    "FinishReason",
    "Generation",
    "Observer",
    "Output",
    "Part",
    "Prompt",
    "Row",
    "SchedulerOptions",
    "Step",
    "Timings",
    "load_engine",
]

Prompt = str | Sequence[int]

GREEDY = SamplingParams()

# The engine of each shape.
BACKENDS = {Decoder: "torch", EncoderDecoder: "jax"}


class Engine:
    """Answers for every tenant of a store. Make one with `load_engine`; a context manager, or call
    `close()`.

    `generate`, `generate_batch` and `stream` run requests to their end. `submit`, `step` and
    `cancel` are what a server drives them with; `common.serving.AsyncEngine` does so in a thread.
    Not for use by several threads at once.
    """

    def __init__(self, store: Store, backend: Backend, options: SchedulerOptions | None = None):
        """options: how requests share steps. Raises EngineError, UnknownTenantError."""
        self.store = store
        self.options = options or SchedulerOptions()
        self.options.check_tenants(store.tenants)
        self._backend: Backend | None = backend
        self._scheduler = Scheduler(backend, self.options)
        self._texts: dict[str, TenantText] = {}
        self._unusable: dict[str, str] = {}
        self._leaving: set[str] = set()
        self._counts: dict[str, Counter[str]] = {}

    @property
    def max_batch_size(self) -> int:
        """Requests that advance in one step."""
        return self.options.max_num_seqs

    @property
    def tenants(self) -> tuple[str, ...]:
        """Names, without those that are being removed."""
        return tuple(t for t in self.store.tenants if t not in self._leaving)

    @property
    def unavailable(self) -> dict[str, str]:
        """Tenant -> why it cannot be asked, as far as tenants were loaded: see `load_texts`.

        One whose tokenizer cannot be loaded still answers prompts of token ids.
        """
        failed = {
            name: text.failure for name, text in self._texts.items() if text.failure is not None
        }
        return {
            name: why for name, why in (failed | self._unusable).items() if name in self.tenants
        }

    def load_texts(self) -> dict[str, str]:
        """Load every tenant's tokenizer, so that no first request waits for it. Returns
        `unavailable`."""
        for name in self.tenants:
            with suppress(TenantUnavailableError):
                self._text(name)
        return self.unavailable

    def generation_config(self, tenant: str) -> GenerationConfig:
        """The tenant's special tokens, and its defaults for sampling, which servers apply.

        Raises UnknownTenantError, TenantUnavailableError.
        """
        return self._text(tenant).generation

    @property
    def plan(self) -> Plan:
        return self.store.plan

    def warm_up(self, prompt_tokens: int = 24, new_tokens: int = 16) -> None:
        """Let the backend compile now what usual steps need, so that the first requests do not wait
        for it.

        Made-up prompts of so many tokens come, each time as many as are there already, while those
        answer, up to what
        a step may hold: of the first tenant alone, then beside one of the second. Other lengths and
        mixtures are still compiled when they come. For when there are no requests;
        `stats()["tenants"]` does not count it.
        """
        backend, names, most = self._require_backend(), self.store.tenants, self.max_batch_size
        longest = min(map(backend.max_length, names[:2]))
        prompt = (1,) * max(1, min(prompt_tokens, longest - new_tokens))
        first, *others = (Row(name, prompt, new_tokens) for name in names[:2])
        self._warm_up_with(backend, [[first]], first, most)
        if others and min(most, backend.max_ready_tenants) > 1:
            self._warm_up_with(backend, [[*others, first]], first, most)

    @staticmethod
    def _warm_up_with(backend: Backend, arrivals: list[list[Row]], more: Row, most: int) -> None:
        """Steps in which some rows read while all before them answer, the last without any to read.
        Stops where memory ends."""
        there = len(arrivals[0])
        while there < most:
            arrivals = [*arrivals, [more] * min(there, most - there)]
            there += len(arrivals[-1])
        begun: list[int] = []
        try:
            for rows in [*arrivals, []]:
                new = [backend.begin(row) for row in rows]
                parts = [Part(s, token_id=1) for s in begun]
                parts += [Part(s, read=row.unread) for s, row in zip(new, rows, strict=True)]
                begun += new
                if not backend.fits(parts):
                    return
                backend.step(parts)
        finally:
            backend.end(begun)

    def generate(self, tenant: str, prompt: Prompt, params: SamplingParams = GREEDY) -> Generation:
        """Continue a prompt (text, or token ids) as the tenant would.

        Raises UnknownTenantError, or RequestError for an empty or too long prompt, ids out of
        range, text without a tokenizer.
        """
        return self.generate_batch([(tenant, prompt)], params)[0]

    def generate_batch(
        self,
        requests: Sequence[tuple[str, Prompt]],
        params: SamplingParams | Sequence[SamplingParams] = GREEDY,
    ) -> list[Generation]:
        """Answers in the order of the requests, which may name different tenants and are decoded
        together.

        params: one for all, or one for each. Every request is checked before the first is answered.
        """
        each = [params] * len(requests) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(requests):
            raise RequestError(
                f"{len(each)} sampling params for {len(requests)} requests; give one for all, or "
                "one for each"
            )
        made = [self._request(t, p, s) for (t, p), s in zip(requests, each, strict=True)]
        self._run_alone(made)
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
        self._scheduler.add(request, bounded=False)
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

    def _run_alone(self, requests: Sequence[Request]) -> None:
        """Run requests to their end. Nobody waits for one of them alone, so throughput is what
        counts."""
        try:
            for request in requests:
                self._scheduler.add(request, bounded=False)
            while any(not r.done for r in requests):
                self.step(alone=True)
                for request in requests:
                    if request.error is not None:
                        raise request.error
        finally:
            for request in requests:
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
        on_output: Callable[[Output], None] | None = None,
    ) -> Request:
        """Take a request, which `step` will advance together with all others that are there.

        priority: smaller goes first among the tenant's own requests. deadline_s: seconds from now
        after which the answer is worth nothing; what is not done then is ended. on_output: called
        by `step` with what is new.

        Raises as `generate` does, and OverloadedError.
        """
        request = self.check(
            tenant, prompt, params, priority=priority, deadline_s=deadline_s, on_output=on_output
        )
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
        on_output: Callable[[Output], None] | None = None,
    ) -> Request:
        """What `submit` takes, checked and turned into tokens, to be handed to `enqueue`; safe in
        another thread."""
        if not is_whole(priority):
            raise RequestError(f"priority is {priority!r}; give a whole number, smaller goes first")
        if deadline_s is not None and (isinstance(deadline_s, bool) or not deadline_s > 0):
            raise RequestError(f"deadline_s is {deadline_s!r}; give seconds above 0, or None")
        request = self._request(tenant, prompt, params)
        request.priority, request.on_output = priority, on_output
        request.deadline = math.inf if deadline_s is None else request.taken_at + deadline_s
        return request

    def enqueue(self, request: Request) -> None:
        """Let a checked request wait for its turn. Raises OverloadedError, UnknownTenantError."""
        if request.tenant not in self.tenants:
            raise UnknownTenantError(request.tenant, self.tenants)
        self._scheduler.add(request)

    def cancel(self, request: Request) -> None:
        """Forget a request and free its caches; nothing happens to one that is done."""
        if not request.done:
            request.abort()
            self._count(request, "abort")
        self._scheduler.remove(request)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self._scheduler.has_work

    def step(self, *, alone: bool = False) -> bool:
        """Advance requests by one step; their `on_output` is called. Returns whether there was
        anything to do.

        A request that fails has `error` set and is forgotten. alone: prompts are read in as large
        pieces as a step takes, for callers that wait for all answers together.
        """
        backend = self._require_backend()
        for request in self._scheduler.expired(time.perf_counter()):
            self._expire(request)
        try:
            parts = self._scheduler.next(time.perf_counter(), alone=alone)
        except NoRoomError as error:
            self._fail(error.request, error)
            return True
        if not parts:
            return False
        try:
            step = backend.step([part for _, part in parts])
        except Exception as error:
            for request, _ in parts:
                self._fail(
                    request,
                    EngineError(f"a step of the engine failed ({type(error).__name__}: {error})"),
                )
            raise
        now = time.perf_counter()
        self._scheduler.done(parts, step, now)
        for (request, part), winner, logits, hits, misses in zip(
            parts,
            step.token_ids.tolist(),
            step.logits,
            step.hits.tolist(),
            step.misses.tolist(),
            strict=True,
        ):
            counts = self._counts_of(request.tenant)
            counts["hits"] += hits
            counts["misses"] += misses
            counts["read_tokens"] += part.read
            request.hits += hits
            request.misses += misses
            if request.first_at is None:
                request.reconfiguration_s += step.reconfiguration_s.get(request.tenant, 0.0)
            if request.unread == 0:
                self._take(request, winner, logits, now)
        for name in self._scheduler.flooding:
            self._counts_of(name)["flood_steps"] += 1
        for name, seconds in step.reconfiguration_s.items():
            self._counts_of(name)["reconfigurations"] += 1
            self._counts_of(name)["reconfiguration_us"] += round(seconds * 1e6)
        return True

    def _take(self, request: Request, winner: int, logits: np.ndarray | None, now: float) -> None:
        """Give a request its next token."""
        counts = self._counts_of(request.tenant)
        if request.first_at is None:
            counts["prompt_tokens"] += len(request.prompt)
        output = request.choose(winner, logits, now)
        counts["generation_tokens"] += 1
        if request.done:
            self._scheduler.remove(request)
            self._count(request, str(request.finish_reason))
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
        self._scheduler.remove(request)
        self._count(request, "deadline" if isinstance(error, DeadlineError) else "error")
        if request.on_output is not None:
            request.on_output(Output((), "", (), request.generation()))

    def fail_all(self, error: MoetelError) -> None:
        """End every request with an error."""
        for request in self._scheduler.requests():
            self._fail(request, error)

    def _counts_of(self, tenant: str) -> Counter[str]:
        return self._counts.setdefault(tenant, Counter())

    def _count(self, request: Request, reason: str) -> None:
        counts = self._counts_of(request.tenant)
        counts[f"finished_{reason}"] += 1
        counts["preemptions"] += request.preemptions

    def load(self) -> dict[str, Any]:
        """Requests that run (have caches) and wait, in all and of each tenant, and what the caches
        hold."""
        stats = self._require_backend().stats()
        tenants = {}
        for name in self.store.tenants:
            requests = self._scheduler.requests(name)
            running = sum(r.sequence is not None for r in requests)
            tenants[name] = {"running": running, "waiting": len(requests) - running}
        return {
            "running": sum(t["running"] for t in tenants.values()),
            "waiting": sum(t["waiting"] for t in tenants.values()),
            "tenants": tenants,
            "kv_cache_bytes": stats["kv_cache_bytes"],
            "kv_cache_used_bytes": stats["kv_cache_used_bytes"],
        }

    def update(self, store: Store) -> None:
        """Go on with a changed store between two steps: tenants added, tenants removed, another
        plan.

        Weights that did not change stay where they are, and so do requests. A tenant that is gone
        must have none: see `retire`. Raises StoreError or EngineError, and then nothing has
            changed.
        """
        for name in self.store.tenants:
            if name not in store.tenants and self._scheduler.requests(name):
                raise EngineError(
                    f"tenant {name!r} has requests; retire it and wait until they are done"
                )
        self._require_backend().update(store)
        gone = set(self.store.tenants) - set(store.tenants)
        self.store = store
        for name in gone:
            self._texts.pop(name, None)
            self._unusable.pop(name, None)
            self._scheduler.forget_tenant(name)
            self._leaving.discard(name)

    def retire(self, tenant: str) -> bool:
        """Refuse new requests of a tenant. Returns whether all that it had are done."""
        if tenant not in self.store.tenants:
            raise UnknownTenantError(tenant, self.tenants)
        self._leaving.add(tenant)
        return not self._scheduler.requests(tenant)

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
        """Logits at every position, for tests and scoring: float32 [batch, seq, vocab], vocab the
        tenant's own.

        input_ids: int [batch, seq], or rows of different lengths. attention_mask: int [batch, seq],
        1 at the tokens, padding on either side; padded positions are not computed and come back as
        0.
        decoder_input_ids: int [batch, seq], for encoder-decoder families, whose logits are at its
            positions.
        """
        backend = self._require_backend()
        rows = _rows(input_ids, "input_ids")
        places = [np.arange(len(row)) for row in rows]
        if attention_mask is not None:
            mask = [np.asarray(m).astype(bool) for m in attention_mask]
            if len(mask) != len(rows) or any(
                len(m) != len(r) for m, r in zip(mask, rows, strict=True)
            ):
                raise RequestError("attention_mask has another shape than input_ids")
            places = [np.flatnonzero(m) for m in mask]
            if any(len(p) and p[-1] - p[0] + 1 != len(p) for p in places):
                raise RequestError(
                    "attention_mask has a gap; give 1 at adjacent tokens of a row and 0 before or "
                    "after them"
                )
        if tenant not in self.tenants:
            raise UnknownTenantError(tenant, self.tenants)
        if self.store.config(tenant).is_encoder_decoder != (decoder_input_ids is not None):
            what = (
                "needs decoder_input_ids as well"
                if decoder_input_ids is None
                else "reads input_ids alone"
            )
            raise RequestError(
                f"family {self.store.family.name!r} {what}; give what its Hugging Face model takes"
            )
        prompts = [
            self._check_ids(tenant, [row[i] for i in place], "input_ids")
            for row, place in zip(rows, places, strict=True)
        ]
        decoder_rows = None
        if decoder_input_ids is not None:
            decoder_rows = [
                self._check_ids(tenant, r, "decoder_input_ids")
                for r in _rows(decoder_input_ids, "decoder_input_ids")
            ]
            if len(decoder_rows) != len(rows):
                raise RequestError(
                    f"{len(decoder_rows)} rows of decoder_input_ids for {len(rows)} of input_ids"
                )
        found = backend.logits(tenant, prompts, decoder_rows)
        if decoder_rows is not None:
            places = [np.arange(len(r)) for r in decoder_rows]
            width = max(len(r) for r in decoder_rows)
        else:
            width = max(len(r) for r in rows)
        out = np.zeros((len(found), width, found[0].shape[-1]), dtype=np.float32)
        for i, (place, values) in enumerate(zip(places, found, strict=True)):
            out[i, place] = values
        return out

    def has_tokenizer(self, tenant: str) -> bool:
        """Whether prompts of this tenant can be text. Raises UnknownTenantError."""
        return self._text(tenant).has_tokenizer

    def tokenize(self, tenant: str, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens or without."""
        return self._text(tenant).encode(text, add_special_tokens)

    def answer_ids(self, tenant: str, text: str) -> list[int]:
        """Token ids of a text as the tenant would answer it: of special tokens only the
        end-of-sequence one."""
        return self._text(tenant).encode_answer(text)

    def start_id(self, tenant: str) -> int:
        """The token that answers of an encoder-decoder tenant are decoded from. Raises RequestError
        for others."""
        found = self._require_backend().start_id(tenant) if tenant in self.tenants else None
        if found is None:
            raise RequestError(
                f"tenant {tenant!r} has no decoder start token; its answers go on from the prompt"
            )
        return found

    def detokenize(
        self, tenant: str, token_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
        """Text of token ids, with special tokens or without. Raises RequestError without a
        tokenizer."""
        tokenizer = self._text(tenant).require("token ids have no text")
        return tokenizer.decode(
            self._check_ids(tenant, token_ids, "token_ids"), skip_special_tokens
        )

    def apply_chat_template(
        self,
        tenant: str,
        messages: Sequence[Mapping[str, Any]],
        add_special_tokens: bool = False,
        **options: Any,
    ) -> list[int]:
        """Token ids of a conversation in the tenant's chat template: a prompt for `generate`.

        options: of transformers' `apply_chat_template`, such as `add_generation_prompt` (here true
        if not given), `continue_final_message`, `documents`, and variables of the template.
        """
        return self._text(tenant).chat(messages, add_special_tokens, **options)

    def render_chat(
        self, tenant: str, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> str:
        """The text of what `apply_chat_template` turns into token ids."""
        return self._text(tenant).render(messages, **options)

    def chat_template(self, tenant: str) -> str | None:
        """The text of the tenant's chat template; None if it has several and none is the default.

        Raises RequestError if it has none.
        """
        return self._text(tenant).chat_template

    def detokenizer(
        self, tenant: str, prompt: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> IncrementalDecoder:
        """Turns the tokens of an answer to `prompt` into text, one at a time.

        Raises RequestError without a tokenizer.
        """
        before = () if self.store.config(tenant).is_encoder_decoder else prompt
        return (
            self._text(tenant)
            .require("token ids have no text")
            .incremental(before, skip_special_tokens)
        )

    def clean_up(self, tenant: str) -> CleanUp | None:
        """What is done to a finished text, for the pieces that `detokenizer` gives; None if nothing
        is."""
        return self._text(tenant).require("token ids have no text").clean_up()

    def tokens(self, tenant: str, token_ids: Sequence[int]) -> list[str]:
        """Tokens as the tenant's vocabulary writes them."""
        return self._text(tenant).require("token ids have no text").tokens(token_ids)

    def token_bytes(self, tenant: str, token_id: int) -> bytes | None:
        """The bytes of a token that need not be whole characters; None for a token of text."""
        return self._text(tenant).require("token ids have no text").token_bytes(token_id)

    def observe(self, observer: Observer | None) -> None:
        """Show every layer's routing to `observer` from now on, None to stop; see `Observer`."""
        self._require_backend().observe(observer)

    def stats(self) -> dict[str, Any]:
        """What the engine holds and has done: bytes by kind, hits, misses, fetches,
        reconfigurations.

        products: who multiplies: "own kernels (AVX2)", "own kernels (AVX-512)", "own kernels
        (AVX-512 bf16)", "oneDNN", "torch" or "XLA".
        tenants: for each of them what its requests came to since the engine was loaded.
        """
        tenants = {}
        for name in self.store.tenants:
            counts = self._counts_of(name)
            tenants[name] = {
                "requests": {
                    r: counts[f"finished_{r}"]
                    for r in ("stop", "length", "abort", "deadline", "error")
                },
                **{
                    k: counts[k]
                    for k in (
                        "prompt_tokens",
                        "generation_tokens",
                        "read_tokens",
                        "hits",
                        "misses",
                        "preemptions",
                        "flood_steps",
                        "reconfigurations",
                    )
                },
                "reconfiguration_s": counts["reconfiguration_us"] / 1e6,
            }
        return {
            **self._require_backend().stats(),
            "tenants": tenants,
            "preemptions": self._scheduler.preemptions,
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

    def _text(self, tenant: str) -> TenantText:
        if tenant not in self._texts:
            assets = self.store.assets_dir(tenant)
            try:
                generation = self.store.generation(tenant)
            except CheckpointError as error:
                self._unusable[tenant] = f"{error}; mend the checkpoint's file and build again"
                raise TenantUnavailableError(tenant, self._unusable[tenant]) from error
            self._texts[tenant] = TenantText(tenant, assets, generation)
        return self._texts[tenant]

    def _check_ids(self, tenant: str, ids: Sequence[int], what: str) -> tuple[int, ...]:
        config = self.store.config(tenant)
        checked = []
        for i, token_id in enumerate(ids):
            if isinstance(token_id, bool) or not isinstance(token_id, int | np.integer):
                raise RequestError(f"{what}[{i}] is {token_id!r}; token ids are whole numbers")
            if not 0 <= token_id < config.vocab_size:
                raise RequestError(
                    f"{what}[{i}] is {int(token_id)}, outside the vocabulary of tenant {tenant!r} "
                    f"(0..{config.vocab_size - 1})"
                )
            checked.append(int(token_id))
        if not checked:
            raise RequestError(f"{what} is empty; give at least one token")
        if len(checked) > config.max_positions:
            raise RequestError(
                f"{what} has {len(checked)} tokens, tenant {tenant!r} has a context of "
                f"{config.max_positions}; "
                "shorten it"
            )
        return tuple(checked)

    def _request(self, tenant: str, prompt: Prompt, params: SamplingParams) -> Request:
        taken_at = time.perf_counter()
        backend = self._require_backend()
        if tenant not in self.tenants:
            raise UnknownTenantError(tenant, self.tenants)
        text = self._text(tenant)
        if isinstance(prompt, str):
            ids: Sequence[int] = text.encode(prompt)
            if not ids:
                raise RequestError("the prompt is empty; give some text")
        else:
            try:
                ids = list(prompt)
            except TypeError as error:
                raise RequestError(
                    f"the prompt is {prompt!r}; give text or a list of token ids"
                ) from error
        checked = self._check_ids(tenant, ids, "the prompt")
        config = self.store.config(tenant)
        length = min(backend.max_length(tenant), self.options.max_model_len or config.max_positions)
        if len(checked) > length:
            raise RequestError(
                f"the prompt has {len(checked)} tokens, there is room for {length} of tenant "
                f"{tenant!r} "
                "(max_model_len, kv_cache_bytes); shorten it, or give the engine more"
            )
        room = length - (0 if config.is_encoder_decoder else len(checked))
        if room < 1:
            raise RequestError(
                f"the prompt has {len(checked)} tokens and fills the context of tenant {tenant!r} "
                f"({length}); shorten it to leave room for an answer"
            )
        if params.stop_strings and not text.has_tokenizer:
            raise RequestError(
                f"tenant {tenant!r} has no tokenizer, so stop strings cannot be found; use "
                "stop_token_ids"
            )
        for token_id in params.logit_bias or {}:
            if not 0 <= token_id < config.vocab_size:
                raise RequestError(
                    f"logit_bias names token {token_id}, outside the vocabulary of tenant "
                    f"{tenant!r} "
                    f"(0..{config.vocab_size - 1})"
                )
        return Request(
            tenant=tenant,
            prompt=checked,
            max_new_tokens=min(params.max_new_tokens, room),
            params=replace(params, min_tokens=min(params.min_tokens, room))
            if params.min_tokens > room
            else params,
            text=text,
            taken_at=taken_at,
            is_encoder_decoder=config.is_encoder_decoder,
        )


def _rows(ids: Any, what: str) -> list[list[int]]:
    """[batch, seq] of anything array-like, or rows of different lengths, as lists."""
    rows = (
        ids.tolist()
        if hasattr(ids, "tolist")
        else [
            list(r) if isinstance(r, Sequence) else getattr(r, "tolist", lambda r=r: r)()
            for r in ids
        ]
    )
    if not isinstance(rows, list) or not rows or not all(isinstance(r, list) for r in rows):
        raise RequestError(
            f"{what} must be [batch, seq]: a list of rows of token ids with at least one row"
        )
    return rows


def load_engine(
    store: str | Path | Store,
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    *,
    max_batch_size: int | None = None,
    scheduler: SchedulerOptions | None = None,
    **options: Any,
) -> Engine:
    """Load a store for inference.

    backend: auto picks by shape (decoders: torch, encoder-decoders: jax). device: auto takes a
        GPU if there is one.
    dtype: auto is the store's; float32 or bfloat16 to override.
    scheduler: how requests share steps; max_batch_size: short for its `max_num_seqs`.
    options: the backend's own, see `torch_engine.TorchOptions` and `jax_engine.JaxOptions`.

    Raises StoreError, EngineError.
    """
    opened = store if isinstance(store, Store) else Store.open(store)
    serves = BACKENDS[type(opened.config(opened.tenants[0]).shape)]
    if backend not in ("auto", serves):
        raise EngineError(
            f"backend {backend!r} does not serve family {opened.family.name!r}; use {serves!r}"
        )
    chosen = scheduler or SchedulerOptions()
    if max_batch_size is not None:
        if not is_whole(max_batch_size) or max_batch_size < 1:
            raise EngineError(f"max_batch_size is {max_batch_size!r}; give a whole number from 1")
        tokens = max(chosen.max_num_batched_tokens, max_batch_size)
        chosen = replace(chosen, max_num_seqs=max_batch_size, max_num_batched_tokens=tokens)
    chosen.check_tenants(opened.tenants)
    load = _torch_backend if serves == "torch" else _jax_backend
    return Engine(opened, load(opened, device=device, dtype=dtype, **options), chosen)


def _torch_backend(store: Store, **options: Any) -> Backend:
    try:
        import torch_engine.backend
    except ImportError as error:
        raise EngineError(
            f"the torch backend is not installed ({error}); run: pip install 'moetel[torch]'"
        ) from error
    return torch_engine.load_backend(store, **options)


def _jax_backend(store: Store, **options: Any) -> Backend:
    try:
        import jax_engine.backend
    except ImportError as error:
        raise EngineError(
            f"the jax backend is not installed ({error}); run: pip install 'moetel[jax]'"
        ) from error
    return jax_engine.load_backend(store, **options)
