"""A backend that computes nothing: a sequence's next token is a hash of its tenant and all its
tokens.

So a token that ever reaches another sequence, is lost, or is read twice, changes the answer. It
keeps to the contract of `common.serving.backend` and fails where its caller does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoints.generation_config import GenerationConfig
from common.errors import EngineError
from common.families.family import ExpertSpec
from common.serving.backend import Backend, Observer, Part, Row, Step
from common.serving.block_pool import BlockPool, Prefix
from common.serving.engine import Engine
from common.serving.prompt_logprobs import PromptLogprobs
from common.serving.scheduler_options import SchedulerOptions
from common.store import Store

VOCAB = 97
EOS = 0

# One layer. What its experts give for a token are the logits behind it.
EXPERTS = ExpertSpec("fake", ("layer",), 8, VOCAB, 1, "identity", 1, ())


def next_token(tenant: str, tokens: Sequence[int]) -> int:
    """What follows these tokens."""
    digest = hashlib.sha256(repr((tenant, list(tokens))).encode()).digest()
    return int.from_bytes(digest[:4], "little") % VOCAB


def answer(tenant: str, prompt: Sequence[int], count: int, ignore_eos: bool = False) -> list[int]:
    """The tokens of a whole answer."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tenant, tokens))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]


def _logits(tenant: str, tokens: Sequence[int], count: int) -> np.ndarray:
    """Behind each of the last `count` tokens: float32 [count, vocab]."""
    found = np.full((count, VOCAB), -9.0, dtype=np.float32)
    for i in range(count):
        found[i, next_token(tenant, tokens[: len(tokens) - count + 1 + i])] = 9.0
    return found


@dataclass
class _Sequence:
    """tokens: all that it has and is to read; `length` of them are in the cache, in these blocks.

    begun: how many updates there were when it began.
    """

    row: Row
    tokens: list[int]
    begun: int
    prefix: Prefix | None
    length: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def unread(self) -> int:
        return self.row.unread - self.length


class FakeBackend(Backend):
    """Room for `room` tokens in blocks of `block`; tenants in use at once: `ready`.

    What a sequence has read stands in its blocks, with who computed it and when. So one that reads
    on in a block of another tenant, or of before an update, answers otherwise.
    """

    default_chunk = 8

    def __init__(
        self,
        tenants: Sequence[str],
        room: int = 10**6,
        block: int = 4,
        ready: int | None = None,
        enable_prefix_caching: bool = True,
    ):
        self.tenants = list(tenants)
        self.room, self.block = room, block
        self._wanted_ready = ready
        self.max_ready_tenants = ready or len(self.tenants)
        self._observer: Observer | None = None
        self._numbers = self._updates = 0
        self._sequences: dict[int, _Sequence] = {}
        self.pool = BlockPool(room // block, block, enable_prefix_caching)
        self._written: dict[int, list[tuple[str, int, int]]] = {}
        self.steps: list[list[tuple[str, Part]]] = []
        self._ready: list[str] = []
        self.hits = self.reconfigurations = 0
        self.prefetched: list[str] = []

    def begin(self, row: Row) -> int:
        self._numbers += 1
        prefix = None
        if row.cache_prefix and self._observer is None:
            prefix = self.pool.prefix(row.tenant, row.cache_salt)
        found = _Sequence(row, [*row.prompt, *row.answer], self._updates, prefix)
        if prefix is not None:
            found.blocks = self.pool.find(prefix, found.tokens[:-1])
            found.length = len(found.blocks) * self.block
        self._sequences[self._numbers] = found
        return self._numbers

    @property
    def prefix_block(self) -> int | None:  # type: ignore[override]
        enabled = self.pool.enable_prefix_caching and self._observer is None
        return self.block if enabled else None

    def cached(self, sequence: int) -> int:
        return self._sequences[sequence].length

    def end(self, sequences: Iterable[int]) -> None:
        for number in sequences:
            found = self._sequences.pop(number, None)
            if found is not None:
                self.pool.release(found.blocks)

    def _blocks(self, length: int) -> int:
        return -(-length // self.block)

    @property
    def used(self) -> int:
        """Blocks that sequences have."""
        return self.pool.num_blocks - self.pool.free

    def fits(self, parts: Sequence[Part], ahead: int = 0) -> bool:
        more = 0
        for part in parts:
            found = self._sequences[part.sequence]
            length = found.length + (part.read or 1)
            limit = len(found.row.prompt) + found.row.max_new_tokens
            more += self._blocks(max(length, min(length + ahead, limit))) - len(found.blocks)
        return more <= self.pool.free

    def max_length(self, tenant: str) -> int:
        return self.room // self.block * self.block

    def step(self, parts: Sequence[Part]) -> Step:
        assert parts, "an empty step"
        assert len({p.sequence for p in parts}) == len(parts), "a sequence is named twice"
        assert self.fits(parts), "the caller did not ask whether the step fits"
        names = {self._sequences[p.sequence].row.tenant for p in parts}
        assert len(names) <= self.max_ready_tenants, "more tenants than are ready at once"
        switched = names - set(self._ready)
        self.reconfigurations += len(switched)
        self._ready = [*(n for n in self._ready if n not in names), *sorted(names)][
            -self.max_ready_tenants :
        ]
        new = [self._advance(part) for part in parts]
        added = self._show(parts, new)
        token_ids = np.full(len(parts), -1, dtype=np.int64)
        logits: list[np.ndarray | None] = [None] * len(parts)
        scores: dict[int, PromptLogprobs] = {}
        for i, part in enumerate(parts):
            found = self._sequences[part.sequence]
            self._keep(found)
            if part.prompt_logprobs is not None:
                scores[i] = self._score(found, part.read, part.prompt_logprobs)
            if found.unread > 0:
                continue
            tokens = self._read(found)
            token_ids[i] = next_token(found.row.tenant, tokens)
            if part.want_logits or i in added:
                values = _logits(found.row.tenant, tokens, 1)[0] + added.get(i, np.float32(0))
                token_ids[i] = values.argmax()
                logits[i] = values if part.want_logits else None
        self.steps.append([(self._sequences[p.sequence].row.tenant, p) for p in parts])
        hits = np.array([len(ids) for ids in new], dtype=np.int64)
        self.hits += int(hits.sum())
        seconds = dict.fromkeys(switched, 0.01)
        return Step(token_ids, logits, hits, np.zeros_like(hits), seconds, scores)

    def _score(self, found: _Sequence, read: int, top: int) -> PromptLogprobs:
        """What the tokens behind the last ones that were read are given."""
        targets = found.tokens[found.length - read + 1 : found.length + 1]
        values = _logits(found.row.tenant, self._read(found), read)
        return PromptLogprobs.of(values[: len(targets)], targets, top)

    def _advance(self, part: Part) -> list[int]:
        """Take a part's tokens into its sequence's blocks, and give them."""
        found = self._sequences[part.sequence]
        if part.read:
            assert 0 < part.read <= found.unread, "more is read than there is"
        else:
            assert found.unread <= 0 <= part.token_id, "a token is appended before all was read"
            found.tokens.append(part.token_id)
        new = found.tokens[found.length : found.length + (part.read or 1)]
        for token in new:
            if found.length == len(found.blocks) * self.block:
                found.blocks.append(self.pool.take())
                self._written[found.blocks[-1]] = []
            self._written[found.blocks[-1]].append((found.row.tenant, self._updates, token))
            found.length += 1
        return new

    def _keep(self, found: _Sequence) -> None:
        if self._observer is not None:
            found.prefix = None
        if found.prefix is not None:
            self.pool.keep(found.prefix, found.tokens, found.length, found.blocks)

    def _read(self, found: _Sequence) -> list[Any]:
        """The tokens in a sequence's blocks; what it should not have found there is no token."""
        written = [each for block in found.blocks for each in self._written[block]]
        return [
            token if tenant == found.row.tenant and at >= found.begun else (tenant, at, token)
            for tenant, at, token in written
        ]

    def _show(self, parts: Sequence[Part], new: Sequence[Sequence[int]]) -> dict[int, np.ndarray]:
        """Show the parts' new tokens to the observer: what it adds behind the last one of each,
        by part."""
        found: dict[int, np.ndarray] = {}
        if self._observer is None:
            return found
        by_tenant: dict[str, list[int]] = {}
        for i, part in enumerate(parts):
            by_tenant.setdefault(self._sequences[part.sequence].row.tenant, []).append(i)
        for tenant, mine in by_tenant.items():
            ids = np.array([token for i in mine for token in new[i]], dtype=np.int64)
            x, gates = np.eye(VOCAB, dtype=np.float32)[ids], np.ones((len(ids), 1), np.float32)
            more = self._observer(tenant, 0, x, ids[:, None] % EXPERTS.num_experts, gates)
            if more is not None:
                lasts = np.cumsum([len(new[i]) for i in mine]) - 1
                found |= {i: more[last] for i, last in zip(mine, lasts, strict=True)}
        return found

    def prefetch(self, tenants: Sequence[str]) -> None:
        self.prefetched += tenants

    def update(self, store: Store) -> None:
        if store.experts != EXPERTS:
            raise EngineError("its experts have other shapes than those in use")
        self.tenants = list(store.tenants)
        self.max_ready_tenants = self._wanted_ready or len(self.tenants)
        self._ready = [name for name in self._ready if name in self.tenants]
        self._updates += 1
        self.pool.forget()

    def logits(
        self,
        tenant: str,
        rows: Sequence[Sequence[int]],
        decoder_rows: Sequence[Sequence[int]] | None,
    ) -> list[np.ndarray]:
        assert decoder_rows is None
        return [_logits(tenant, row, len(row)) for row in rows]

    def observe(self, observer: Observer | None) -> None:
        self._observer = observer

    @property
    def ready_tenants(self) -> list[str]:  # type: ignore[override]
        return list(self._ready)

    def stats(self) -> dict[str, Any]:
        return {
            "device": "none",
            "dtype": "float32",
            "pool_bytes": 0,
            "residual_bytes": 0,
            "non_expert_bytes": 0,
            "hits": self.hits,
            "misses": 0,
            "fetches": 0,
            "reconfigurations": self.reconfigurations,
            "ready_tenants": self.ready_tenants,
            "kv_cache_bytes": self.room,
            "kv_cache_used_bytes": self.used * self.block,
            "kv_cache_cached_bytes": self.pool.cached * self.block,
        }

    def close(self) -> None:
        self.end(list(self._sequences))


class _Config:
    vocab_size = VOCAB
    is_encoder_decoder = False

    def __init__(self, max_positions: int):
        self.max_positions = max_positions


class FakeStore:
    """As much of a store as the engine asks for."""

    def __init__(
        self, tenants: Sequence[str], max_positions: int = 10**6, experts: ExpertSpec = EXPERTS
    ):
        self.tenants, self.experts = tuple(tenants), experts
        self._config = _Config(max_positions)

    def departed(self, later: FakeStore) -> set[str]:
        return set(self.tenants) - set(later.tenants)

    def config(self, tenant: str) -> Any:
        assert tenant in self.tenants
        return self._config

    def assets_dir(self, tenant: str) -> Path:
        return Path("/nonexistent")

    def generation(self, tenant: str) -> GenerationConfig:
        return GenerationConfig(eos_token_ids=(EOS,))


def fake_engine(
    tenants: Sequence[str], options: SchedulerOptions | None = None, **backend: Any
) -> tuple[Engine, FakeBackend]:
    """An engine over a `FakeBackend`, whose tenants have an end-of-sequence token and no
    tokenizer."""
    made = FakeBackend(tenants, **backend)
    store: Any = FakeStore(tenants)
    return Engine(store, made, options), made
