"""The backend that `common.engine.Engine` drives: a pool, ready tenants, and batches with their caches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.engine import Backend, Observer, Row, Step
from common.errors import CheckpointError, EngineError, StoreError
from common.families import MixtralConfig
from common.store import Store
from torch_engine import native
from torch_engine.cache import KeyValueCache
from torch_engine.model import Segment, forward, head
from torch_engine.non_expert import ReadyTenants, TenantsByCopy, TenantsInPlace
from torch_engine.options import TorchOptions
from torch_engine.pool import ExpertPool, GroupedPool, LoopPool, grouped_mm_fits
from torch_engine.products import Weight, can_pack, pack, pack_native

# Tokens that `logits` computes at once: bounds its activations.
LOGITS_TOKENS = 4096


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise EngineError(f"device {name!r} is not there; torch sees {torch.cuda.device_count()} CUDA devices, use cpu")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _dtype(wanted: str, store: Store, device: torch.device) -> torch.dtype:
    name = store.dtype if wanted == "auto" else wanted
    if name == "float16" and device.type == "cpu":
        if wanted != "auto":
            raise EngineError(
                "float16 is not computed on a CPU; use float32 (which holds every float16 value) or bfloat16"
            )
        name = "float32"
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


class TorchBackend(Backend):
    """Mixtral on one device."""

    def __init__(self, store: Store, options: TorchOptions):
        self.store = store
        self.device = _device(options.device)
        self.dtype = _dtype(options.dtype, store, self.device)
        self.products = _choose_products(options.products, self.dtype, self.device)
        product = {"native": pack_native, "packed": pack, "plain": _plain}[self.products]
        self.experts = self._expert_implementation(options)
        try:
            self.pool: ExpertPool
            if self.experts == "grouped":
                self.pool = GroupedPool(store, self.dtype, self.device, options.spare_slots)
            else:
                self.pool = LoopPool(store, self.dtype, self.device, options.spare_slots, product)
            num_tenants = len(store.tenants)
            default = num_tenants if self.device.type == "cpu" else min(2, num_tenants)
            self.max_ready_tenants = min(num_tenants, options.ready_tenants or default)
            self.ready: ReadyTenants
            if self.device.type == "cpu":
                self.ready = TenantsInPlace(store, self.dtype, self.max_ready_tenants, product)
            else:
                self.ready = TenantsByCopy(store, self.dtype, self.device, self.max_ready_tenants)
        except CheckpointError as error:
            raise StoreError(f"{error}; run `moetel verify {store.path}`") from error
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"the device is too small for this store ({store.plan.num_slots} resident copies of "
                f"{store.copy_bytes} bytes); build it with a smaller --budget or fewer --slots"
            ) from error
        self._batches: list[TorchBatch] = []
        self.observer: Observer | None = None

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

    def start(self, rows: Sequence[Row]) -> TorchBatch:
        return TorchBatch(self, rows)

    @torch.inference_mode()
    def logits(
        self, tenant: str, rows: Sequence[Sequence[int]], decoder_rows: Sequence[Sequence[int]] | None
    ) -> list[np.ndarray]:
        assert decoder_rows is None
        found: list[np.ndarray] = []
        start = 0
        while start < len(rows):
            stop, longest = start, 0
            while stop < len(rows):
                longest = max(longest, len(rows[stop]))
                if stop > start and longest * (stop + 1 - start) > LOGITS_TOKENS:
                    break
                stop += 1
            batch = TorchBatch(self, [Row(tenant, tuple(r), 1) for r in rows[start:stop]])
            segment, hidden = batch.read_prompts()
            values = head(segment, hidden).cpu().numpy()
            ends = np.cumsum(segment.lengths)[:-1]
            found += np.split(values, ends)
            start = stop
        return found

    def observe(self, observer: Observer | None) -> None:
        self.observer = observer

    def stats(self) -> dict[str, Any]:
        counts = self.pool.counts
        return {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "experts": self.experts,
            "products": self.products,
            "pool_slots": self.store.plan.num_slots,
            "pool_bytes": self.pool.device_bytes,
            "residual_bytes": self.pool.residual_bytes,
            "spare_slots": self.pool.spare_slots,
            "spare_filled": self.pool.spare_filled,
            "non_expert_bytes": self.ready.device_bytes,
            "hits": counts.hits,
            "misses": counts.misses,
            "fetches": counts.fetches,
            "fetched_bytes": counts.fetched_bytes,
            "reconfigurations": self.ready.switches,
            "reconfigured_bytes": self.ready.copied_bytes,
            "ready_tenants": self.ready.ready,
        }

    def close(self) -> None:
        self.pool.close()
        self.ready.close()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()


def _choose_products(wanted: str, dtype: torch.dtype, device: torch.device) -> str:
    """The first of native, packed and plain that works for this type on this device, if none is asked for."""
    works = ["plain"]
    if device.type == "cpu" and can_pack(dtype):
        works.insert(0, "packed")
        if native.load(dtype) is not None:
            works.insert(0, "native")
    if wanted not in ("auto", *works):
        raise EngineError(f"products={wanted!r} does not work for {dtype} on {device} here; use auto or {works[0]}")
    return works[0] if wanted == "auto" else wanted


def _plain(weight: Tensor) -> Weight:
    return weight


class _TenantRows:
    """The rows of one tenant in a batch."""

    def __init__(self, name: str, index: int, rows: Sequence[Row]):
        self.name, self.index = name, index
        self.prompts = [r.prompt for r in rows]
        self.lengths = np.array([len(r.prompt) for r in rows], dtype=np.int64)
        self.cache: KeyValueCache | None = None


class TorchBatch:
    """Rows that are decoded together, grouped by tenant."""

    def __init__(self, backend: TorchBackend, rows: Sequence[Row]):
        self._backend = backend
        self.reconfiguration_s: dict[str, float] = {}
        self._tenants = [
            _TenantRows(name, backend.store.tenants.index(name), list(group))
            for name, group in groupby(rows, key=lambda r: r.tenant)
        ]
        names = [t.name for t in self._tenants]
        if len(set(names)) != len(names):
            raise AssertionError("rows of one tenant must be adjacent")
        self._weights = backend.ready.acquire(names)
        for tenant in self._tenants:
            config = self._config(tenant)
            # Room for a few answers' worth; the cache grows if more comes.
            asked = min(config.max_positions, int(tenant.lengths.max()) + KeyValueCache.STEP)
            tenant.cache = KeyValueCache(config, len(tenant.lengths), asked, backend.dtype, backend.device)

    def _config(self, tenant: _TenantRows) -> MixtralConfig:
        return self._weights[tenant.name].config

    def _segment(
        self, tenant: _TenantRows, start: int, ids: np.ndarray, positions: np.ndarray, rows: np.ndarray, prefill: bool
    ) -> Segment:
        assert tenant.cache is not None
        device = self._backend.device
        return Segment(
            tenant_index=tenant.index,
            weights=self._weights[tenant.name],
            cache=tenant.cache,
            start=start,
            stop=start + len(ids),
            token_ids=torch.from_numpy(ids).to(device),
            positions=torch.from_numpy(positions).to(device),
            rows=torch.from_numpy(rows).to(device),
            lengths=tenant.lengths,
            prefill=prefill,
        )

    def _prompt_segments(self) -> list[Segment]:
        segments, start = [], 0
        for tenant in self._tenants:
            ids = np.concatenate([np.array(p, dtype=np.int64) for p in tenant.prompts])
            positions = np.concatenate([np.arange(n, dtype=np.int64) for n in tenant.lengths])
            rows = np.repeat(np.arange(len(tenant.lengths), dtype=np.int64), tenant.lengths)
            segments.append(self._segment(tenant, start, ids, positions, rows, prefill=True))
            start += len(ids)
        return segments

    @torch.inference_mode()
    def read_prompts(self) -> tuple[Segment, Tensor]:
        """The one tenant's prompts: their segment and hidden states [T, H]."""
        (segment,) = self._prompt_segments()
        return segment, forward([segment], self._backend.pool, self._backend.observer)[0]

    @torch.inference_mode()
    def prefill(self, want_logits: bool) -> Step:
        segments = self._prompt_segments()
        hidden, misses = forward(segments, self._backend.pool, self._backend.observer)
        lasts = [s.start + np.cumsum(s.lengths) - 1 for s in segments]
        step = self._step(segments, hidden, lasts, misses, np.concatenate([s.lengths for s in segments]), want_logits)
        self.reconfiguration_s = {t.name: self._backend.ready.seconds(t.name) for t in self._tenants}
        return step

    @torch.inference_mode()
    def decode(self, token_ids: np.ndarray, want_logits: bool) -> Step:
        segments, start = [], 0
        for tenant in self._tenants:
            assert tenant.cache is not None
            count = len(tenant.lengths)
            positions = tenant.lengths.copy()
            tenant.lengths = tenant.lengths + 1
            tenant.cache.reserve(int(tenant.lengths.max()))
            ids = token_ids[start : start + count]
            segments.append(
                self._segment(tenant, start, ids, positions, np.arange(count, dtype=np.int64), prefill=False)
            )
            start += count
        hidden, misses = forward(segments, self._backend.pool, self._backend.observer)
        lasts = [np.arange(s.start, s.stop) for s in segments]
        return self._step(segments, hidden, lasts, misses, np.ones(start, dtype=np.int64), want_logits)

    def _step(
        self,
        segments: list[Segment],
        hidden: Tensor,
        lasts: list[np.ndarray],
        misses: np.ndarray,
        tokens_of_row: np.ndarray,
        want_logits: bool,
    ) -> Step:
        """The most probable token after each row's last one, and all logits there if asked for."""
        parts = []
        for segment, last in zip(segments, lasts, strict=True):
            if len(last) == segment.stop - segment.start:
                rows = hidden[segment.start : segment.stop]
            else:
                rows = hidden.index_select(0, torch.from_numpy(last).to(self._backend.device))
            parts.append(head(segment, rows))
        winners = torch.cat([p.argmax(dim=-1) for p in parts]).cpu().numpy()
        logits = None
        if want_logits:
            width = max(p.shape[1] for p in parts)
            logits = np.full((len(winners), width), -np.inf, dtype=np.float32)
            start = 0
            for part in parts:
                logits[start : start + len(part), : part.shape[1]] = part.cpu().numpy()
                start += len(part)
        firsts = np.concatenate(([0], np.cumsum(tokens_of_row)[:-1]))
        row_misses = np.add.reduceat(misses, firsts)
        spec = self._backend.store.experts
        lookups = tokens_of_row * spec.num_layers * spec.top_k
        return Step(winners, logits, lookups - row_misses, row_misses)

    def keep(self, rows: Sequence[int]) -> None:
        start = 0
        kept_tenants = []
        for tenant in self._tenants:
            mine = np.array([r - start for r in rows if start <= r < start + len(tenant.lengths)], dtype=np.int64)
            start += len(tenant.lengths)
            if not len(mine):
                continue
            if len(mine) < len(tenant.lengths):
                assert tenant.cache is not None
                tenant.cache.keep(torch.from_numpy(mine).to(self._backend.device))
                tenant.lengths = tenant.lengths[mine]
            kept_tenants.append(tenant)
        self._tenants = kept_tenants
