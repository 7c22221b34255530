"""The backend that `common.engine.Engine` drives: a pool, ready tenants, and batches with their caches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.checkpoints.hugging_face import read_json
from common.dtypes import BFLOAT16
from common.engine import Backend, Observer, Row, Step
from common.errors import CheckpointError, EngineError, StoreError
from common.families.switch_transformers import SwitchTransformersConfig, as_switch
from common.store import Store
from jax_engine.dispatch import Dispatch, LoopDispatch, MeshDispatch, NativeDispatch
from jax_engine.model import KeyValues, Settings
from jax_engine.options import JaxOptions
from jax_engine.pool import ExpertPool, slots_of_plan
from jax_engine.products import NativeProducts, PlainProducts, Products
from jax_engine.residuals import LoadedResiduals
from jax_engine.steps import Steps, cache_bucket, power_of_two, prompt_bucket
from jax_engine.tenants import Architecture, ReadyTenant, ReadyTenants

# Tokens of prompts, and of answers, that `logits` computes at once: bounds its activations.
LOGITS_TOKENS = 2048


def _devices(options: JaxOptions) -> list[jax.Device]:
    """One device, or those of the mesh."""
    kind = {"auto": None, "cuda": "gpu"}.get(options.device, options.device)
    try:
        found = jax.devices(kind)
    except RuntimeError as error:
        raise EngineError(f"device {options.device!r} is not there ({error}); use auto or cpu") from error
    wanted = 1 if options.mesh is None else options.mesh[0] * options.mesh[1]
    if wanted > len(found):
        raise EngineError(f"mesh {tuple(options.mesh or ())} needs {wanted} devices, jax sees {len(found)}")
    return list(found[:wanted])


def _use_compilation_cache(wanted: str | None) -> None:
    """Let jax keep compiled steps in a folder. What the user has set already, in jax or its environment, stays."""
    if wanted is None or (wanted == "auto" and getattr(jax.config, "jax_compilation_cache_dir", None)):
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(cache / "moetel" / "jax") if wanted == "auto" else wanted)


class JaxBackend(Backend):
    """Switch Transformer on one device or a mesh. A batch holds rows of one tenant."""

    max_ready_tenants = 1

    def __init__(self, store: Store, options: JaxOptions):
        self.store = store
        devices = _devices(options)
        self.platform = devices[0].platform
        on_mesh = options.mesh is not None or self.platform != "cpu"
        shape = tuple(options.mesh or (1, 1))
        self.mesh = Mesh(np.array(devices).reshape(shape), ("data", "expert"))
        self.stored_dtype = store.dtype if options.dtype == "auto" else options.dtype
        self.products = _products(options, self.stored_dtype, self.platform, on_mesh)
        self.dispatch: Dispatch
        if on_mesh:
            self.dispatch = MeshDispatch(self.mesh)
        elif isinstance(self.products, NativeProducts):
            self.dispatch = NativeDispatch(self.products.kernels)
        else:
            self.dispatch = LoopDispatch()
        _use_compilation_cache(options.compilation_cache)
        self._capacity = options.expert_capacity
        self._layers, slot_of = slots_of_plan(store.plan)
        counts = [len(slots) for slots in self._layers]
        if self.dispatch.stacked:  # every device of the axis holds as many
            counts = [max(1, -(-n // shape[1])) * shape[1] for n in counts]
        self._slots = tuple(counts)
        self._vocab_size = max(store.config(name).vocab_size for name in store.tenants)
        self._architectures: dict[Any, Architecture] = {}
        self._steps: dict[Any, Steps] = {}
        self._observer: Observer | None = None
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        sharded = NamedSharding(self.mesh, PartitionSpec("expert") if self.dispatch.stacked else PartitionSpec())
        self._by_row = NamedSharding(self.mesh, PartitionSpec("data"))
        try:
            first = self._architecture_of(as_switch(store.config(store.tenants[0])))
            self.pool = ExpertPool(
                store, first, self._layers, options.spare_slots, self._put(sharded), self._put(everywhere)
            )
            blocked = isinstance(self.dispatch, NativeDispatch)
            self.residuals = LoadedResiduals(store, slot_of, self._slots, self._put(everywhere), blocked)
            self.ready = ReadyTenants(
                store,
                min(len(store.tenants), options.ready_tenants or len(store.tenants)),
                self._architecture_of,
                slot_of,
                self.residuals,
                np.any(store.plan.serving < 0, axis=(1, 2)),
                self._put(everywhere),
            )
        except CheckpointError as error:
            raise StoreError(f"{error}; run `moetel verify {store.path}`") from error
        self._start_ids = {name: self._start_id(name) for name in store.tenants}

    def _put(self, sharding: NamedSharding) -> Any:
        """A function that places arrays so."""
        return lambda array: jax.device_put(array, sharding)

    def _architecture_of(self, config: SwitchTransformersConfig) -> Architecture:
        key = config.architecture
        if key not in self._architectures:
            capacity = config.expert_capacity if self._capacity == "config" else self._capacity
            assert capacity is None or isinstance(capacity, int)
            settings = Settings(config, self.products, self.dispatch, self._slots, self._vocab_size, capacity)
            self._architectures[key] = Architecture.of(settings)
        return self._architectures[key]

    def _start_id(self, name: str) -> int:
        """decoder_start_token_id, of generation_config.json first, as transformers' generate() has it."""
        config = as_switch(self.store.config(name))
        path = self.store.assets_dir(name) / "generation_config.json"
        value = read_json(path).get("decoder_start_token_id") if path.is_file() else None
        if value is None:
            return config.decoder_start_token_id
        if type(value) is not int or not 0 <= value < config.vocab_size:
            raise StoreError(
                f"{path}: decoder_start_token_id of tenant {name!r} is {value!r}; expected a token id below "
                f"{config.vocab_size}; mend the checkpoint's file and build again"
            )
        return value

    def start_id(self, name: str) -> int:
        """The token that a tenant's answers are decoded from."""
        return self._start_ids[name]

    def steps(self, tenant: ReadyTenant) -> Steps:
        """The compiled computation for a tenant; tenants of one architecture share it."""
        key = tenant.config.architecture
        if key not in self._steps:
            self._steps[key] = Steps(tenant.architecture, self.pool, self._observer)
        return self._steps[key]

    def rows_bucket(self, rows: int) -> int:
        """Rows of the arrays that hold so many: a power of two, and a multiple of the mesh's data axis."""
        data = self.mesh.shape["data"]
        return int(-(-power_of_two(rows) // data) * data)

    def by_row(self, array: np.ndarray) -> jax.Array:
        """Onto the device, rows along the mesh's data axis."""
        placed: jax.Array = jax.device_put(array, self._by_row)
        return placed

    def start(self, rows: Sequence[Row]) -> JaxBatch:
        return JaxBatch(self, rows)

    def logits(
        self, tenant: str, rows: Sequence[Sequence[int]], decoder_rows: Sequence[Sequence[int]] | None
    ) -> list[np.ndarray]:
        assert decoder_rows is not None and len(decoder_rows) == len(rows)
        found: list[np.ndarray] = []
        longest = max(len(r) for r in [*rows, *decoder_rows])
        size = max(1, LOGITS_TOKENS // prompt_bucket(longest))
        for start in range(0, len(rows), size):
            found += self._logits(tenant, rows[start : start + size], decoder_rows[start : start + size])
        return found

    def _logits(
        self, tenant: str, rows: Sequence[Sequence[int]], decoder_rows: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        batch = JaxBatch(self, [Row(tenant, tuple(r), 1) for r in rows])
        batch.read_prompts()
        values = batch.read_answers(decoder_rows)
        vocab_size = self.store.config(tenant).vocab_size
        return [v[: len(r), :vocab_size] for v, r in zip(values, decoder_rows, strict=False)]

    def observe(self, observer: Observer | None) -> None:
        self._observer = observer
        for steps in self._steps.values():
            steps.observer = observer

    def stats(self) -> dict[str, Any]:
        pool = self.pool
        return {
            "device": self.platform if self.mesh.size == 1 else f"{self.platform} x {self.mesh.size}",
            "dtype": self.stored_dtype,
            "compute_dtype": self.products.compute,
            "experts": type(self.dispatch).__name__.removesuffix("Dispatch").lower(),
            "products": "native" if isinstance(self.products, NativeProducts) else "plain",
            "pool_slots": self.store.plan.num_slots,
            "pool_bytes": pool.device_bytes,
            "residual_bytes": self.residuals.device_bytes,
            "spare_slots": pool.spare_slots,
            "spare_filled": pool.spare_filled,
            "non_expert_bytes": self.ready.device_bytes,
            "hits": pool.hits,
            "misses": pool.misses,
            "fetches": pool.fetches,
            "fetched_bytes": pool.fetched_bytes,
            "reconfigurations": self.ready.switches,
            "reconfigured_bytes": self.ready.copied_bytes,
            "ready_tenants": self.ready.ready,
            "compilations": sum(sum(steps.traces.values()) for steps in self._steps.values()),
        }

    def close(self) -> None:
        self.pool.close()
        self.ready.close()
        self.residuals.close()
        self._steps.clear()


def _products(options: JaxOptions, dtype: str, platform: str, on_mesh: bool) -> Products:
    """How matrices are kept and multiplied: the first of native and plain that works, if none is asked for."""
    kernels = None
    if not on_mesh and options.products != "plain":
        from jax_engine import native

        kernels = native.load()
    if options.products == "native" and kernels is None:
        raise EngineError(
            "products='native' does not work here (one CPU device with AVX-512 and a C++ compiler); use auto or plain"
        )
    if kernels is not None:
        return NativeProducts("bfloat16" if dtype == "bfloat16" else "float32", "float32", kernels)
    if platform == "cpu":
        return PlainProducts("float32", "float32", rounded=dtype == "bfloat16")
    kept = "bfloat16" if dtype == "bfloat16" else "float32"
    return PlainProducts(kept, kept)


class JaxBatch:
    """Rows of one tenant that are decoded together. Arrays have room for more rows than live ones."""

    def __init__(self, backend: JaxBackend, rows: Sequence[Row]):
        (name,) = {row.tenant for row in rows}
        self._backend, self._name = backend, name
        self._tenant, seconds = backend.ready.acquire(name)
        self.reconfiguration_s: dict[str, float] = {name: seconds} if seconds else {}
        self._steps = backend.steps(self._tenant)
        self._prompts = [row.prompt for row in rows]
        self._size = backend.rows_bucket(len(rows))
        self._live = np.arange(len(rows))  # places of the live rows in the arrays
        self._length = 0  # tokens in the cache
        self._cache: list[KeyValues] = []
        self._encoded: list[KeyValues] = []
        self._encoder_live: Any = None

    @property
    def _sparse(self) -> tuple[int, int]:
        """Sparse layers of encoder and decoder."""
        layers = self._tenant.config.sparse_layers
        return len(layers["encoder"]), len(layers["decoder"])

    def _alive(self, tokens: int) -> np.ndarray:
        live = np.zeros((self._size, tokens), dtype=bool)
        live[self._live] = True
        return live

    def _new_cache(self, length: int) -> list[KeyValues]:
        config = self._tenant.config
        shape = (self._size, config.num_heads, length, config.d_kv)
        zeros = np.zeros(shape, dtype=BFLOAT16 if self._backend.products.compute == "bfloat16" else np.float32)

        def one() -> jax.Array:
            return jnp.array(self._backend.by_row(zeros), copy=True)  # donated later: never a view of numpy's memory

        return [(one(), one()) for _ in range(config.num_decoder_layers)]

    def read_prompts(self) -> np.ndarray:
        """Run the encoder. Returns misses, int64 [rows]."""
        longest = prompt_bucket(max(len(p) for p in self._prompts))
        ids, live = np.zeros((self._size, longest), np.int32), np.zeros((self._size, longest), bool)
        for row, prompt in enumerate(self._prompts):
            ids[row, : len(prompt)], live[row, : len(prompt)] = prompt, True
        self._encoder_live = self._backend.by_row(live)
        self._encoded, misses = self._steps.encode(self._tenant, self._backend.by_row(ids), self._encoder_live)
        return misses[: len(self._prompts)]

    def _append(self, ids: np.ndarray, live: np.ndarray) -> tuple[Any, Any, np.ndarray]:
        """Put tokens int32 [size, T] into the cache; winners, logits and misses of all rows."""
        tokens = ids.shape[1]
        room = cache_bucket(self._length + tokens)
        if not self._cache:
            self._cache = self._new_cache(room)
        elif room > self._cache[0][0].shape[2]:
            more = room - self._cache[0][0].shape[2]
            self._cache = _grow(self._cache, more)
        winners, logits, self._cache, misses = self._steps.decode(
            self._tenant,
            self._cache,
            self._length,
            self._backend.by_row(ids),
            self._backend.by_row(live),
            self._encoded,
            self._encoder_live,
        )
        self._length += tokens
        return winners, logits, misses

    def read_answers(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits float32 [size, T, vocab] at every position of given answers, from an empty cache."""
        longest = prompt_bucket(max(len(r) for r in rows))
        ids, live = np.zeros((self._size, longest), np.int32), np.zeros((self._size, longest), bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)], live[i, : len(row)] = row, True
        _, logits, _ = self._append(ids, live)
        return np.asarray(logits, dtype=np.float32)

    def _step(self, token_ids: np.ndarray, want_logits: bool, encoder_misses: np.ndarray | int) -> Step:
        ids = np.zeros((self._size, 1), dtype=np.int32)
        ids[self._live, 0] = token_ids
        winners, logits, misses = self._append(ids, self._alive(1))
        lookups = np.full(len(self._live), self._sparse[1], dtype=np.int64)
        if self._length == 1:
            lookups += np.array([len(p) for p in self._prompts], dtype=np.int64) * self._sparse[0]
        missed = misses[self._live] + encoder_misses
        self._backend.pool.hits += int((lookups - missed).sum())
        self._backend.pool.misses += int(missed.sum())
        values = None
        if want_logits:
            values = np.array(logits, dtype=np.float32)[self._live, 0]
            values[:, self._tenant.config.vocab_size :] = -np.inf
        return Step(np.asarray(winners).astype(np.int64)[self._live], values, lookups - missed, missed)

    def prefill(self, want_logits: bool) -> Step:
        misses = self.read_prompts()
        start = np.full(len(self._live), self._backend.start_id(self._name), dtype=np.int32)
        return self._step(start, want_logits, misses)

    def decode(self, token_ids: np.ndarray, want_logits: bool) -> Step:
        return self._step(token_ids, want_logits, 0)

    def keep(self, rows: Sequence[int]) -> None:
        self._live = self._live[list(rows)]
        size = self._backend.rows_bucket(len(self._live))
        if size < self._size:
            places = np.concatenate([self._live, np.zeros(size - len(self._live), dtype=self._live.dtype)])
            held = (self._cache, self._encoded, self._encoder_live)
            self._cache, self._encoded, self._encoder_live = _take(held, places.astype(np.int32))
            self._size, self._live = size, np.arange(len(self._live))


@jax.jit
def _take(arrays: Any, rows: jax.Array) -> Any:
    """These rows of every array."""
    return jax.tree.map(lambda a: jnp.take(a, rows, axis=0), arrays)


def _grow(cache: list[KeyValues], more: int) -> list[KeyValues]:
    """The cache with room for so many more tokens."""
    return [
        (jnp.pad(k, [(0, 0), (0, 0), (0, more), (0, 0)]), jnp.pad(v, [(0, 0), (0, 0), (0, more), (0, 0)]))
        for k, v in cache
    ]
