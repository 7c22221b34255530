"""What an engine supplies to the shared core: sequences of tokens with caches, and steps that
advance any set of them.

A *sequence* is one request's tokens on the device. Which sequences advance in a step, and by how
much, is for the scheduler to say; a backend only computes. So sequences of
several tenants, some reading their prompts and some answering, share a step, and a sequence that is
left out of a step keeps its caches and waits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from common.serving.prompt_logprobs import PromptLogprobs
from common.serving.sampling import Choice, TokenLogprob
from common.store import Store


@dataclass(frozen=True)
class Row:
    """What a sequence starts from.

    prompt: token ids. max_new_tokens: the most that will be answered; a hint for how much cache to
        take.
    answer: tokens answered before the sequence was put off and its caches given up; they are read
        again, after the prompt.
    cache_prefix: whether what is in the cache of its beginning is taken, and what is computed of it
        left there. cache_salt: only sequences of the same one share what is in the cache.
    """

    tenant: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    answer: tuple[int, ...] = ()
    cache_prefix: bool = True
    cache_salt: str = ""

    @property
    def unread(self) -> int:
        """Tokens to be read before the next one comes: prompt and answer."""
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Part:
    """What one sequence does in a step: it reads on (read > 0), or takes the token that was chosen
    for it.

    sequence: its number, from `Backend.begin`. read: how many of its unread tokens, in order, to
        read now.
    token_id: with read 0, the token that follows what it has. want_logits: whether all logits are
        asked for.
    choice: how the next token is chosen, for a backend that chooses; None: the most probable one.
    prompt_logprobs: of decoders, with read: give the log probability of the unread token behind
        each one that it reads, and those of so many most probable ones.
    """

    sequence: int
    read: int = 0
    token_id: int = -1
    want_logits: bool = False
    prompt_logprobs: int | None = None
    choice: Choice | None = None


@dataclass(frozen=True)
class Step:
    """What a step gave, in the order of its parts.

    token_ids: int64 [parts], the most probable next token, or the one that was chosen as the part
        says; -1 where there is more to read first.
    logits: for each part float32 [vocab of its tenant], or None if it was not asked for or there is
        more to read.
    hits, misses: int64 [parts], expert look-ups of this step.
    reconfiguration_s: seconds that making a tenant's non-expert weights the ones in use took, by
        tenant; those in use already are left out.
    prompt_logprobs: of the parts that asked for them, by number: of the tokens behind those that
        the part read, as far as there are any.
    logprobs: of the tokens that the backend chose, by part, where its choice asks for them.
    """

    token_ids: np.ndarray
    logits: list[np.ndarray | None]
    hits: np.ndarray
    misses: np.ndarray
    reconfiguration_s: dict[str, float] = field(default_factory=dict)
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)


Observer = Callable[[str, int, np.ndarray, np.ndarray, np.ndarray], np.ndarray | None]
"""Sees every layer's routing: (tenant, layer, x float32 [T, H], expert_ids int64 [T, K], gates
float32 [T, K]).

x is what the experts read; padding, and tokens that no expert takes, are left out. What it returns,
float32 [T, H], is added to the weighted sum of the experts' outputs.
"""


class Backend(ABC):
    """Turns tokens into logits for the tenants of one store; keeps weights and caches on its
    device.

    Used by one thread at a time. `begin`, `step` and `end` are all that serving needs.
    """

    max_ready_tenants: int
    """How many tenants' non-expert weights fit at once; the parts of a step never name more
    tenants."""

    ready_tenants: Sequence[str] = ()
    """Those whose weights the device has now, least recently used first. Any thread may look."""

    prefetches: bool = False
    """Whether `prefetch` brings weights while a step computes."""

    prefix_block: int | None = None
    """Beginnings of prompts are found in the cache in blocks of so many tokens; None: they are not
    kept."""

    chooses: bool = False
    """Whether `step` chooses tokens on the device where parts say how; else it gives logits, and
    the caller chooses. Both ways give the same tokens, but for float rounding."""

    default_chunk: int
    """Tokens of prompts that a step should read at most while other sequences answer: about what
    doubles its time."""

    @abstractmethod
    def begin(self, row: Row) -> int:
        """A new sequence's number. Computes nothing, and takes no memory but blocks that hold its
        beginning already: see `cached`."""

    def cached(self, sequence: int) -> int:
        """Of a new sequence: how many of its unread tokens were found in the cache, and are read
        therefore.

        They were computed for the same tenant, by the weights and plan of now. There is always one
        more to read.
        """
        return 0

    @abstractmethod
    def step(self, parts: Sequence[Part]) -> Step:
        """Advance these sequences, in one pass through the experts for all of them.

        Each sequence is named once; those of one tenant need not be adjacent. The caller has asked
        `fits`. What a sequence gets does not depend on the others in the step, beyond float
        rounding, nor on how its reading is cut.
        Raises what the framework raises; the sequences of the failed step can then only be ended.
        """

    @abstractmethod
    def end(self, sequences: Iterable[int]) -> None:
        """Forget sequences and free their caches. Numbers that are not known are passed over."""

    @abstractmethod
    def fits(self, parts: Sequence[Part], ahead: int = 0) -> bool:
        """Whether the caches have room for a step of these parts while all other sequences keep
        theirs.

        ahead: so many more tokens for each part's sequence, at most as many as its `max_new_tokens`
            leaves.
        """

    @abstractmethod
    def max_length(self, tenant: str) -> int:
        """Tokens that one sequence of a tenant can hold if it has all the cache, at most its
        context.

        Of a decoder-only family prompt and answer together; of an encoder-decoder family each of
        them.
        """

    def prefetch(self, tenants: Sequence[str]) -> None:  # noqa: B027 (a hint; doing nothing is right)
        """A hint that these tenants come next: bring their non-expert weights where this can
        overlap with a step."""

    @abstractmethod
    def update(self, store: Store) -> None:
        """Go on with a changed store of the same family: tenants added or removed, another plan.

        Called between steps. Weights that both stores have are kept and not read again. Sequences
        go on; of tenants that are gone there must be none. Raises StoreError or EngineError, and
        then nothing has changed.
        """

    @abstractmethod
    def logits(
        self,
        tenant: str,
        rows: Sequence[Sequence[int]],
        decoder_rows: Sequence[Sequence[int]] | None,
    ) -> list[np.ndarray]:
        """float32 [tokens, vocab] for every row, at every position."""

    def start_id(self, name: str) -> int | None:
        """The token that a tenant's answers are decoded from; None where they go on from the
        prompt."""
        return None

    @abstractmethod
    def observe(self, observer: Observer | None) -> None:
        """Show every step's routing to `observer`, after the router and before the experts; None:
        stop.

        For calibration; slower than serving.
        """

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Device, type, bytes held, hits, misses, fetches, reconfigurations; of the caches
        `kv_cache_bytes` (the most they may take) and `kv_cache_used_bytes`."""

    @abstractmethod
    def close(self) -> None:
        """Free the device. Safe to call twice."""

    def start(self, rows: Sequence[Row]) -> Batch:
        """Sequences that are advanced together, all in every step."""
        return Batch(self, rows)


class Batch:
    """Rows that start together and advance together: the simple way to drive a backend, for
    benchmarks and scoring. All of them is computed."""

    def __init__(self, backend: Backend, rows: Sequence[Row]):
        self._backend = backend
        self._rows = [replace(row, cache_prefix=False) for row in rows]
        self._sequences = [backend.begin(row) for row in self._rows]

    def prefill(self, want_logits: bool) -> Step:
        """Read the prompts. Called once, first."""
        return self._backend.step(
            [
                Part(s, read=r.unread, want_logits=want_logits)
                for s, r in zip(self._sequences, self._rows, strict=True)
            ]
        )

    def decode(
        self, token_ids: np.ndarray, want_logits: bool, choice: Choice | None = None
    ) -> Step:
        """Append one token to each row, int64 [rows], and give what comes next.

        choice: how all of them choose it, for a backend that chooses.
        """
        return self._backend.step(
            [
                Part(s, token_id=int(t), want_logits=want_logits, choice=choice)
                for s, t in zip(self._sequences, token_ids, strict=True)
            ]
        )

    def close(self) -> None:
        """Free the caches."""
        self._backend.end(self._sequences)
