"""The backend that `Engine` drives: a pool, ready tenants, and batches with their
caches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import CheckpointError, EngineError, StoreError
from common.families import Decoder
from common.serving.backend import Backend, Observer, Part, Row, Step
from common.store import Store
from torch_engine import native
from torch_engine.decode.step import ROWS, DecodeSteps, why_not
from torch_engine.device import (
    choose_products,
    find_device,
    find_dtype,
    prepare,
    products_name,
    ready_that_fit,
)
from torch_engine.experts.grouped_pool import GroupedPool
from torch_engine.experts.grouped_product import grouped_mm_fits
from torch_engine.experts.kernel_pool import KernelPool
from torch_engine.experts.loop_pool import LoopPool
from torch_engine.experts.pool import ExpertPool
from torch_engine.layers.cache import BLOCK, Arena, make_arena, token_width
from torch_engine.models.decoder import check, forward, heads
from torch_engine.options import TorchOptions
from torch_engine.products import PlainWeight, Weight, pack_native
from torch_engine.sequences import CachedSequence, whole_prompts
from torch_engine.steps import PendingStep, Results, compute, decode_rows
from torch_engine.tenants.by_copy import TenantsByCopy
from torch_engine.tenants.in_place import TenantsInPlace
from torch_engine.tenants.ready import ReadyTenants
from torch_engine.tenants.weights import shape_of

# Tokens that `logits` computes at once: bounds its activations.
LOGITS_TOKENS = 4096

LOG = logging.getLogger(__name__)


def load_backend(
    store: Store, device: str = "auto", dtype: str = "auto", **options: Any
) -> Backend:
    """Load a store's pool and tenants onto a device.

    Args:
        options: the fields of `TorchOptions`.

    Raises:
        EngineError: an option is unknown or out of its bound, or the engine cannot serve the store.
    """
    return TorchBackend(store, TorchOptions.make(device=device, dtype=dtype, **options))


class TorchBackend(Backend):
    """Decoders on one device."""

    def __init__(self, store: Store, options: TorchOptions):
        self._shapes(store)
        self.store = store
        self.device = find_device(options.device)
        prepare(self.device)
        self.dtype = find_dtype(options.dtype, store, self.device)
        self.products = choose_products(options.products, self.dtype, self.device)
        kernels = native.load(self.dtype) if self.products == "native" else None
        product: Callable[[Tensor], Weight] = pack_native if kernels else PlainWeight
        self.experts = self._expert_implementation(options)
        try:
            self.pool: ExpertPool
            if self.experts == "grouped":
                self.pool = GroupedPool(store, self.dtype, self.device, options.spare_slots)
            elif kernels is not None:
                self.pool = KernelPool(store, self.dtype, options.spare_slots, kernels)
            else:
                self.pool = LoopPool(store, self.dtype, self.device, options.spare_slots)
            self._most_ready = options.ready_tenants or ready_that_fit(
                self._shapes(store), self.dtype, self.device
            )
            self.max_ready_tenants = self._max_ready(store)
            self.ready: ReadyTenants
            if self.device.type == "cpu":
                self.ready = TenantsInPlace(store, self.dtype, self.max_ready_tenants, product)
            else:
                self.ready = TenantsByCopy(store, self.dtype, self.device, self.max_ready_tenants)
        except CheckpointError as error:
            raise StoreError(f"{error}; run `moetel verify {store.path}`") from error
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"the device is too small for this store ({store.plan.num_slots} resident copies "
                "of "
                f"{store.copy_bytes} bytes); build it with a smaller --budget or fewer --slots"
            ) from error
        self.observer: Observer | None = None
        self.default_chunk = 128 if self.device.type == "cpu" else 1024
        self.prefetches = self.device.type == "cuda"
        self.chooses = self.device.type == "cuda"  # logits of many rows are megabytes
        try:
            self.cache = make_arena(self._shapes(store), options, self.dtype, self.device)
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"{self.device} has no room for keys and values ({error}); give a smaller "
                "kv_cache_bytes, fewer ready_tenants, or build the store with a smaller --budget"
            ) from error
        self._sequences: dict[int, CachedSequence] = {}
        self._numbers = 0
        self._wanted_decode = options.decode
        self._decode = self._make_decode()

    def _make_decode(self) -> DecodeSteps | None:
        """What computes decode steps apart from prompts; None: nothing does."""
        wanted = self._wanted_decode
        if wanted == "eager" or (wanted == "auto" and self.device.type != "cuda"):
            return None
        reason = why_not(self.device, self.pool)
        if reason is None and isinstance(self.pool, GroupedPool):
            shapes = dict(zip(self.store.tenants, self._shapes(self.store), strict=True))
            return DecodeSteps(self.pool, self.cache, shapes)
        if wanted == "graph":
            raise EngineError(f"decode='graph' does not work here: {reason}; use auto or eager")
        return None

    def _max_ready(self, store: Store) -> int:
        return min(len(store.tenants), self._most_ready or len(store.tenants))

    @staticmethod
    def _shapes(store: Store) -> list[Decoder]:
        shapes = [shape_of(store, name) for name in store.tenants]
        for shape, name in zip(shapes, store.tenants, strict=True):
            check(shape, name)
        return shapes

    def _expert_implementation(self, options: TorchOptions) -> str:
        spec = self.store.experts
        fits = grouped_mm_fits(spec.hidden_size, spec.intermediate_size, self.dtype, self.device)
        if options.experts == "grouped" and not fits:
            raise EngineError(
                f"experts='grouped' does not take {self.dtype} with sizes {spec.hidden_size} and "
                f"{spec.intermediate_size} on {self.device}; use auto or loop"
            )
        if options.experts != "auto":
            return options.experts
        return "grouped" if self.device.type == "cuda" and fits else "loop"

    def begin(self, row: Row) -> int:
        self._numbers += 1
        if self.prefetches:
            self.pool.expect(self.store.tenants.index(row.tenant))
        sequence = CachedSequence.of(row)
        if row.cache_prefix and self.observer is None:
            sequence.find(self.cache, row.cache_salt)
        self._sequences[self._numbers] = sequence
        return self._numbers

    @property
    def prefix_block(self) -> int | None:  # type: ignore[override]
        # What an observer adds to layers is in the keys and values behind them.
        enabled = self.cache.pool.enable_prefix_caching and self.observer is None
        return BLOCK if enabled else None

    def cached(self, sequence: int) -> int:
        return self._sequences[sequence].length

    def end(self, sequences: Iterable[int]) -> None:
        for number in sequences:
            found = self._sequences.pop(number, None)
            if found is not None:
                self.cache.release(found.blocks)

    def fits(self, parts: Sequence[Part], ahead: int = 0) -> bool:
        needed = 0
        for part in parts:
            sequence = self._sequences[part.sequence]
            length = sequence.length + (part.read or 1)
            needed += Arena.needed(
                sequence.blocks, max(length, min(length + ahead, sequence.limit))
            )
        return needed <= self.cache.pool.free

    def max_length(self, tenant: str) -> int:
        config = self.store.config(tenant)
        return min(config.max_positions, self.cache.num_blocks * BLOCK)

    def prefetch(self, tenants: Sequence[str]) -> None:
        self.ready.prefetch(tenants)
        for name in tenants:
            self.pool.expect(self.store.tenants.index(name))

    def update(self, store: Store) -> None:
        if store.family.name != self.store.family.name or store.experts != self.store.experts:
            raise EngineError(
                f"{store.path}: its experts have other shapes than those in use; load it as an "
                "engine"
            )
        for name, shape in zip(store.tenants, self._shapes(store), strict=True):
            if token_width(shape) > self.cache.keys[0].shape[1]:
                raise EngineError(
                    f"tenant {name!r} has keys of {token_width(shape)} numbers a token, the "
                    "caches of this engine "
                    f"have room for {self.cache.keys[0].shape[1]}; load the engine again with this "
                    "tenant in the store"
                )
        capacity = self._max_ready(store)
        try:
            # Tenants first: what fails there has changed nothing, and a pool alone would name
            # tenants not ready.
            old, old_capacity = self.store, self.max_ready_tenants
            self.ready.update(store, capacity)
            try:
                self.pool.update(store)
            except Exception:
                self.ready.update(old, old_capacity)
                raise
        except CheckpointError as error:
            raise StoreError(f"{error}; run `moetel verify {store.path}`") from error
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"the device has no room for the changed store at {store.path} ({error})"
            ) from error
        self.store, self.max_ready_tenants = store, capacity
        self.cache.pool.forget()  # tenants of these names may compute something else now
        self._decode = self._make_decode()

    @torch.inference_mode()
    def step(self, parts: Sequence[Part]) -> Step:
        sequences = [self._sequences[part.sequence] for part in parts]
        tenants = [sequence.tenant for sequence in sequences]
        made = Results.of(len(parts))
        step = PendingStep(parts, sequences, self.ready.acquire(tenants), made)
        spec = self.store.experts
        lookups = spec.num_layers * spec.top_k
        graphed = self._graphed(parts, tenants)
        if graphed and self._decode is not None:
            decode_rows(step, graphed, self._decode, self.cache)
            self.pool.counts.hits += len(graphed) * lookups
        rest = sorted(set(range(len(parts))) - set(graphed))
        if rest:
            compute(step, rest, self.pool, self.cache, self.observer)
        for sequence in sequences:
            if self.observer is not None:
                sequence.prefix = None
            sequence.keep(self.cache)
        counts = np.array([part.read or 1 for part in parts], dtype=np.int64)
        if self.device.type == "cuda" and not made.waited:
            torch.cuda.current_stream(
                self.device
            ).synchronize()  # so that times are those of this step
        return made.step(counts * lookups, self.ready.seconds())

    def _graphed(self, parts: Sequence[Part], tenants: Sequence[str]) -> list[int]:
        """The parts that `DecodeSteps` computes, those of a tenant together."""
        if self._decode is None or self.observer is not None:
            return []
        found = [
            i
            for i, (part, name) in enumerate(zip(parts, tenants, strict=True))
            if not part.read and name in self._decode.tenants
        ]
        if len(found) > ROWS[-1]:
            return []
        return sorted(found, key=lambda i: tenants[i])

    @torch.inference_mode()
    def logits(
        self,
        tenant: str,
        rows: Sequence[Sequence[int]],
        decoder_rows: Sequence[Sequence[int]] | None,
    ) -> list[np.ndarray]:
        assert decoder_rows is None
        found: list[np.ndarray] = []
        start = 0
        while start < len(rows):
            stop, tokens = start, 0
            while stop < len(rows) and (stop == start or tokens + len(rows[stop]) <= LOGITS_TOKENS):
                tokens += len(rows[stop])
                stop += 1
            index, weights = self.store.tenants.index(tenant), self.ready.acquire([tenant])[tenant]
            segment = whole_prompts(index, weights, rows[start:stop], self.device)
            hidden, _ = forward([segment], self.pool, None, self.observer)
            values = heads([segment], [hidden])[0].cpu().numpy()
            found += np.split(values, [chunk.stop for chunk in segment.chunks[:-1]])
            start = stop
        return found

    def observe(self, observer: Observer | None) -> None:
        self.observer = observer

    @property
    def ready_tenants(self) -> list[str]:  # type: ignore[override]
        return self.ready.ready

    def stats(self) -> dict[str, Any]:
        counts = self.pool.counts
        return {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "experts": self.experts,
            "products": products_name(self.products, self.dtype),
            "decode_graph_steps": self._decode.count if self._decode is not None else 0,
            "pool_slots": self.store.plan.num_slots,
            "pool_bytes": self.pool.device_bytes,
            "residual_bytes": self.pool.residual_bytes,
            "spare_slots": self.pool.spare_slots,
            "spare_filled": self.pool.spare_filled,
            "non_expert_bytes": self.ready.device_bytes,
            "hits": counts.hits,
            "misses": counts.misses,
            "fetches": counts.fetches,
            "prefetches": counts.prefetches,
            "fetched_bytes": counts.fetched_bytes,
            "reconfigurations": self.ready.switches,
            "reconfigured_bytes": self.ready.copied_bytes,
            "ready_tenants": self.ready_tenants,
            "kv_cache_bytes": self.cache.nbytes,
            "kv_cache_used_bytes": self.cache.used_bytes,
            "kv_cache_cached_bytes": self.cache.cached_bytes,
        }

    def close(self) -> None:
        self.pool.close()
        self.ready.close()
        self.cache.close()
        self._sequences.clear()
        self._decode = None
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except RuntimeError as error:
                # A failed launch is reported by every later call; it was told when it came.
                LOG.warning("%s could not be emptied: %s", self.device, error)
