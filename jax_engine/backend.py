"""The backend that `Engine` drives: what a store gives, and the sequences that are
computed with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common.errors import EngineError
from common.families.switch_transformers import as_switch
from common.serving.backend import Backend, Observer, Part, Row, Step
from common.store import Store
from jax_engine.devices import Devices
from jax_engine.experts.dispatch import Dispatch, LoopDispatch, MeshDispatch, NativeDispatch
from jax_engine.experts.products import NativeProducts, PlainProducts, Products
from jax_engine.options import JaxOptions
from jax_engine.steps.compiled import Compiled
from jax_engine.steps.sequences import Sequences
from jax_engine.tenants.loaded import Loaded

MOST_CACHE = 4 << 30
"""Bytes of caches, unless an option says otherwise."""

DEFAULT_LEAST_COMPILE_S = 1.0
"""jax's own: another value is the user's."""


def _use_compilation_cache(wanted: str | None) -> None:
    """Let jax keep compiled steps in a folder. What the user has set already, in jax or its
    environment, stays."""
    if wanted is None or (
        wanted == "auto" and getattr(jax.config, "jax_compilation_cache_dir", None)
    ):
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update(
        "jax_compilation_cache_dir", str(cache / "moetel" / "jax") if wanted == "auto" else wanted
    )
    # jax keeps what took it a second to compile. A step by layers is dozens of calls that take half
    # of one each.
    least = "jax_persistent_cache_min_compile_time_secs"
    if least.upper() not in os.environ and getattr(jax.config, least) == DEFAULT_LEAST_COMPILE_S:
        jax.config.update(least, 0.0)


class JaxBackend(Backend):
    """Switch Transformer on one device or a mesh."""

    def __init__(self, store: Store, options: JaxOptions):
        """Raises StoreError, EngineError."""
        self._options, self._devices = options, Devices(options)
        self.stored_dtype = store.dtype if options.dtype == "auto" else options.dtype
        self._products = _products(options, self.stored_dtype, self._devices)
        self._dispatch: Dispatch
        if self._devices.is_mesh:
            self._dispatch = MeshDispatch(self._devices.mesh)
        elif isinstance(self._products, NativeProducts):
            self._dispatch = NativeDispatch(self._products.kernels)
        else:
            self._dispatch = LoopDispatch()
        _use_compilation_cache(options.compilation_cache)
        # switch-base-8 on two cores: 40 tokens of prompts take as long as a step of 16 answers;
        # accelerators compute more while they read their weights.
        self.default_chunk = 48 if self._devices.platform == "cpu" else 512
        self._compiled = Compiled()
        self._observer: Observer | None = None
        self.loaded = self._load(store, None)
        self.sequences = Sequences(self._devices, self._products.compute, self._compiled)
        self.sequences.room_bytes = options.kv_cache_bytes or min(
            MOST_CACHE, self._devices.free_bytes // 4
        )
        self._check_room(store)

    def _load(self, store: Store, before: Loaded | None) -> Loaded:
        return Loaded(
            store,
            self._devices,
            self._products,
            self._dispatch,
            self._options,
            self._compiled,
            before,
        )

    def _check_room(self, store: Store) -> None:
        """Raises EngineError if the caches cannot hold one short sequence of each tenant."""
        for name in store.tenants:
            least, most = (
                self.sequences.alone_bytes(as_switch(store.config(name)), 1),
                self.sequences.room_bytes,
            )
            if least > most:
                raise EngineError(
                    f"kv_cache_bytes is {most}; one short sequence of tenant {name!r} takes "
                    f"{least}: give as much at "
                    "least"
                )

    @property
    def max_ready_tenants(self) -> int:  # type: ignore[override]
        return self.loaded.ready.capacity

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
        return self.sequences.max_length(self.loaded.config(tenant))

    def logits(
        self,
        tenant: str,
        rows: Sequence[Sequence[int]],
        decoder_rows: Sequence[Sequence[int]] | None,
    ) -> list[np.ndarray]:
        assert decoder_rows is not None and len(decoder_rows) == len(rows)
        return self.sequences.logits(self.loaded, tenant, rows, decoder_rows, self._observer)

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
            if (
                as_switch(store.config(name)).architecture
                != as_switch(before.config(name)).architecture
            ):
                raise EngineError(
                    f"{store.path}: tenant {name!r} has another config than before, and unfinished "
                    "requests; end them "
                    "first"
                )
        self._check_room(store)
        self.loaded = self._load(store, self.loaded)

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
            "kv_cache_bytes": self.sequences.room_bytes,
            "kv_cache_used_bytes": self.sequences.used_bytes,
            "hits": pool.hits,
            "misses": pool.misses,
            "fetches": pool.fetches,
            "fetched_bytes": pool.fetched_bytes,
            "reconfigurations": ready.switches,
            "reconfigured_bytes": ready.copied_bytes,
            "ready_tenants": ready.ready,
            "compilations": self._compiled.traces.total(),
        }

    def close(self) -> None:
        self.sequences.close()
        self.loaded.close()


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
