"""The memory of all tenants' KV caches: what a step needs of it, and whether that is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from common.dtypes import BY_NAME
from common.families import EncoderDecoder
from common.serving.backend import Part
from jax_engine.devices import Devices
from jax_engine.steps.buckets import cache_bucket, prompt_bucket
from jax_engine.steps.compilation import CountedJit
from jax_engine.steps.kv_cache import CacheCalls, CacheLayout, CacheSize, TenantKVCache
from jax_engine.steps.sequence import PromptBatch, SequenceState
from jax_engine.tenants.loaded_store import LoadedStore


class KVCacheManager:
    """A `TenantKVCache` for each tenant that has sequences.

    budget_bytes: most that all may take, with the encoder's states of prompts half read; set by the
        caller.
    """

    def __init__(self, devices: Devices, compute: str, jit: CountedJit):
        """compute: type of activations and caches."""
        self._devices, self._compute = devices, compute
        self._calls = CacheCalls(jit, devices.by_row)
        self.budget_bytes = 0
        self.caches: dict[str, TenantKVCache] = {}

    # Sizes.

    def _layout(self, shape: EncoderDecoder) -> CacheLayout:
        a = shape.attention
        return CacheLayout(len(shape.decoder), a.kv_heads, a.head_dim, self._compute)

    def _state_bytes(self, shape: EncoderDecoder, prompt: int) -> int:
        """Of the encoder's states of one prompt."""
        numbers = self._devices.rows(1) * prompt_bucket(prompt) * shape.hidden
        return int(numbers * BY_NAME[self._compute].itemsize)

    def alone_bytes(self, shape: EncoderDecoder, length: int) -> int:
        """What a sequence takes whose prompt and answer have so many tokens, if there is no
        other."""
        size = CacheSize(self._devices.rows(1), cache_bucket(length), prompt_bucket(length))
        return self._layout(shape).nbytes(size) + self._state_bytes(shape, length)

    def max_length(self, shape: EncoderDecoder) -> int:
        """Tokens of prompt and of answer that a sequence can have that has all the memory, at most
        its context."""
        longest, length = 0, 1
        while (
            longest < shape.max_positions and self.alone_bytes(shape, length) <= self.budget_bytes
        ):
            longest = prompt_bucket(length)
            length = longest + 1
        return min(longest, shape.max_positions)

    @property
    def used_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches.values())

    # What a step needs.

    def _needs(
        self,
        loaded: LoadedStore,
        sequences: Iterable[SequenceState],
        parts: Sequence[Part],
        ahead: int = 0,
    ) -> tuple[dict[str, CacheSize], int]:
        """After a step of these parts: the least size of each tenant's cache, and bytes of states
        of prompts half read."""
        part_of = {p.sequence: p for p in parts}
        found: dict[str, tuple[int, int, int]] = {}
        states = 0
        for sequence in sequences:
            part, row = part_of.get(sequence.number), sequence.row
            if sequence.is_cached:
                cached = self.caches[row.tenant].length_of(sequence.number)
                length = cached + (part is not None)
            elif part is not None and sequence.read + part.read >= row.unread:
                length = 1 + len(row.answer)
            else:
                if part is not None or sequence.x is not None:
                    states += self._state_bytes(loaded.shape(row.tenant), len(row.prompt))
                continue
            if part is not None:
                length = max(length, min(length + ahead, row.max_new_tokens))
            rows, answer, prompt = found.get(row.tenant, (0, 0, 0))
            found[row.tenant] = (rows + 1, max(answer, length), max(prompt, len(row.prompt)))
        sizes = {
            name: CacheSize(self._devices.rows(rows), cache_bucket(answer), prompt_bucket(prompt))
            for name, (rows, answer, prompt) in found.items()
        }
        return sizes, states

    def _bytes(self, loaded: LoadedStore, sizes: Mapping[str, CacheSize]) -> int:
        return sum(self._layout(loaded.shape(name)).nbytes(size) for name, size in sizes.items())

    def fits(
        self,
        loaded: LoadedStore,
        sequences: Iterable[SequenceState],
        parts: Sequence[Part],
        ahead: int,
    ) -> bool:
        """See `Backend.fits`."""
        sizes, states = self._needs(loaded, sequences, parts, ahead)
        return states + self._bytes(loaded, sizes) <= self.budget_bytes

    def prepare(
        self, loaded: LoadedStore, sequences: Iterable[SequenceState], parts: Sequence[Part]
    ) -> dict[str, CacheSize]:
        """The size of each tenant's cache in a step. Those that are there get it now, smaller ones
        first."""
        needed, states = self._needs(loaded, sequences, parts)
        # A step that failed may have left a cache that nothing is in.
        self.caches = {name: cache for name, cache in self.caches.items() if name in needed}
        sizes = needed | {
            name: cache.next_size(needed[name]) for name, cache in self.caches.items()
        }
        if states + self._bytes(loaded, sizes) > self.budget_bytes:
            sizes = needed
        for name, cache in sorted(
            self.caches.items(), key=lambda item: item[1].layout.nbytes(sizes[item[0]])
        ):
            cache.resize(sizes[name])
        return sizes

    # Sequences.

    def add(self, batch: PromptBatch, shape: EncoderDecoder, size: CacheSize) -> np.ndarray:
        """Give prompts that are read rows in their tenant's cache: int32 [sequences]."""
        name = batch.tenant.name
        if name not in self.caches:
            self.caches[name] = TenantKVCache(self._layout(shape), self._calls)
        cache = self.caches[name]
        prompt = batch.encoded[0][0].shape[2]
        own = cache.is_empty and (batch.rows, prompt) == (size.rows, size.prompt)
        if own:
            cache.adopt(batch.encoded, size.answer)
        else:
            cache.resize(size)
        rows = cache.add([s.number for s in batch.sequences], batch.prompt_lengths)
        for sequence in batch.sequences:
            sequence.is_cached = True
        if not own:
            cache.write("encoded", batch.encoded, rows)
        return rows

    def remove(self, sequence: SequenceState) -> None:
        """Free the row of a sequence that ends."""
        name = sequence.row.tenant
        if name in self.caches:
            self.caches[name].remove(sequence.number)
            if self.caches[name].is_empty:
                del self.caches[name]
