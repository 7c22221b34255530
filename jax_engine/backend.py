"""The backend that `Engine` drives: what a store gives, and the sequences that are computed with
it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from common.errors import EngineError
from common.serving.backend import Backend, Observer, Part, Row, Step
from common.store import Store
from jax_engine.devices import Devices
from jax_engine.experts.dispatch import Dispatch, LoopDispatch, MeshDispatch, NativeDispatch
from jax_engine.experts.products import NativeProducts, PlainProducts, Products
from jax_engine.models.spec import check_shape, computed_shape
from jax_engine.options import JaxOptions
from jax_engine.steps.compilation import CountedJit, use_compilation_cache
from jax_engine.steps.scoring import score
from jax_engine.steps.sequences import Sequences
from jax_engine.tenants.loaded_store import Computing, LoadedStore

MOST_CACHE = 4 << 30
"""Bytes of caches, unless an option says otherwise."""


def load_backend(
    store: Store, device: str = "auto", dtype: str = "auto", **options: Any
) -> Backend:
    """Load a store's pool and tenants onto a device or a mesh.

    Args:
        options: the fields of `JaxOptions`.

    Raises:
        EngineError: an option is unknown or out of its bound, or the engine cannot serve the store.
    """
    return JaxBackend(store, JaxOptions.make(device=device, dtype=dtype, **options))


class JaxBackend(Backend):
    """Encoder-decoders on one device or a mesh."""

    def __init__(self, store: Store, options: JaxOptions):
        """Raises StoreError, EngineError."""
        self._options, self._devices = options, Devices(options)
        for name in store.tenants:
            check_shape(store.config(name).shape, name)
        self.stored_dtype = store.dtype if options.dtype == "auto" else options.dtype
        self._products = _products(options, self.stored_dtype, self._devices)
        self._dispatch = _dispatch(self._devices, self._products)
        use_compilation_cache(options.compilation_cache)
        # switch-base-8 on two cores: 40 tokens of prompts take as long as a step of 16 answers;
        # accelerators compute more while they read their weights.
        self.default_chunk = 48 if self._devices.platform == "cpu" else 512
        self._jit = CountedJit()
        self._observer: Observer | None = None
        self._computing = Computing(
            self._devices, self._products, self._dispatch, options, self._jit
        )
        self.loaded = LoadedStore(store, self._computing)
        self.sequences = Sequences(self._devices, self._products.compute, self._jit)
        self.sequences.caches.budget_bytes = options.kv_cache_bytes or min(
            MOST_CACHE, self._devices.free_bytes // 4
        )
        self._check_cache(store)

    def _check_cache(self, store: Store) -> None:
        """Raises EngineError if the caches cannot hold one short sequence of each tenant."""
        caches = self.sequences.caches
        for name in store.tenants:
            least = caches.alone_bytes(check_shape(store.config(name).shape, name), 1)
            if least > caches.budget_bytes:
                raise EngineError(
                    f"kv_cache_bytes is {caches.budget_bytes}; one short sequence of tenant "
                    f"{name!r} takes {least}: give as much at least"
                )

    @property
    def max_ready_tenants(self) -> int:  # type: ignore[override]
        return self.loaded.ready.capacity

    @property
    def ready_tenants(self) -> list[str]:  # type: ignore[override]
        return self.loaded.ready.ready

    def start_id(self, name: str) -> int:
        """The token that a tenant's answers are decoded from."""
        return self.loaded.start_ids[name]

    def begin(self, row: Row) -> int:
        return self.sequences.begin(row)

    def step(self, parts: Sequence[Part]) -> Step:
        return self.sequences.step(self.loaded, parts, self._observer)

    def end(self, sequences: Iterable[int]) -> None:
        self.sequences.end(sequences)

    def fits(self, parts: Sequence[Part], ahead: int = 0) -> bool:
        return self.sequences.fits(self.loaded, parts, ahead)

    def max_length(self, tenant: str) -> int:
        return self.sequences.caches.max_length(self.loaded.shape(tenant))

    def logits(
        self,
        tenant: str,
        rows: Sequence[Sequence[int]],
        decoder_rows: Sequence[Sequence[int]] | None,
    ) -> list[np.ndarray]:
        assert decoder_rows is not None and len(decoder_rows) == len(rows)
        return score(self._devices, self.loaded, tenant, rows, decoder_rows, self._observer)

    def update(self, store: Store) -> None:
        before = self.loaded.store
        if store.family.name != before.family.name or store.experts != before.experts:
            raise EngineError(
                f"{store.path}: its experts have other shapes than those that were loaded; load it "
                "with load_engine()"
            )
        dtype = store.dtype if self._options.dtype == "auto" else self._options.dtype
        if dtype != self.stored_dtype:
            raise EngineError(
                f"{store.path}: its type is {dtype}, that of the weights that were loaded "
                f"{self.stored_dtype}; load it "
                "with load_engine()"
            )
        for name in sorted(self.sequences.tenants):
            if name not in store.tenants:
                raise EngineError(
                    f"{store.path}: tenant {name!r} is gone, but has unfinished requests; end them "
                    "first"
                )
            now, then = (check_shape(of.config(name).shape, name) for of in (store, before))
            if computed_shape(now) != computed_shape(then):
                raise EngineError(
                    f"{store.path}: tenant {name!r} has another config than before, and unfinished "
                    "requests; end them "
                    "first"
                )
        self._check_cache(store)
        self.loaded = LoadedStore(store, self._computing, self.loaded)

    def observe(self, observer: Observer | None) -> None:
        self._observer = observer

    def stats(self) -> dict[str, Any]:
        loaded, pool, ready = self.loaded, self.loaded.pool, self.loaded.ready
        return {
            "device": self._devices.name,
            "dtype": self.stored_dtype,
            "compute_dtype": self._products.compute,
            "experts": type(self._dispatch).__name__.removesuffix("Dispatch").lower(),
            "products": self._products.name,
            "pool_slots": loaded.store.plan.num_slots,
            "pool_bytes": pool.device_bytes,
            "residual_bytes": loaded.residuals.device_bytes,
            "spare_slots": pool.spare_slots,
            "spare_filled": pool.spare_filled,
            "non_expert_bytes": ready.device_bytes,
            "kv_cache_bytes": self.sequences.caches.budget_bytes,
            "kv_cache_used_bytes": self.sequences.used_bytes,
            "hits": pool.hits,
            "misses": pool.misses,
            "fetches": pool.fetches,
            "fetched_bytes": pool.fetched_bytes,
            "reconfigurations": ready.switches,
            "reconfigured_bytes": ready.copied_bytes,
            "ready_tenants": self.ready_tenants,
            "compilations": self._jit.traces.total(),
        }

    def close(self) -> None:
        self.sequences.close()
        self.loaded.close()


def _dispatch(devices: Devices, products: Products) -> Dispatch:
    if devices.is_mesh:
        return MeshDispatch(devices.mesh)
    return (
        NativeDispatch(products.kernels) if isinstance(products, NativeProducts) else LoopDispatch()
    )


def _products(options: JaxOptions, dtype: str, devices: Devices) -> Products:
    """How matrices are kept and multiplied: the first of native and plain that works, if none is
    asked for."""
    kernels = None
    if not devices.is_mesh and options.products != "plain":
        from jax_engine import native

        kernels = native.load()
    if options.products == "native" and kernels is None:
        raise EngineError(
            "products='native' does not work here (it needs one CPU device with AVX2 and a C++ "
            "compiler, not switched "
            "off by MOETEL_NATIVE=0); use auto or plain"
        )
    if kernels is not None:
        return NativeProducts("bfloat16" if dtype == "bfloat16" else "float32", "float32", kernels)
    if devices.platform == "cpu":
        return PlainProducts("float32", "float32", rounded=dtype == "bfloat16")
    kept = "bfloat16" if dtype == "bfloat16" else "float32"
    return PlainProducts(kept, kept)
