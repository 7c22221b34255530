"""The compiled computation of one architecture, and the shapes that it is compiled for.

A tenant that can miss no expert runs in whole steps: one call for the encoder, one for each token. A tenant that can
runs layer by layer, because which experts a layer needs is known only once its router has run; so does every tenant
while an observer looks on. Both are made of the same methods of the model.

How often anything is compiled: shapes are rounded up, the number of rows to a power of two, the prompt to one of
`prompt_bucket`, the cache to 32 * 2^n. A whole step is compiled once for each triple of them that occurs, whichever
tenants use it; `traces` counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.engine import Observer
from common.errors import EngineError
from common.families.switch_transformers import Side
from jax_engine.model import Block, KeyValues, abstract_model, combine, split
from jax_engine.pool import ExpertPool
from jax_engine.residuals import LayerResiduals, Residuals
from jax_engine.tenants import Architecture, Leaves, ReadyTenant

Array = jax.Array

SMALLEST_PROMPT = 16
SMALLEST_CACHE = 32


def power_of_two(n: int) -> int:
    """The smallest power of two from n on."""
    return 1 << (n - 1).bit_length()


def prompt_bucket(tokens: int) -> int:
    """16, 32, 48, 64, 96, 128, 192, 256, ...: powers of two and, from 32 on, one size half-way to the next."""
    whole = max(SMALLEST_PROMPT, power_of_two(tokens))
    half_way = whole * 3 // 4
    return half_way if whole >= 64 and tokens <= half_way else whole


def cache_bucket(tokens: int) -> int:
    """32, 64, 128, ..."""
    return max(SMALLEST_CACHE, power_of_two(tokens))


class Steps:
    """Compiled functions for one architecture over one pool.

    observer: sees every layer's routing, see `common.engine.Observer`; None: nothing is shown.
    """

    def __init__(self, architecture: Architecture, pool: ExpertPool, observer: Observer | None = None):
        self._architecture, self._pool = architecture, pool
        self.observer = observer
        self.traces: Counter[str] = Counter()
        self._encode = self._compiled("encode", self._encode_body)
        self._decode = self._compiled("decode", self._decode_body, donate_argnums=0)
        self._parts: _Parts | None = None

    def _compiled(self, name: str, body: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """`jax.jit` of a function, with a count of its traces."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.traces[name] += 1
            return body(*args, **kwargs)

        return jax.jit(counted, **options)

    def _encode_body(
        self, pool: Leaves, tenant: Leaves, slot_of: Array, ids: Array, live: Array, residuals: Residuals = ()
    ) -> list[KeyValues]:
        found: list[KeyValues] = self._architecture.model(pool, tenant).encode(ids, live, slot_of, residuals)
        return found

    def _decode_body(
        self,
        cache: list[KeyValues],
        pool: Leaves,
        tenant: Leaves,
        slot_of: Array,
        vocab_size: Array,
        ids: Array,
        live: Array,
        position: Array,
        encoded: list[KeyValues],
        encoder_live: Array,
        residuals: Residuals = (),
    ) -> tuple[Array, Array, list[KeyValues]]:
        model = self._architecture.model(pool, tenant)
        logits, cache = model.decode(ids, live, slot_of, cache, position, encoded, encoder_live, vocab_size, residuals)
        return jnp.argmax(logits[:, -1], axis=-1), logits, cache

    def encode(self, tenant: ReadyTenant, ids: Array, live: Array) -> tuple[list[KeyValues], np.ndarray]:
        """Prompts int32 [B, S] -> what the decoder's layers attend to, and misses int64 [B]."""
        if self._is_layered(tenant):
            return self._layered.encode(tenant, ids, live, self.observer)
        found = self._encode(self._pool.leaves, tenant.leaves, tenant.slot_of, ids, live, tenant.residuals)
        return found, np.zeros(len(ids), dtype=np.int64)

    def decode(
        self,
        tenant: ReadyTenant,
        cache: list[KeyValues],
        position: int,
        ids: Array,
        live: Array,
        encoded: list[KeyValues],
        encoder_live: Array,
    ) -> tuple[Array, Array, list[KeyValues], np.ndarray]:
        """Tokens int32 [B, T] at `position`.. -> the winner after each row's last int32 [B], logits float32 [B, T, V],
        the cache (the one given is used up), and misses int64 [B]."""
        place = np.int32(position)
        if self._is_layered(tenant):
            return self._layered.decode(tenant, cache, place, ids, live, encoded, encoder_live, self.observer)
        winners, logits, cache = self._decode(
            cache,
            self._pool.leaves,
            tenant.leaves,
            tenant.slot_of,
            tenant.vocab_size,
            ids,
            live,
            place,
            encoded,
            encoder_live,
            tenant.residuals,
        )
        return winners, logits, cache, np.zeros(len(ids), dtype=np.int64)

    def _is_layered(self, tenant: ReadyTenant) -> bool:
        return tenant.can_miss or self.observer is not None

    @property
    def _layered(self) -> _Parts:
        if self._parts is None:
            self._parts = _Parts(self._architecture, self._pool, self._compiled)
        return self._parts


class _Parts:
    """The same computation layer by layer, with a look at the host after every router."""

    def __init__(self, architecture: Architecture, pool: ExpertPool, compiled: Callable[..., Callable[..., Any]]):
        self._architecture, self._pool = architecture, pool
        self._settings = architecture.settings
        self._layers = self._settings.config.sparse_layers
        skeleton = abstract_model(self._settings)
        whole: dict[str, Callable[..., Any]] = {
            "start_encoder": lambda m, ids, live: (m.embed("encoder", ids), m.bias_of_encoder(live)),
            "end_encoder": lambda m, x: m.encoded(x),
            "start_decoder": self._start_decoder,
            "end_decoder": self._end_decoder,
        }
        self._whole = {name: compiled(name, self._with_model(body)) for name, body in whole.items()}
        self._block: dict[tuple[str, Side, bool], Callable[..., Any]] = {}
        sides: tuple[Side, Side] = ("encoder", "decoder")
        for side in sides:
            for block in getattr(skeleton, side):
                sparse = block.layer is not None
                bodies: dict[str, Callable[..., Any]] = {
                    "attend": Block.encode if side == "encoder" else Block.decode,
                    "feed": Block.route if sparse else lambda b, x: x + b.dense(b.ff_norm(x)),
                }
                for name, body in bodies.items():
                    if (name, side, sparse) not in self._block:
                        label = f"{name} {side} {'sparse' if sparse else 'dense'}"
                        self._block[name, side, sparse] = compiled(label, self._with_block(block, body))
        self._experts = compiled("experts", self._experts_body)
        self._missing = compiled("missing expert", self._missing_body)
        self._combine = compiled("combine", combine)
        self._of_tenant: tuple[Any, dict[tuple[Side, int], Leaves]] = (None, {})

    def _with_model(self, body: Callable[..., Any]) -> Callable[..., Any]:
        def run(tenant: Leaves, *args: Any) -> Any:
            # The pool is not looked at here: its abstract leaves stand in.
            model = self._architecture.model(tuple(jax.tree.leaves(self._architecture.pool_state)), tenant)
            return body(model, *args)

        return run

    def _with_block(self, block: Block, body: Callable[..., Any]) -> Callable[..., Any]:
        """A function of one block's own leaves; blocks of a kind differ in nothing else that matters here."""
        graphdef, pool, tenant = split(block)
        tree = jax.tree.structure(tenant)

        def run(leaves: Leaves, *args: Any) -> Any:
            return body(nnx.merge(graphdef, pool, jax.tree.unflatten(tree, leaves)), *args)

        return run

    @staticmethod
    def _start_decoder(m: Any, ids: Array, position: Array, keys: Array, encoder_live: Array) -> Any:
        bias = m.bias_of_decoder(position, ids.shape[1], keys.shape[2])
        return m.embed("decoder", ids), bias, m.bias_to_encoder(encoder_live)

    @staticmethod
    def _end_decoder(m: Any, x: Array, vocab_size: Array) -> tuple[Array, Array]:
        logits = m.logits(x, vocab_size)
        return jnp.argmax(logits[:, -1], axis=-1), logits

    def _experts_body(
        self, copies: tuple[Leaves, ...], x: Array, slots: Array, residuals: LayerResiduals | None
    ) -> Array:
        if not copies:
            return jnp.zeros_like(x)
        flat = x.reshape(-1, x.shape[-1])
        found = self._settings.dispatch(flat, slots.reshape(-1), copies, self._settings.ff, residuals)
        return found.reshape(x.shape)

    def _missing_body(self, found: Array, copy: Leaves, x: Array, slots: Array, number: Array) -> Array:
        """Adds what the tokens whose slot is `number` get from a copy that is not in the pool."""
        flat, mine = x.reshape(-1, x.shape[-1]), (slots == number).reshape(-1)
        if self._settings.dispatch.stacked:
            one = self._settings.ff(flat, tuple(w[0] for w in copy))
            return found + jnp.where(mine[:, None], one, 0).reshape(x.shape)
        one = self._settings.dispatch(flat, jnp.where(mine, 0, -1).astype(jnp.int32), (copy,), self._settings.ff)
        return found + one.reshape(x.shape)

    def _leaves(self, tenant: ReadyTenant, side: Side, n: int) -> Leaves:
        if self._of_tenant[0] is not tenant.leaves:
            self._of_tenant = (tenant.leaves, {})
        found = self._of_tenant[1]
        if (side, n) not in found:
            found[side, n] = self._architecture.block_leaves(tenant.leaves, side, n)
        return found[side, n]

    def _feed(
        self,
        tenant: ReadyTenant,
        side: Side,
        n: int,
        x: Array,
        live: Array,
        misses: np.ndarray,
        observer: Observer | None,
    ) -> Array:
        """A layer's feed-forward; what is missing is fetched and added. misses: int64 [B], counted up."""
        sparse = n in self._layers[side]
        run, leaves = self._block["feed", side, sparse], self._leaves(tenant, side, n)
        if not sparse:
            dense: Array = run(leaves, x)
            return dense
        layer = self._layers[side].index(n) + (0 if side == "encoder" else len(self._layers["encoder"]))
        normed, slots, gates = run(leaves, x, tenant.slot_of[layer], live)
        added = None if observer is None else self._show(observer, tenant.name, layer, normed, slots, gates)
        residuals = tenant.residuals[layer] if tenant.residuals else None
        copies = self._architecture.layer_copies(self._pool.leaves, side, n)
        found = self._experts(copies, normed, slots, residuals)
        resident, chosen = self._pool.num_slots(layer), np.asarray(slots)
        misses += (chosen >= resident).sum(axis=1)
        for number in np.unique(chosen[chosen >= resident]):
            copy = self._pool.fetch(tenant.index, layer, int(number) - resident)
            found = self._missing(found, copy, normed, slots, np.int32(number))
        combined: Array = self._combine(x, found, gates)
        return combined if added is None else combined + added

    def _show(
        self, observer: Observer, tenant: str, layer: int, x: Array, slots: Array, gates: Array
    ) -> np.ndarray | None:
        """Show the tokens that an expert takes to the observer; what it answers as [B, T, H], zeros elsewhere."""
        chosen = np.asarray(slots)
        taken = chosen >= 0
        if not taken.any():
            return None
        values, weights = np.asarray(x)[taken].astype(np.float32), np.asarray(gates)[taken].astype(np.float32)
        experts = self._pool.expert_of_slot(layer)[chosen[taken]]
        answer = observer(tenant, layer, values, experts[:, None], weights[:, None])
        if answer is None:
            return None
        if answer.shape != values.shape:
            raise EngineError(f"the observer returned {list(answer.shape)}, expected [tokens, hidden] = {values.shape}")
        added = np.zeros(x.shape, dtype=np.float32)
        added[taken] = answer
        return added.astype(x.dtype)

    def encode(
        self, tenant: ReadyTenant, ids: Array, live: Array, observer: Observer | None
    ) -> tuple[list[KeyValues], np.ndarray]:
        misses = np.zeros(len(ids), dtype=np.int64)
        x, bias = self._whole["start_encoder"](tenant.leaves, ids, live)
        for n in range(self._settings.config.num_layers):
            attend = self._block["attend", "encoder", n in self._layers["encoder"]]
            x = attend(self._leaves(tenant, "encoder", n), x, bias)
            x = self._feed(tenant, "encoder", n, x, live, misses, observer)
        return self._whole["end_encoder"](tenant.leaves, x), misses

    def decode(
        self,
        tenant: ReadyTenant,
        cache: Sequence[KeyValues],
        position: np.int32,
        ids: Array,
        live: Array,
        encoded: Sequence[KeyValues],
        encoder_live: Array,
        observer: Observer | None,
    ) -> tuple[Array, Array, list[KeyValues], np.ndarray]:
        misses = np.zeros(len(ids), dtype=np.int64)
        x, bias, encoder_bias = self._whole["start_decoder"](tenant.leaves, ids, position, cache[0][0], encoder_live)
        grown = []
        for n, (mine, theirs) in enumerate(zip(cache, encoded, strict=True)):
            attend = self._block["attend", "decoder", n in self._layers["decoder"]]
            x, kept = attend(self._leaves(tenant, "decoder", n), x, bias, mine, position, theirs, encoder_bias)
            grown.append(kept)
            x = self._feed(tenant, "decoder", n, x, live, misses, observer)
        winners, logits = self._whole["end_decoder"](tenant.leaves, x, tenant.vocab_size)
        return winners, logits, grown, misses
