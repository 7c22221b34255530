"""Switch Transformer in Flax NNX.

Two variable types: `nnx.Param` for what a tenant has of its own, `Expert` for copies in the pool.
`nnx.split` by type gives (graphdef, pool, tenant); a step is compiled once for the graphdef and
takes both as arguments.

Every variable says in its metadata which canonical tensors it is made of (`sources`, stacked along
their first axis), and whether it is a matrix that `Products` packs. One description so serves
shapes, loading, initialisation and saving.

Source: Switch Transformers (arXiv 2101.03961) and T5 (arXiv 1910.10683); order of operations as in
transformers, models/switch_transformers/modeling_switch_transformers.py.
Legend: rows B, tokens of a row T (decoder) or S (encoder), cache length L, hidden H, heads N, head
size D, experts E, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from common.families.switch_transformers import Side, SwitchTransformersConfig
from jax_engine.dispatch import Copy, Dispatch, FeedForward
from jax_engine.positions import relative_buckets
from jax_engine.products import Products
from jax_engine.residuals import LayerResiduals, Residuals

Array = jax.Array
KeyValues = tuple[Array, Array]
"""Keys and values of a layer, each [B, N, length, D]."""

MASKED = -1e30  # finite, so that a row without any token gives no NaN


class Expert(nnx.Variable[Array]):
    """Weights in the expert pool, shared by all tenants.

    Metadata: layer, slot (None: all slots stacked), projection.
    """


@dataclass(frozen=True)
class Settings:
    """What a model is built from beside a tenant's config.

    slots: number of slots of each sparse layer. vocab_size: the widest of all tenants, so that a
        switch meets the same
    shapes. capacity: tokens an expert takes of each row (None: all), as `expert_capacity` in
        transformers.
    """

    config: SwitchTransformersConfig
    products: Products
    dispatch: Dispatch
    slots: tuple[int, ...]
    vocab_size: int
    capacity: int | None = None

    @property
    def ff(self) -> FeedForward:
        return FeedForward(self.config.experts.activation, self.config.gated, self.config.d_ff)


class Initial:
    """Where initial values come from: a seed, or none for shapes alone.

    Not `nnx.Rngs`: its counter is a variable, and tracing thousands of its updates takes minutes.
    """

    def __init__(self, seed: int | None):
        self._key = None if seed is None else jax.random.key(seed)
        self._drawn = 0

    def normal(self, shape: tuple[int, ...], dtype: str, std: float) -> Array:
        """Normal noise; zeros without a seed."""
        if self._key is None:
            return jnp.zeros(shape, dtype)
        key = jax.random.fold_in(self._key, self._drawn)
        self._drawn += 1
        return jax.random.normal(key, shape, dtype) * std


class Linear(nnx.Module):
    """Matrices [out, in], stacked along their outputs, without bias."""

    def __init__(
        self,
        s: Settings,
        sources: Sequence[str],
        shape: tuple[int, int],
        std: float,
        initial: Initial,
    ):
        self.products, self.out_features = s.products, shape[0] * len(sources)
        value = initial.normal((self.out_features, shape[1]), s.products.weights, std)
        self.weight = nnx.Param(s.products.pack(value), sources=tuple(sources), packed=True)

    def __call__(self, x: Array) -> Array:
        return self.products.linear(x, self.weight[...], self.out_features)


class Norm(nnx.Module):
    """Root-mean-square norm without bias or mean, in float32."""

    def __init__(self, s: Settings, source: str):
        self.epsilon = s.config.layer_norm_epsilon
        self.weight = nnx.Param(
            jnp.ones(s.config.experts.hidden_size, jnp.float32), sources=(source,), packed=False
        )

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        scaled = wide * lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.epsilon)
        return (scaled * self.weight[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention; scores are not scaled (T5 folds the scale into its initialisation)."""

    def __init__(self, s: Settings, place: str, cross: bool, initial: Initial):
        c = s.config
        self.heads, self.head_dim = c.num_heads, c.d_kv
        hidden, inner = c.experts.hidden_size, c.num_heads * c.d_kv
        std = hidden**-0.5
        self.cross = cross
        if cross:
            self.q = Linear(s, [f"{place}.q.weight"], (inner, hidden), std * c.d_kv**-0.5, initial)
            self.kv = Linear(
                s, [f"{place}.{p}.weight" for p in "kv"], (inner, hidden), std, initial
            )
        else:
            self.qkv = Linear(
                s, [f"{place}.{p}.weight" for p in "qkv"], (inner, hidden), std, initial
            )
        self.o = Linear(s, [f"{place}.o.weight"], (hidden, inner), inner**-0.5, initial)

    def split(self, x: Array, parts: int) -> list[Array]:
        """[B, T, parts * N * D] -> parts of [B, N, T, D]."""
        whole = x.reshape(*x.shape[:2], parts, self.heads, self.head_dim)
        return [whole[:, :, i].transpose(0, 2, 1, 3) for i in range(parts)]

    def key_values(self, encoded: Array) -> KeyValues:
        """What a decoder layer attends to of the encoder's output [B, S, H]."""
        k, v = self.split(self.kv(encoded), 2)
        return k, v

    def attend(self, q: Array, keys: Array, values: Array, bias: Array) -> Array:
        """q: [B, N, T, D]; bias: float32, broadcast to [B, N, T, L], mask included. Returns [B, T,
        H]."""
        scores = jnp.einsum("bntd,bnld->bntl", q, keys, preferred_element_type=jnp.float32) + bias
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        mixed = jnp.einsum("bntl,bnld->bntd", weights, values)
        return self.o(mixed.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1))


class RelativeBias(nnx.Module):
    """T5's position bias, one number a head and bucket of distance; the layers of a side share
    it."""

    def __init__(self, s: Settings, side: Side, initial: Initial):
        c = s.config
        self.buckets, self.distance = (
            c.relative_attention_num_buckets,
            c.relative_attention_max_distance,
        )
        self.bidirectional = side == "encoder"
        value = initial.normal((self.buckets, c.num_heads), "float32", c.experts.hidden_size**-0.5)
        source = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        self.table = nnx.Param(value, sources=(source,), packed=False)

    def __call__(self, queries: Array, num_keys: int, num_queries: int) -> Array:
        """queries: int32 [B, T], positions; keys are at 0..num_keys-1. Returns float32 [B, N, T,
        keys].

        num_queries: how many positions queries can come from, from 0 on: bounds the table of
            offsets.
        """
        offsets = np.arange(-(num_queries - 1), num_keys)
        buckets = relative_buckets(offsets, self.bidirectional, self.buckets, self.distance)
        by_offset = self.table[...][buckets]
        index = jnp.arange(num_keys) - queries[..., None] + (num_queries - 1)
        return by_offset[index].transpose(0, 3, 1, 2)


class Dense(nnx.Module):
    """A feed-forward of the tenant's own."""

    def __init__(self, s: Settings, place: str, initial: Initial):
        self.ff, self.dispatch = s.ff, s.dispatch
        self.matrices = nnx.List(
            [
                Linear(
                    s, [f"{place}.{name}.weight"], (shape[0], shape[1]), shape[1] ** -0.5, initial
                )
                for name, shape in s.config.experts.projections
            ]
        )

    def __call__(self, x: Array) -> Array:
        """[B, T, H] -> [B, T, H]."""
        copy = tuple(m.weight[...] for m in self.matrices)
        return self.dispatch.single(x.reshape(-1, x.shape[-1]), copy, self.ff).reshape(x.shape)


class Router(nnx.Module):
    """Top-1 choice of an expert, and of the slot that holds its copy for the tenant at hand."""

    def __init__(self, s: Settings, place: str, initial: Initial):
        c = s.config
        self.dtype, self.capacity = c.router_dtype, s.capacity
        shape = (c.experts.num_experts, c.experts.hidden_size)
        weight = initial.normal(shape, "float32", 0.02)
        self.weight = nnx.Param(
            weight, sources=(f"{place}.router.classifier.weight",), packed=False
        )
        self.biased = c.router_bias
        if self.biased:
            zeros = jnp.zeros(shape[0], jnp.float32)
            self.bias = nnx.Param(zeros, sources=(f"{place}.router.classifier.bias",), packed=False)

    def logits(self, x: Array) -> Array:
        """[B, T, H] -> [B, T, E] in the router's type."""
        found = jnp.einsum("bth,eh->bte", x.astype(self.dtype), self.weight[...].astype(self.dtype))
        return found + self.bias[...].astype(self.dtype) if self.biased else found

    def __call__(
        self, x: Array, slot_of: Array, live: Array, together: bool
    ) -> tuple[Array, Array]:
        """x: [B, T, H]; slot_of: int32 [E]; live: bool [B, T], False at padding. together: whether
        a row's tokens share the experts' capacity, as those that are read at once do; tokens of an
        answer came one by one.

        Returns slots int32 [B, T] (-1: no expert, for padding and tokens over capacity) and gates
        [B, T].
        """
        logits = self.logits(x).astype(jnp.float32)  # torch's softmax, too, rounds once, at its end
        probabilities = jax.nn.softmax(logits, axis=-1).astype(self.dtype).astype(x.dtype)
        expert = jnp.argmax(probabilities, axis=-1)
        if self.capacity is not None and together:
            # Each row's tokens fill its experts in order; what comes too late keeps its residual
            # alone.
            chosen = (
                jax.nn.one_hot(expert, probabilities.shape[-1], dtype=jnp.int32) * live[..., None]
            )
            place = (jnp.cumsum(chosen, axis=1) * chosen).sum(axis=-1)
            live = live & (place <= self.capacity)
        return jnp.where(live, slot_of[expert], -1).astype(jnp.int32), probabilities.max(axis=-1)


class Pool(nnx.Module):
    """The copies of one sparse layer."""

    def __init__(self, s: Settings, layer: int, initial: Initial):
        self.ff, self.dispatch = s.ff, s.dispatch
        count, names = s.slots[layer], [name for name, _ in s.config.experts.projections]
        lead = (count,) if s.dispatch.stacked else ()

        def one(slot: int | None) -> nnx.List[Expert]:
            made = []
            for name, shape in s.config.experts.projections:
                value = initial.normal((*lead, *shape), s.products.weights, shape[1] ** -0.5)
                value = value if s.dispatch.stacked else s.products.pack(value)
                made.append(Expert(value, layer=layer, slot=slot, projection=name))
            return nnx.List(made)

        self.names = tuple(names)
        self.copies = nnx.List(
            [one(None)] if s.dispatch.stacked else [one(slot) for slot in range(count)]
        )

    def __call__(self, x: Array, slots: Array, residuals: LayerResiduals | None) -> Array:
        """x: [B, T, H]; slots: int32 [B, T]. Zeros where a slot is not of this pool."""
        copies: list[Copy] = [tuple(w[...] for w in copy) for copy in self.copies]
        if not copies:
            return jnp.zeros_like(x)
        flat = x.reshape(-1, x.shape[-1])
        return self.dispatch(flat, slots.reshape(-1), copies, self.ff, residuals).reshape(x.shape)


class Block(nnx.Module):
    """One layer: self-attention, in the decoder cross-attention, then a feed-forward of one kind or
    the other."""

    def __init__(self, s: Settings, side: Side, n: int, layer: int | None, initial: Initial):
        """layer: number of the sparse layer, None for a dense one."""
        place = f"{side}.block.{n}.layer"
        self.layer, self.cross = layer, side == "decoder"
        self.attention_norm = Norm(s, f"{place}.0.layer_norm.weight")
        self.attention = Attention(s, f"{place}.0.SelfAttention", False, initial)
        if self.cross:
            self.cross_norm = Norm(s, f"{place}.1.layer_norm.weight")
            self.cross_attention = Attention(s, f"{place}.1.EncDecAttention", True, initial)
        last = f"{place}.{2 if self.cross else 1}"
        self.ff_norm = Norm(s, f"{last}.layer_norm.weight")
        if layer is None:
            self.dense = Dense(s, f"{last}.mlp", initial)
        else:
            self.router = Router(s, f"{last}.mlp", initial)
            self.pool = Pool(s, layer, initial)

    def encode(self, x: Array, bias: Array) -> Array:
        """Self-attention over whole rows [B, S, H]."""
        q, k, v = self.attention.split(self.attention.qkv(self.attention_norm(x)), 3)
        return x + self.attention.attend(q, k, v, bias)

    def decode(
        self,
        x: Array,
        bias: Array,
        cache: KeyValues | None,
        places: Array | None,
        encoded: KeyValues,
        encoder_bias: Array,
    ) -> tuple[Array, KeyValues]:
        """Self-attention, then cross-attention. Returns what goes on, and the keys and values to
        keep.

        cache: x of one token a row is put in at `places` int32 [B] (outside the cache: nowhere), or
        x of any number of tokens from place int32 [] on in all rows. None: x is all that there is;
        its own keys and values are returned.
        """
        q, k, v = self.attention.split(self.attention.qkv(self.attention_norm(x)), 3)
        if cache is None:
            keys, values = k, v
        else:
            keys, values = _put(cache[0], k, places), _put(cache[1], v, places)
        x = x + self.attention.attend(q, keys, values, bias)
        (q,) = self.cross_attention.split(self.cross_attention.q(self.cross_norm(x)), 1)
        x = x + self.cross_attention.attend(q, *encoded, encoder_bias)
        return x, (keys, values)

    def route(
        self, x: Array, slot_of: Array, live: Array, together: bool
    ) -> tuple[Array, Array, Array]:
        """Normed tokens [B, T, H], their slots and gates [B, T]. slot_of: int32 [E], the tenant's
        in this layer."""
        normed = self.ff_norm(x)
        return normed, *self.router(normed, slot_of, live, together)

    def feed_dense(self, x: Array) -> Array:
        """The feed-forward of a layer without experts, added to its input."""
        return x + self.dense(self.ff_norm(x))

    def feed(
        self, x: Array, slot_of: Array, live: Array, residuals: Residuals, together: bool = True
    ) -> Array:
        """The feed-forward, added to its input.

        slot_of: int32 [layers, E], the tenant's row of the plan. residuals: what the tenant adds to
            the copies.
        """
        if self.layer is None:
            return self.feed_dense(x)
        normed, slots, gates = self.route(x, slot_of[self.layer], live, together)
        return combine(
            x, self.pool(normed, slots, residuals[self.layer] if residuals else None), gates
        )


def _put(cache: Array, new: Array, places: Any) -> Array:
    """cache [B, N, L, D] with new [B, N, 1, D] at each row's place int32 [B]; a place outside
    0..L-1: nowhere.

    Row by row, so that rows that lie on several devices stay where they are. Place int32 []: new
    [B, N, T, D] from there on in all rows.
    """
    if jnp.ndim(places) == 0:
        whole: Array = lax.dynamic_update_slice_in_dim(
            cache, new.astype(cache.dtype), places, axis=2
        )
        return whole
    put: Callable[..., Array] = jax.vmap(
        lambda row, token, place: row.at[:, place].set(token, mode="drop")
    )
    return put(cache, new[:, :, 0].astype(cache.dtype), places)


def combine(x: Array, found: Array, gates: Array) -> Array:
    """The residual stream plus the experts' outputs, each scaled by its router's probability."""
    return x + found * gates[..., None]


TABLE_OF = {
    "encoder_embedding": "encoder.embed_tokens.weight",
    "decoder_embedding": "decoder.embed_tokens.weight",
    "head": "lm_head.weight",
}


class SwitchTransformer(nnx.Module):
    """Encoder, decoder, embeddings and head."""

    def __init__(self, s: Settings, initial: Initial):
        c = s.config
        self.settings = s
        table, hidden = (s.vocab_size, c.experts.hidden_size), c.experts.hidden_size
        # Three uses of a table, each with one of its own or with the shared one.
        own = {use: name for use, name in TABLE_OF.items() if name in c.own_tables}
        self.shared_uses = tuple(use for use in TABLE_OF if use not in own)
        if self.shared_uses:
            self.shared = Linear(s, ["shared.weight"], table, 1.0, initial)
        for use, name in own.items():
            setattr(
                self, use, Linear(s, [name], table, hidden**-0.5 if use == "head" else 1.0, initial)
            )
        self.encoder_bias = RelativeBias(s, "encoder", initial)
        self.decoder_bias = RelativeBias(s, "decoder", initial)
        layers = {side: dict.fromkeys(range(c.layers(side))) for side in ("encoder", "decoder")}
        numbers = iter(range(c.experts.num_layers))
        for side in ("encoder", "decoder"):
            layers[side] |= {n: next(numbers) for n in c.sparse_layers[side]}
        self.encoder = nnx.List(
            [Block(s, "encoder", n, layer, initial) for n, layer in layers["encoder"].items()]
        )
        self.decoder = nnx.List(
            [Block(s, "decoder", n, layer, initial) for n, layer in layers["decoder"].items()]
        )
        self.encoder_norm = Norm(s, "encoder.final_layer_norm.weight")
        self.decoder_norm = Norm(s, "decoder.final_layer_norm.weight")

    # The parts that a step is made of; `jax_engine.steps` runs them in one compiled call, or one by
    # one where a token may need an expert that is not resident.

    def embed(self, side: Side, ids: Array) -> Array:
        """int32 [B, T] -> [B, T, H]."""
        table = self._table(f"{side}_embedding").weight[...]
        width = self.settings.config.experts.hidden_size
        return self.settings.products.rows(table, ids, width)

    def _table(self, use: str) -> Linear:
        table: Linear = getattr(self, "shared" if use in self.shared_uses else use)
        return table

    def bias_of_encoder(self, live: Array) -> Array:
        """live: bool [B, S]. Position bias and mask, float32 [B, N, S, S]."""
        size = live.shape[1]
        return jnp.where(
            live[:, None, None], self.encoder_bias(jnp.arange(size)[None], size, size), MASKED
        )

    def bias_of_decoder(self, position: Array, tokens: int, cache: int) -> Array:
        """Position bias and causal mask of tokens at position.. over a cache: float32 [1, N, T,
        L]."""
        return self.bias_of_answers((position + jnp.arange(tokens))[None], cache)

    def bias_of_answers(self, queries: Array, keys: int) -> Array:
        """Position bias and causal mask of tokens at `queries` int32 [B, T] over keys at 0..:
        float32 [B, N, T, L]."""
        bias = self.decoder_bias(queries, keys, keys)
        return jnp.where(jnp.arange(keys) <= queries[:, None, :, None], bias, MASKED)

    def bias_to_encoder(self, live: Array) -> Array:
        """live: bool [B, S]. Mask of the cross-attention, float32 [B, 1, 1, S]."""
        return jnp.where(live[:, None, None], 0.0, MASKED).astype(jnp.float32)

    def encoded(self, x: Array) -> list[KeyValues]:
        """The encoder's last hidden states -> what each decoder layer attends to."""
        normed = self.encoder_norm(x)
        return [block.cross_attention.key_values(normed) for block in self.decoder]

    def logits(self, x: Array, vocab_size: Array | int) -> Array:
        """Hidden states [B, T, H] -> float32 [B, T, V]; ids from vocab_size on are padding and get
        MASKED."""
        x = self.decoder_norm(x)
        if (
            self.settings.config.tie_word_embeddings
        ):  # by the config, as transformers: also where the head is its own
            x = x * self.settings.config.experts.hidden_size**-0.5
        found = self._table("head")(x)
        found = found.astype(jnp.float32)
        return jnp.where(jnp.arange(found.shape[-1]) < vocab_size, found, MASKED)

    # Whole passes.

    def encode(
        self, ids: Array, live: Array, slot_of: Array, residuals: Residuals = ()
    ) -> list[KeyValues]:
        """Prompts int32 [B, S] -> each decoder layer's keys and values."""
        x, bias = self.embed("encoder", ids), self.bias_of_encoder(live)
        for block in self.encoder:
            x = block.feed(block.encode(x, bias), slot_of, live, residuals, together=True)
        return self.encoded(x)

    def decode(
        self,
        ids: Array,
        live: Array,
        slot_of: Array,
        cache: Sequence[KeyValues] | None,
        places: Array | None,
        encoded: Sequence[KeyValues],
        encoder_live: Array,
        residuals: Residuals = (),
        together: bool = False,
    ) -> tuple[Array, list[KeyValues]]:
        """Tokens through all decoder layers -> hidden states [B, T, H], and the keys and values to
        keep.

        cache: one token a row, ids int32 [B, 1], is appended to its row's cache at `places` int32
            [B]; rows that are
        not live keep theirs. None: ids int32 [B, T] are whole answers from their start on.
            together: see `Router`.
        """
        x, places, bias, encoder_bias = self.begin_decoder(
            ids, live, places, None if cache is None else cache[0][0].shape[2], encoder_live
        )
        kept = []
        for n, (block, theirs) in enumerate(zip(self.decoder, encoded, strict=True)):
            x, mine = block.decode(
                x, bias, cache[n] if cache else None, places, theirs, encoder_bias
            )
            kept.append(mine)
            x = block.feed(x, slot_of, live, residuals, together)
        return x, kept

    def begin_decoder(
        self, ids: Array, live: Array, places: Array | None, cache: int | None, encoder_live: Array
    ) -> tuple[Array, Array | None, Array, Array]:
        """What the decoder's layers work with: x [B, T, H], places (outside the cache for rows that
        are not live), and the biases of self-attention and cross-attention. cache: its length, None
        without one."""
        if cache is None or places is None:
            queries, keys = jnp.arange(ids.shape[1])[None], ids.shape[1]
        else:
            queries, keys = places[:, None], cache
            places = jnp.where(live[:, 0], places, keys)
        return (
            self.embed("decoder", ids),
            places,
            self.bias_of_answers(queries, keys),
            self.bias_to_encoder(encoder_live),
        )

    def new_cache(self, rows: int, length: int) -> list[KeyValues]:
        """Zeros [B, N, L, D] for each decoder layer."""
        c = self.settings.config
        shape = (rows, c.num_heads, length, c.d_kv)
        return [
            (
                jnp.zeros(shape, self.settings.products.compute),
                jnp.zeros(shape, self.settings.products.compute),
            )
            for _ in range(c.num_decoder_layers)
        ]


def split(module: nnx.Module) -> tuple[Any, Any, Any]:
    """(graphdef, pool state, tenant state)."""
    parts: Any = nnx.split(module, Expert, nnx.Param)
    graphdef, pool, tenant = parts
    return graphdef, pool, tenant


def abstract_model(settings: Settings) -> SwitchTransformer:
    """The model's shapes without any memory: every variable holds a `jax.ShapeDtypeStruct`."""
    make: Callable[[], Any] = lambda: SwitchTransformer(settings, Initial(None))  # noqa: E731
    model: SwitchTransformer = nnx.eval_shape(make)
    return model
