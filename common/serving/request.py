"""A request on its way through the engine, and what its asker gets back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from common.errors import MoetelError
from common.sampling_params import SamplingParams
from common.serving.backend import Row
from common.serving.grammar import Grammar
from common.serving.prompt_logprobs import PromptLogprobs
from common.serving.sampling import Choice, TokenLogprob
from common.serving.tenant_text import TenantText
from common.serving.text_stream import TextStream

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Timings:
    """Seconds from the moment that the engine took the request, and its expert look-ups.

    Attributes:
        reconfiguration: making the tenant's non-expert weights the ones in use, before the first
            token; 0 if they were.
        ttft: until the first token.
        total: until the last token.
        hits: look-ups that a resident copy served; all are computed tokens * layers * top_k.
        misses: look-ups that needed the tenant's own expert.
        queued: until the first step that read any of it, with a tenant's first request in a process
            the load of its tokenizer included.
        preemptions: how often its caches were given up for others' and computed again.
    """

    reconfiguration: float
    ttft: float
    total: float
    hits: int
    misses: int
    queued: float = 0.0
    preemptions: int = 0


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        token_ids: the new tokens alone, an end-of-sequence token included.
        text: None without a tokenizer.
        finish_reason: stop (end of sequence, a stop string or id), length, or abort (cancelled, or
            past its deadline).
        stop_reason: the stop string or the stop token id that ended it, None for anything else.
        logprobs: one for each of token_ids, empty if not asked for.
        prompt_logprobs: one for each of prompt_token_ids, None for the first; empty if not asked
            for.
        num_cached_tokens: of the prompt, found in the prefix cache and not computed again.
    """

    tenant: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    timings: Timings
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True)
class Output:
    """What a request got in a step. The texts of a request's outputs make up its answer's text.

    token_ids: new tokens. text: what is now certain: nothing while a character or a stop string is
        undecided.
    logprobs: one for each of token_ids, empty if not asked for. generation: the whole, in the last
        output alone. prompt_logprobs: as of `Generation`, in the first output with a token alone.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    generation: Generation | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(eq=False)
class Request:
    """What was asked, what came so far, and where it stands with the scheduler.

    deadline: on the engine's clock, infinite if there is none. number: order of arrival.
    sequence: the backend's number while the request has caches. unread: tokens to read before the
        next one comes. num_cached_tokens: of the prompt, found in the cache when it first began.
    next_token: chosen and not yet given to the backend.

    Raises RequestError for a stop string that can never match.
    """

    tenant: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    params: SamplingParams
    text: TenantText
    taken_at: float
    priority: int = 0
    deadline: float = math.inf
    number: int = 0
    on_output: Callable[[Output], None] | None = None
    is_encoder_decoder: bool = False
    grammar: Grammar | None = None
    cache_salt: str = ""

    sequence: int | None = None
    unread: int = 0
    num_cached_tokens: int = 0
    next_token: int = -1
    preemptions: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    started_at: float | None = None
    first_at: float | None = None
    last_at: float | None = None
    hits: int = 0
    misses: int = 0
    reconfiguration_s: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: MoetelError | None = None

    def __post_init__(self) -> None:
        self.unread = len(self.prompt)
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs.append(None)
        params, generation = self.params, self.text.generation
        self.stream = None
        self._stops: dict[int, str] = {}
        if self.text.has_tokenizer:
            skip = params.skip_special_tokens
            # An encoder-decoder's answer is a text of its own.
            before = () if self.is_encoder_decoder else self.prompt
            self.stream = TextStream(
                self.text, params.stop_strings, before, skip, params.include_stop_str_in_output
            )
            stops = ((self.text.stop_token(stop, skip), stop) for stop in params.stop_strings)
            self._stops = {token_id: stop for token_id, stop in stops if token_id is not None}
        self._rng = np.random.default_rng(params.seed)
        self._eos = frozenset() if params.ignore_eos else frozenset(generation.eos_token_ids)
        self._ends = self._eos | frozenset(params.stop_token_ids or ()) | frozenset(self._stops)

    @property
    def order(self) -> tuple[int, float, int]:
        """Place among the requests of its tenant: smaller goes first."""
        return self.priority, self.deadline, self.number

    @property
    def wants_logits(self) -> bool:
        """Whether the choice of the next token needs all logits."""
        return self.params.needs_logits

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    def row(self) -> Row:
        """What its sequence starts from, now."""
        return Row(
            self.tenant,
            self.prompt,
            self.max_new_tokens,
            tuple(self.token_ids),
            cache_prefix=self.shares_prefix,
            cache_salt=self.cache_salt,
        )

    @property
    def shares_prefix(self) -> bool:
        """Whether what others left of its beginning in the cache is of use to it."""
        return self.params.prompt_logprobs is None

    @property
    def lacking_prompt_logprobs(self) -> int | None:
        """How many most probable tokens to give with each of the prompt; None: no more at all."""
        done = len(self.prompt_logprobs) >= len(self.prompt)
        return None if done else self.params.prompt_logprobs

    def take_prompt(self, found: PromptLogprobs, first: int) -> None:
        """Take what a step gave the tokens behind position `first`. What was read again is known
        already, and the answer is none of the prompt."""
        known = len(self.prompt_logprobs)
        self.prompt_logprobs += found.tokens()[known - first - 1 : len(self.prompt) - first - 1]

    @property
    def owner(self) -> tuple[str, str]:
        """With whom it may share what is in the cache."""
        return self.tenant, self.cache_salt

    def first(self, count: int) -> tuple[int, ...]:
        """Its first tokens, of prompt and answer."""
        more = count - len(self.prompt)
        return (*self.prompt, *self.token_ids[:more]) if more > 0 else self.prompt[:count]

    def choice(self) -> Choice:
        """How its next token is chosen. To be asked once a token, as a draw is taken for it; what
        the answer's structure allows is computed from now on."""
        banned = self._ends if len(self.token_ids) < self.params.min_tokens else frozenset()
        uniform = 0.0 if self.params.greedy else float(self._rng.random())
        allowed = None
        if self.grammar is not None:
            self.grammar.prepare()
            allowed = self.grammar.allowed
        return Choice(
            self.params, self.prompt, self.token_ids, banned, self.forced, uniform, allowed
        )

    def take(self, token_id: int, logprob: TokenLogprob | None, now: float) -> Output:
        """Take the next token, and say what is now certain of the answer.

        Sets `finish_reason` at the end, and `next_token` before it. Raises RequestError where the
        answer's structure cannot go on.
        """
        if self.grammar is not None:
            self.grammar.take(token_id)
        logprobs = () if logprob is None else (logprob,)
        self.logprobs += logprobs
        prompt_logprobs = () if self.token_ids else tuple(self.prompt_logprobs)
        self.token_ids.append(token_id)
        self.next_token = token_id
        self.last_at = now
        if self.first_at is None:
            self.first_at = now
        if token_id in self._ends:
            self.finish_reason = "stop"
            self.stop_reason = self._stops.get(
                token_id, None if token_id in self._eos else token_id
            )
        elif self.grammar is not None and self.grammar.ended:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_new_tokens:
            self.finish_reason = "length"
        piece = ""
        if self.stream is not None:
            if (
                token_id in self._ends and not self.params.include_stop_str_in_output
            ):  # no part of the text
                piece = self.stream.finish()
            else:
                piece = self.stream.push(token_id, last=self.done)
            if self.stream.stopped:
                self.finish_reason = "stop"
                self.stop_reason = self.stream.stopped_by
        generation = self.generation() if self.done else None
        return Output((token_id,), piece, logprobs, generation, prompt_logprobs)

    @property
    def forced(self) -> int | None:
        """The token that the tenant's generation config puts next, whatever the logits are
        (transformers' ForcedBOS- and ForcedEOSTokenLogitsProcessor)."""
        generation = self.text.generation
        first, last = not self.token_ids, len(self.token_ids) + 1 == self.max_new_tokens
        if self.grammar is not None:
            return None
        if last and generation.forced_eos_token_id is not None and not self.params.ignore_eos:
            return generation.forced_eos_token_id
        # transformers forces it behind a single token, which is where an encoder-decoder's answers
        # start.
        return generation.forced_bos_token_id if first and self.is_encoder_decoder else None

    def abort(self) -> Output:
        """End it now, with what there is."""
        self.finish_reason = "abort"
        piece = "" if self.stream is None or self.stream.stopped else self.stream.finish()
        return Output((), piece, (), self.generation())

    def generation(self) -> Generation:
        """The answer; `finish_reason` must be set."""
        assert self.finish_reason is not None
        start, last = self.taken_at, self.taken_at if self.last_at is None else self.last_at
        return Generation(
            tenant=self.tenant,
            prompt_token_ids=self.prompt,
            token_ids=tuple(self.token_ids),
            text=None if self.stream is None else self.stream.emitted,
            finish_reason=self.finish_reason,
            timings=Timings(
                reconfiguration=self.reconfiguration_s,
                ttft=(last if self.first_at is None else self.first_at) - start,
                total=last - start,
                hits=self.hits,
                misses=self.misses,
                queued=(last if self.started_at is None else self.started_at) - start,
                preemptions=self.preemptions,
            ),
            stop_reason=self.stop_reason,
            logprobs=tuple(self.logprobs),
            num_cached_tokens=self.num_cached_tokens,
            prompt_logprobs=tuple(self.prompt_logprobs),
        )
