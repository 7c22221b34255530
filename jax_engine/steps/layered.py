"""Steps layer by layer: tokens of several tenants meet at the experts, and misses are seen as soon
as a router has run.

What a tenant computes alone is a `Forward`. It stops at each sparse layer with its normed tokens
and their slots, and goes on when it is given the experts' outputs. `steps.expert_runner` drives
forwards side by side. Between two sparse layers a forward is one compiled call.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from common.families.shape import ENCODER_EMBED, Dense, Sparse
from jax_engine.layers.attention import KeyValues
from jax_engine.models.architecture import Architecture, Leaves, abstract_blocks, split
from jax_engine.models.block import Block, combine
from jax_engine.steps.compilation import CountedJit
from jax_engine.steps.kv_cache import IDS, LIVE, OFFSET, PROMPT
from jax_engine.tenants.ready import ReadyTenant

ExpertOutputs = tuple[Any, Any, Any]
"""What waits to be added to the residual stream: the experts' outputs [B, T, H], their gates [B,
T], and what an observer gave [B, T, H] or None."""


@dataclass(frozen=True)
class RoutedTokens:
    """Where a forward stands: normed tokens [B, T, H], their slots int32 [B, T] and gates [B, T] in
    a sparse layer (its number among the sparse ones)."""

    layer: int
    x: Array
    slots: Array
    gates: Array


Work = Generator[RoutedTokens, ExpertOutputs, Any]


class Forward:
    """Some rows of one tenant on their way through layers.

    misses: int64 [B], counted up. at: where it stands, None when it is done. result: then.
    """

    def __init__(self, tenant: ReadyTenant, rows: int, work: Work):
        self.tenant, self.work = tenant, work
        self.misses = np.zeros(rows, dtype=np.int64)
        self.result: Any = None
        self.at: RoutedTokens | None = None

    def advance(self, found: ExpertOutputs | None) -> None:
        """To the next sparse layer, or to the end."""
        try:
            self.at = next(self.work) if found is None else self.work.send(found)
        except StopIteration as end:
            self.at, self.result = None, end.value


@dataclass(frozen=True)
class _Kind:
    """What decides how a layer is compiled. dense: inner size of a layer without experts."""

    in_decoder: bool
    dense: int | None


class LayeredSteps:
    """Forwards of one architecture."""

    def __init__(self, architecture: Architecture, jit: CountedJit):
        self._architecture, self._jit = architecture, jit
        self._shape, self._first = architecture.spec.shape, architecture.spec.first_of_decoder
        self._kinds = [
            _Kind(n >= self._first, mlp.inner if isinstance(mlp, Dense) else None)
            for n, mlp in enumerate(self._shape.layers)
        ]
        # Blocks of a kind differ in nothing but their weights that matters here.
        self._blocks: dict[_Kind, tuple[Any, Any, Any]] = {}
        for kind, block in zip(self._kinds, abstract_blocks(architecture.spec), strict=True):
            self._blocks.setdefault(kind, split(block))
        self._begin_encoder = jit("begin encoder", self._begin_encoder_body)
        self._resume_encoder = jit("resume encoder", self._resume_encoder_body)
        self._end_encoder = jit("end encoder", self._end_encoder_body)
        self._begin_decoder = jit("begin decoder", self._begin_decoder_body, static_argnums=(4, 5))
        self._end_decoder = jit("end decoder", self._end_decoder_body, static_argnums=5)
        self._add = jit("add", _added)
        self._runs: dict[tuple[_Kind, ...], Callable[..., Any]] = {}

    # Forwards.

    def encode(
        self,
        tenant: ReadyTenant,
        ids: Any,
        lengths: Any,
        *,
        x: Array | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> Forward:
        """Prompts through encoder layers first..last-1.

        Args:
            ids, lengths: int32 [B, S], int32 [B].
            x: what came out of layer first-1.
        Returns:
            A forward whose result is what comes out of the last one, [B, S, H].
        """
        last = self._first if last is None else last
        work = self._encoder_work(tenant, ids, lengths, x, first, last)
        return Forward(tenant, len(ids), work)

    def _encoder_work(
        self, tenant: ReadyTenant, ids: Any, lengths: Any, x: Array | None, first: int, last: int
    ) -> Work:
        if x is None:
            x, bias, live = self._begin_encoder(tenant.outer, ids, lengths)
        else:
            bias, live = self._resume_encoder(tenant.outer, x, lengths)
        waiting = none = _nothing(x)
        for run in self._cut(first, last):
            x, _, routed = self._run(tenant, run, x, waiting, live, bias, (), True)
            waiting = (yield self._routed(run, routed)) if routed else none
        return x if waiting is none else self._add(x, waiting)

    def end_encoder(self, tenant: ReadyTenant, x: Array) -> list[KeyValues]:
        """What comes out of the encoder's last layer [B, S, H] -> what the decoder's layers attend
        to."""
        found: list[KeyValues] = self._end_encoder(tenant.leaves, x)
        return found

    def decode(
        self, tenant: ReadyTenant, cache: list[KeyValues], rows: Any, encoded: Sequence[KeyValues]
    ) -> Forward:
        """As `CompiledSteps.decode`, but that the cache is replaced in the list given, layer by
        layer; the result is (winners, logits)."""
        work = self._decoder_work(tenant, cache, (rows,), encoded, False)
        return Forward(tenant, len(rows), work)

    def answer(
        self,
        tenant: ReadyTenant,
        ids: Any,
        lengths: Any,
        prompts: Any,
        encoded: Sequence[KeyValues],
        every: bool,
    ) -> Forward:
        """As `CompiledSteps.answer`; the result is (winners, logits, kept)."""
        work = self._decoder_work(tenant, None, (ids, lengths, prompts), encoded, every)
        return Forward(tenant, len(ids), work)

    def _decoder_work(
        self,
        tenant: ReadyTenant,
        cache: list[KeyValues] | None,
        rows: tuple[Any, ...],
        encoded: Sequence[KeyValues],
        every: bool,
    ) -> Work:
        size = None if cache is None else cache[0][0].shape[2]
        x, offsets, bias, encoder_bias, live = self._begin_decoder(
            tenant.outer, rows[0], *(rows[1:] or (None, None)), size, encoded[0][0].shape[2]
        )
        kept: list[KeyValues] = []
        waiting = none = _nothing(x)
        for run in self._cut(self._first, len(self._kinds)):
            at = slice(run[0] - self._first, run[-1] + 1 - self._first)
            mine = None if cache is None else cache[at]
            more = (mine, offsets, list(encoded[at]), encoder_bias)
            x, grown, routed = self._run(tenant, run, x, waiting, live, bias, more, every)
            if cache is None:
                kept += grown
            else:
                cache[at] = grown
            waiting = (yield self._routed(run, routed)) if routed else none
        lengths = rows[1] if cache is None and not every else None
        winners, logits = self._end_decoder(
            tenant.outer, x, waiting, lengths, tenant.vocab_size, every
        )
        return (winners, logits) if cache is not None else (winners, logits, [] if every else kept)

    def _sparse(self, layer: int) -> int | None:
        """The number of a layer among the sparse ones."""
        mlp = self._shape.layers[layer]
        return mlp.position if isinstance(mlp, Sparse) else None

    def _cut(self, first: int, last: int) -> list[tuple[int, ...]]:
        """Layers first..last-1 in runs that end at sparse ones."""
        runs: list[tuple[int, ...]] = []
        begun: tuple[int, ...] = ()
        for n in range(first, last):
            begun += (n,)
            if self._sparse(n) is not None:
                runs.append(begun)
                begun = ()
        return [*runs, begun] if begun else runs

    def _routed(self, run: tuple[int, ...], routed: tuple[Array, Array, Array]) -> RoutedTokens:
        layer = self._sparse(run[-1])
        assert layer is not None
        return RoutedTokens(layer, *routed)

    def _run(
        self,
        tenant: ReadyTenant,
        run: tuple[int, ...],
        x: Array,
        waiting: ExpertOutputs,
        live: Array,
        bias: Array,
        more: tuple[Any, ...],
        together: bool,
    ) -> tuple[Array, list[KeyValues], tuple[Array, Array, Array] | None]:
        """What waits is added, then a run of layers up to the router of the last one."""
        kinds, sparse = tuple(self._kinds[n] for n in run), self._sparse(run[-1])
        if kinds not in self._runs:
            side = "decoder" if kinds[0].in_decoder else "encoder"
            self._runs[kinds] = self._jit(
                f"{side} {'dense' if sparse is None else 'sparse'}",
                self._run_body(kinds),
                donate_argnums=0,
                static_argnums=8,
            )
        slot_of = None if sparse is None else tenant.slots[sparse]
        leaves = tuple(tenant.layer(n) for n in run)
        cache, *rest = more or (None,)
        found: tuple[Array, list[KeyValues], Any] = self._runs[kinds](
            cache, leaves, x, waiting, live, bias, slot_of, tuple(rest), together
        )
        return found

    # What is compiled.

    def _run_body(self, kinds: tuple[_Kind, ...]) -> Callable[..., Any]:
        def run(
            cache: list[KeyValues] | None,
            leaves: tuple[Leaves, ...],
            x: Array,
            waiting: ExpertOutputs,
            live: Array,
            bias: Array,
            slot_of: Array | None,
            more: tuple[Any, ...],
            together: bool,
        ) -> tuple[Array, list[KeyValues], tuple[Array, Array, Array] | None]:
            x = _added(x, waiting)
            kept: list[KeyValues] = []
            routed = None
            for i, kind in enumerate(kinds):
                # The pool is not looked at here: its abstract leaves stand in.
                graphdef, pool, tenant = self._blocks[kind]
                block: Block = nnx.merge(
                    graphdef, pool, jax.tree.unflatten(jax.tree.structure(tenant), leaves[i])
                )
                if kind.in_decoder:
                    offsets, encoded, encoder_bias = more
                    mine = None if cache is None else cache[i]
                    x, grown = block.decode(x, bias, mine, offsets, encoded[i], encoder_bias)
                    kept.append(grown)
                else:
                    x = block.encode(x, bias)
                if kind.dense is None:
                    assert slot_of is not None
                    routed = block.route(x, slot_of, live, together)
                else:
                    x = block.feed_dense(x)
            return x, kept, routed

        return run

    def _begin_encoder_body(
        self, outer: Leaves, ids: Array, lengths: Array
    ) -> tuple[Array, Array, Array]:
        model = self._architecture.outer_model(outer)
        live = jnp.arange(ids.shape[1]) < lengths[:, None]
        return model.embed(ENCODER_EMBED, ids), model.bias_of_encoder(live), live

    def _resume_encoder_body(self, outer: Leaves, x: Array, lengths: Array) -> tuple[Array, Array]:
        live = jnp.arange(x.shape[1]) < lengths[:, None]
        return self._architecture.outer_model(outer).bias_of_encoder(live), live

    def _end_encoder_body(self, tenant: Leaves, x: Array) -> list[KeyValues]:
        pool = tuple(jax.tree.leaves(self._architecture.pool_state))
        return self._architecture.model(pool, tenant).encoded(x)

    def _begin_decoder_body(
        self,
        outer: Leaves,
        rows: Array,
        lengths: Array | None,
        prompts: Array | None,
        cache: int | None,
        prompt: int,
    ) -> tuple[Any, ...]:
        """What the decoder's layers work with.

        Args:
            rows: with a cache int32 [B, 4], see `steps.kv_cache.IDS`; else ids int32 [B, T].
        Returns:
            x, offsets, both biases, and which tokens are live, bool [B, T].
        """
        if lengths is None or prompts is None:
            ids, offsets = rows[:, IDS, None], rows[:, OFFSET]
            live, prompts = rows[:, LIVE, None] > 0, rows[:, PROMPT]
        else:
            ids, offsets, live = rows, None, jnp.arange(rows.shape[1]) < lengths[:, None]
        encoder_live = jnp.arange(prompt) < prompts[:, None]
        model = self._architecture.outer_model(outer)
        return *model.begin_decoder(ids, live, offsets, cache, encoder_live), live

    def _end_decoder_body(
        self,
        outer: Leaves,
        x: Array,
        waiting: ExpertOutputs,
        lengths: Array | None,
        vocab_size: Array,
        every: bool,
    ) -> tuple[Array, Array]:
        x = _added(x, waiting)
        if lengths is not None:
            x = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
        logits = self._architecture.outer_model(outer).logits(x, vocab_size)
        logits = logits if every else logits[:, 0]
        return jnp.argmax(logits, axis=-1), logits


def _nothing(x: Array) -> ExpertOutputs:
    """What waits before the first sparse layer: zeros, so that a run of layers is compiled for one
    form alone."""
    return np.zeros(x.shape, x.dtype), np.zeros(x.shape[:2], x.dtype), None


def _added(x: Array, waiting: ExpertOutputs) -> Array:
    found, gates, more = waiting
    x = combine(x, found, gates)
    return x if more is None else x + more
