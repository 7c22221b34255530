"""Sequences on the device, and steps that advance any set of them.

A sequence reads its prompt (`steps.prefill`). Then it has a row in its tenant's KV cache, and takes
one token a step (`steps.decode`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from common.errors import EngineError
from common.serving.backend import Observer, Part, Row, Step
from jax_engine.devices import Devices
from jax_engine.steps.compilation import CountedJit
from jax_engine.steps.decode import DecoderCall, decode
from jax_engine.steps.kv_cache_manager import KVCacheManager
from jax_engine.steps.prefill import prefill
from jax_engine.steps.sequence import SequenceState, StepContext
from jax_engine.tenants.loaded_store import LoadedStore


class Sequences:
    """All sequences; knows weights only as the `LoadedStore` that is handed in."""

    def __init__(self, devices: Devices, compute: str, jit: CountedJit):
        """compute: type of activations and caches."""
        self._devices = devices
        self.caches = KVCacheManager(devices, compute, jit)
        self._sequences: dict[int, SequenceState] = {}
        self._begun = 0

    def begin(self, row: Row) -> int:
        """See `Backend.begin`."""
        assert row.prompt, "a prompt has at least one token"
        self._begun += 1
        self._sequences[self._begun] = SequenceState(self._begun, row)
        return self._begun

    def end(self, numbers: Iterable[int]) -> None:
        """See `Backend.end`."""
        for number in numbers:
            sequence = self._sequences.pop(number, None)
            if sequence is not None:
                self.caches.remove(sequence)

    def close(self) -> None:
        self.end(list(self._sequences))

    @property
    def tenants(self) -> set[str]:
        """Of all sequences."""
        return {s.row.tenant for s in self._sequences.values()}

    @property
    def used_bytes(self) -> int:
        """Of all caches, and of the encoder's states of prompts half read."""
        states = sum(s.x.nbytes for s in self._sequences.values() if s.x is not None)
        return states + self.caches.used_bytes

    def fits(self, loaded: LoadedStore, parts: Sequence[Part], ahead: int) -> bool:
        """See `Backend.fits`."""
        return self.caches.fits(loaded, self._sequences.values(), parts, ahead)

    def step(self, loaded: LoadedStore, parts: Sequence[Part], observer: Observer | None) -> Step:
        """See `Backend.step`."""
        chosen = [self._sequences[p.sequence] for p in parts]
        for sequence, part in zip(chosen, parts, strict=True):
            left = sequence.row.unread - sequence.read
            if not (0 < part.read <= left if left else part.read == 0 <= part.token_id):
                raise EngineError(f"{part} does not fit a sequence with {left} unread tokens")
            sequence.hits = sequence.misses = 0
        tenants, seconds = loaded.ready.acquire(s.row.tenant for s in chosen)
        context = StepContext(loaded, tenants, observer)
        sizes = self.caches.prepare(loaded, self._sequences.values(), parts)
        reading = [(s, p.read) for s, p in zip(chosen, parts, strict=True) if p.read]
        prompts = prefill(self._devices, context, reading)
        tokens = {p.sequence: p.token_id for p in parts if not p.read}
        calls = decode(self._devices, context, self.caches, sizes, self._sequences, prompts, tokens)
        winners, logits = self._collect(parts, calls)
        hits, misses = (
            np.array([getattr(s, k) for s in chosen], dtype=np.int64) for k in ("hits", "misses")
        )
        loaded.pool.hits += int(hits.sum())
        loaded.pool.misses += int(misses.sum())
        return Step(winners, logits, hits, misses, seconds)

    @staticmethod
    def _collect(
        parts: Sequence[Part], calls: Iterable[DecoderCall]
    ) -> tuple[np.ndarray, list[np.ndarray | None]]:
        """The winner of each part, int64 [parts], and the logits that are wanted."""
        winners = np.full(len(parts), -1, dtype=np.int64)
        logits: list[np.ndarray | None] = [None] * len(parts)
        for call in calls:
            found, width = np.asarray(call.found[0]), call.tenant.config.vocab_size
            for i, part in enumerate(parts):
                row = call.rows.get(part.sequence)
                if row is None:
                    continue
                winners[i] = found[row]
                if part.want_logits:
                    logits[i] = np.array(np.asarray(call.found[1])[row, :width], dtype=np.float32)
        return winners, logits
