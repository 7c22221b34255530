"""Steps layer by layer: tokens of several tenants meet at the experts, and misses are seen as soon
as a router has run.

What a tenant computes alone is a `Pass`: a generator that stops at each sparse layer with its
normed tokens and their slots, and goes on when it is given the experts' outputs. `Experts.run`
drives passes side by side: those that wait at the same layer go through its experts in one call, so
a slot's weights are read once for all of them. Between two sparse layers a pass is one compiled
call. Tokens meet on the host, where only those that an expert takes are put together: the shape of
that depends on how many there may be (`joint_bucket`) and not on whose they are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.errors import EngineError
from common.families.switch_transformers import Side
from common.serving.backend import Observer
from jax_engine.experts.pool import ExpertPool
from jax_engine.experts.residuals import LayerResiduals, LoadedResiduals
from jax_engine.models.encoder_decoder import (
    Block,
    KeyValues,
    Settings,
    abstract_model,
    combine,
    split,
)
from jax_engine.steps.buckets import joint_bucket
from jax_engine.steps.compiled import Compiled
from jax_engine.tenants.ready import Architecture, Leaves, ReadyTenant

Array = jax.Array

Found = tuple[Any, Any, Any]
"""What waits to be added to the residual stream: the experts' outputs [B, T, H], their gates [B,
T], and what an observer gave [B, T, H] or None."""


@dataclass(frozen=True)
class Routed:
    """Where a pass stands: normed tokens [B, T, H], their slots int32 [B, T] and gates [B, T] in a
    sparse layer."""

    layer: int
    x: Array
    slots: Array
    gates: Array


Work = Generator[Routed, Found, Any]


class Pass:
    """Some rows of one tenant on their way through layers. misses: int64 [B], counted up. result:
    when it is done."""

    def __init__(self, tenant: ReadyTenant, rows: int, work: Work):
        self.tenant, self.work = tenant, work
        self.misses = np.zeros(rows, dtype=np.int64)
        self.result: Any = None
        self.at: Routed | None = None

    def advance(self, found: Found | None) -> None:
        """To the next sparse layer, or to the end."""
        try:
            self.at = next(self.work) if found is None else self.work.send(found)
        except StopIteration as end:
            self.at, self.result = None, end.value


class Layered:
    """Passes of one architecture."""

    def __init__(self, architecture: Architecture, compiled: Compiled):
        self._architecture, self._compiled = architecture, compiled
        self._layers = architecture.settings.config.sparse_layers
        skeleton = abstract_model(architecture.settings)
        sides: tuple[Side, Side] = ("encoder", "decoder")
        # Blocks of a kind differ in nothing but their weights that matters here.
        self._kinds: dict[tuple[Side, bool], tuple[Any, Any, Any]] = {}
        for side in sides:
            for block in getattr(skeleton, side):
                self._kinds.setdefault((side, block.layer is not None), split(block))
        self._begin_encoder = compiled("begin encoder", self._begin_encoder_body)
        self._resume_encoder = compiled("resume encoder", self._resume_encoder_body)
        self._end_encoder = compiled("end encoder", self._end_encoder_body)
        self._begin_decoder = compiled(
            "begin decoder", self._begin_decoder_body, static_argnums=(4, 5)
        )
        self._end_decoder = compiled("end decoder", self._end_decoder_body, static_argnums=5)
        self._add = compiled("add", _added)
        self._runs: dict[tuple[Side, tuple[bool, ...]], Callable[..., Any]] = {}

    # Passes.

    def encode(
        self,
        tenant: ReadyTenant,
        ids: Any,
        lengths: Any,
        rows: int,
        *,
        x: Array | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> Pass:
        """Prompts int32 [B, S] of these lengths int32 [B] through encoder layers first..last-1.

        x: what came out of layer first-1. The result is what comes out of the last one, [B, S, H].
        """
        last = self._architecture.settings.config.num_layers if last is None else last
        return Pass(tenant, rows, self._encoder_work(tenant, ids, lengths, x, first, last))

    def _encoder_work(
        self, tenant: ReadyTenant, ids: Any, lengths: Any, x: Array | None, first: int, last: int
    ) -> Work:
        if x is None:
            x, bias, live = self._begin_encoder(tenant.outer, ids, lengths)
        else:
            bias, live = self._resume_encoder(tenant.outer, x, lengths)
        waiting = none = _nothing(x)
        for numbers in self._cut("encoder", first, last):
            x, _, routed = self._run("encoder", tenant, numbers, x, waiting, live, bias, (), True)
            waiting = (yield self._routed("encoder", numbers[-1], routed)) if routed else none
        return x if waiting is none else self._add(x, waiting)

    def end_encoder(self, tenant: ReadyTenant, x: Array) -> list[KeyValues]:
        """What comes out of the encoder's last layer [B, S, H] -> what the decoder's layers attend
        to."""
        found: list[KeyValues] = self._end_encoder(tenant.leaves, x)
        return found

    def decode(
        self, tenant: ReadyTenant, cache: list[KeyValues], rows: Any, encoded: Sequence[KeyValues]
    ) -> Pass:
        """As `Steps.decode`, but that the cache is replaced in the list given, layer by layer; the
        result is (winners, logits)."""
        return Pass(tenant, len(rows), self._decoder_work(tenant, cache, (rows,), encoded, False))

    def answer(
        self,
        tenant: ReadyTenant,
        ids: Any,
        lengths: Any,
        prompts: Any,
        encoded: Sequence[KeyValues],
        every: bool,
    ) -> Pass:
        """As `Steps.answer`; the result is (winners, logits, kept)."""
        return Pass(
            tenant,
            len(ids),
            self._decoder_work(tenant, None, (ids, lengths, prompts), encoded, every),
        )

    def _decoder_work(
        self,
        tenant: ReadyTenant,
        cache: list[KeyValues] | None,
        rows: tuple[Any, ...],
        encoded: Sequence[KeyValues],
        every: bool,
    ) -> Work:
        size = None if cache is None else cache[0][0].shape[2]
        x, places, bias, encoder_bias, live = self._begin_decoder(
            tenant.outer, rows[0], *(rows[1:] or (None, None)), size, encoded[0][0].shape[2]
        )
        kept: list[KeyValues] = []
        waiting = none = _nothing(x)
        for numbers in self._cut("decoder", 0, len(encoded)):
            mine = None if cache is None else [cache[n] for n in numbers]
            more = (mine, places, [encoded[n] for n in numbers], encoder_bias)
            x, grown, routed = self._run(
                "decoder", tenant, numbers, x, waiting, live, bias, more, every
            )
            if cache is None:
                kept += grown
            else:
                cache[numbers[0] : numbers[-1] + 1] = grown
            waiting = (yield self._routed("decoder", numbers[-1], routed)) if routed else none
        lengths = rows[1] if cache is None and not every else None
        winners, logits = self._end_decoder(
            tenant.outer, x, waiting, lengths, tenant.vocab_size, every
        )
        return (winners, logits) if cache is not None else (winners, logits, [] if every else kept)

    def _cut(self, side: Side, first: int, last: int) -> list[tuple[int, ...]]:
        """Layers first..last-1 in runs that end at sparse ones."""
        runs: list[tuple[int, ...]] = []
        begun: tuple[int, ...] = ()
        for n in range(first, last):
            begun += (n,)
            if n in self._layers[side]:
                runs.append(begun)
                begun = ()
        return [*runs, begun] if begun else runs

    def _routed(self, side: Side, n: int, routed: tuple[Array, Array, Array]) -> Routed:
        before = 0 if side == "encoder" else len(self._layers["encoder"])
        return Routed(before + self._layers[side].index(n), *routed)

    def _run(
        self,
        side: Side,
        tenant: ReadyTenant,
        numbers: tuple[int, ...],
        x: Array,
        waiting: Found,
        live: Array,
        bias: Array,
        more: tuple[Any, ...],
        together: bool,
    ) -> tuple[Array, list[KeyValues], tuple[Array, Array, Array] | None]:
        """What waits is added, then a run of layers up to the router of the last one."""
        sparse = tuple(n in self._layers[side] for n in numbers)
        if (side, sparse) not in self._runs:
            self._runs[side, sparse] = self._compiled(
                f"{side} {'sparse' if sparse[-1] else 'dense'}",
                self._run_body(side, sparse),
                donate_argnums=0,
                static_argnums=8,
            )
        before = 0 if side == "encoder" else len(self._layers["encoder"])
        slot_of = (
            tenant.slots[before + self._layers[side].index(numbers[-1])] if sparse[-1] else None
        )
        leaves = tuple(tenant.layer(side, n) for n in numbers)
        cache, *rest = more or (None,)
        found: tuple[Array, list[KeyValues], Any] = self._runs[side, sparse](
            cache, leaves, x, waiting, live, bias, slot_of, tuple(rest), together
        )
        return found

    # What is compiled.

    def _run_body(self, side: Side, sparse: tuple[bool, ...]) -> Callable[..., Any]:
        kinds = [self._kinds[side, s] for s in sparse]

        def run(
            cache: list[KeyValues] | None,
            leaves: tuple[Leaves, ...],
            x: Array,
            waiting: Found,
            live: Array,
            bias: Array,
            slot_of: Array | None,
            more: tuple[Any, ...],
            together: bool,
        ) -> tuple[Array, list[KeyValues], tuple[Array, Array, Array] | None]:
            x = _added(x, waiting)
            kept: list[KeyValues] = []
            routed = None
            for i, (graphdef, pool, tenant) in enumerate(kinds):
                # The pool is not looked at here: its abstract leaves stand in.
                block: Block = nnx.merge(
                    graphdef, pool, jax.tree.unflatten(jax.tree.structure(tenant), leaves[i])
                )
                if side == "encoder":
                    x = block.encode(x, bias)
                else:
                    places, encoded, encoder_bias = more
                    mine = None if cache is None else cache[i]
                    x, grown = block.decode(x, bias, mine, places, encoded[i], encoder_bias)
                    kept.append(grown)
                if sparse[i]:
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
        return model.embed("encoder", ids), model.bias_of_encoder(live), live

    def _resume_encoder_body(self, outer: Leaves, x: Array, lengths: Array) -> tuple[Array, Array]:
        live = jnp.arange(x.shape[1]) < lengths[:, None]
        return self._architecture.outer_model(outer).bias_of_encoder(live), live

    def _end_encoder_body(self, tenant: Leaves, x: Array) -> list[KeyValues]:
        pool = tuple(jax.tree.leaves(self._architecture.pool_state))
        found: list[KeyValues] = self._architecture.model(pool, tenant).encoded(x)
        return found

    def _begin_decoder_body(
        self,
        outer: Leaves,
        rows: Array,
        lengths: Array | None,
        prompts: Array | None,
        cache: int | None,
        prompt: int,
    ) -> tuple[Array, ...]:
        """rows: with a cache int32 [B, 4], see `jax_engine.steps.steps.IDS`; else ids int32 [B, T].
        Returns x, places, both biases, and which tokens are live, bool [B, T]."""
        if lengths is None or prompts is None:
            ids, places, live, prompts = rows[:, :1], rows[:, 1], rows[:, 2:3] > 0, rows[:, 3]
        else:
            ids, places, live = rows, None, jnp.arange(rows.shape[1]) < lengths[:, None]
        encoder_live = jnp.arange(prompt) < prompts[:, None]
        model = self._architecture.outer_model(outer)
        return *model.begin_decoder(ids, live, places, cache, encoder_live), live

    def _end_decoder_body(
        self,
        outer: Leaves,
        x: Array,
        waiting: Found,
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


def _nothing(x: Array) -> Found:
    """What waits before the first sparse layer: zeros, so that a run of layers is compiled for one
    form alone."""
    return np.zeros(x.shape, x.dtype), np.zeros(x.shape[:2], x.dtype), None


def _added(x: Array, waiting: Found) -> Array:
    found, gates, more = waiting
    x = combine(x, found, gates)
    return x if more is None else x + more


class Experts:
    """A layer's experts for the tokens of all passes that wait at it."""

    def __init__(self, settings: Settings, compiled: Compiled):
        self._settings = settings
        self._together = compiled("experts", self._experts_body)
        self._missing = compiled("missing expert", self._missing_body)

    def _experts_body(
        self, copies: tuple[Leaves, ...], x: Array, slots: Array, residuals: LayerResiduals | None
    ) -> Array:
        return self._settings.dispatch(x, slots, copies, self._settings.ff, residuals)

    def _missing_body(self, copy: Leaves, x: Array, slots: Array) -> Array:
        """x [T, H] through a copy that is not in the pool; slots: 0, or -1 for no expert."""
        if self._settings.dispatch.stacked:
            return self._settings.ff(x, tuple(w[0] for w in copy))
        return self._settings.dispatch(x, slots, (copy,), self._settings.ff)

    def run(
        self,
        passes: Iterable[Pass],
        pool: ExpertPool,
        residuals: LoadedResiduals,
        observer: Observer | None,
    ) -> None:
        """Bring passes to their ends, those behind first."""
        waiting = list(passes)
        for one in waiting:
            one.advance(None)
        while waiting := [one for one in waiting if one.at is not None]:
            layer = min(one.at.layer for one in waiting if one.at is not None)
            self._feed(
                layer,
                [one for one in waiting if one.at and one.at.layer == layer],
                pool,
                residuals,
                observer,
            )

    def _feed(
        self,
        layer: int,
        passes: Sequence[Pass],
        pool: ExpertPool,
        residuals: LoadedResiduals,
        observer: Observer | None,
    ) -> None:
        """All passes' tokens of a layer through its experts; what is missing is fetched."""
        resident = pool.num_slots(layer)
        at = [one.at for one in passes if one.at is not None]
        slots = [np.asarray(a.slots) for a in at]
        xs = [np.asarray(a.x) for a in at]
        added = (
            [None] * len(at)
            if observer is None
            else [
                _show(
                    observer,
                    one.tenant.name,
                    pool.expert_of_slot(layer),
                    layer,
                    x,
                    s,
                    np.asarray(a.gates),
                )
                for one, a, x, s in zip(passes, at, xs, slots, strict=True)
            ]
        )
        founds = [np.zeros_like(x) for x in xs]
        if resident:
            taken = [np.nonzero((s >= 0) & (s < resident)) for s in slots]
            joint = residuals.joint(layer)
            if joint is not None and self._settings.dispatch.stacked:
                # Each device of a mesh has some of the slots, and tells them by their numbers: a
                # tenant at a time.
                for i, one in enumerate(passes):
                    own = one.tenant.residuals[layer]
                    self._dispatch(
                        pool,
                        layer,
                        xs[i : i + 1],
                        slots[i : i + 1],
                        taken[i : i + 1],
                        founds[i:],
                        own,
                    )
            else:
                if joint is not None:
                    slots_of_all = [
                        s + one.tenant.index * resident
                        for one, s in zip(passes, slots, strict=True)
                    ]
                    self._dispatch(pool, layer, xs, slots_of_all, taken, founds, joint)
                else:
                    self._dispatch(pool, layer, xs, slots, taken, founds, None)
        for one, x, chosen, found in zip(passes, xs, slots, founds, strict=True):
            missed = chosen >= resident
            if missed.any():
                one.misses += missed.sum(axis=1)
                self._add_missing(pool, one.tenant.index, layer, x, chosen, found)
        for one, a, found, more in zip(passes, at, founds, added, strict=True):
            one.advance((found, a.gates, more))

    def _dispatch(
        self,
        pool: ExpertPool,
        layer: int,
        xs: Sequence[np.ndarray],
        slots: Sequence[np.ndarray],
        taken: Sequence[tuple[np.ndarray, ...]],
        founds: Sequence[np.ndarray],
        residuals: LayerResiduals | None,
    ) -> None:
        """The tokens that are taken, in one call; their outputs are put into `founds`."""
        counts = [len(t[0]) for t in taken]
        total = sum(
            counts
        )  # if it is 0, the call is made all the same: tokens must not decide when it is compiled
        x = np.zeros((self._bucket(xs), xs[0].shape[-1]), dtype=xs[0].dtype)
        numbers = np.full(len(x), -1, dtype=np.int32)
        np.concatenate([v[t] for v, t in zip(xs, taken, strict=True)], out=x[:total])
        np.concatenate([s[t] for s, t in zip(slots, taken, strict=True)], out=numbers[:total])
        out = np.asarray(self._together(pool.copies[layer], x, numbers, residuals))
        first = 0
        for t, count, found in zip(taken, counts, founds, strict=False):
            found[t] = out[first : first + count]
            first += count

    def _add_missing(
        self,
        pool: ExpertPool,
        tenant: int,
        layer: int,
        x: np.ndarray,
        slots: np.ndarray,
        found: np.ndarray,
    ) -> None:
        """What a tenant's tokens get from its own experts that are not resident."""
        resident = pool.num_slots(layer)
        for number in np.unique(slots[slots >= resident]).tolist():
            copy = pool.fetch(tenant, layer, number - resident)
            rows = np.nonzero(slots == number)
            count = len(rows[0])
            some = np.zeros((self._bucket([x]), x.shape[-1]), dtype=x.dtype)
            some[:count] = x[rows]
            mine = np.where(np.arange(len(some)) < count, 0, -1).astype(np.int32)
            found[rows] = np.asarray(self._missing(copy, some, mine))[:count]

    def _bucket(self, xs: Sequence[np.ndarray]) -> int:
        """Rows for the tokens of these arrays, as if all were taken: which are must not decide what
        is compiled."""
        devices = self._settings.dispatch.data_devices
        return -(-joint_bucket(sum(x.shape[0] * x.shape[1] for x in xs)) // devices) * devices


def _show(
    observer: Observer,
    tenant: str,
    experts: np.ndarray,
    layer: int,
    x: np.ndarray,
    slots: np.ndarray,
    gates: np.ndarray,
) -> np.ndarray | None:
    """Show the tokens that an expert takes to the observer; what it answers as [B, T, H], zeros
    elsewhere.

    experts: int64 [slots + experts], the expert that each slot number stands for.
    """
    taken = slots >= 0
    if not taken.any():
        return None
    values, weights = x[taken].astype(np.float32), gates[taken].astype(np.float32)
    answer = observer(tenant, layer, values, experts[slots[taken]][:, None], weights[:, None])
    if answer is None:
        return None
    if answer.shape != values.shape:
        raise EngineError(
            f"the observer returned {list(answer.shape)}, expected [tokens, hidden] = "
            f"{values.shape}"
        )
    added = np.zeros(x.shape, dtype=np.float32)
    added[taken] = answer
    return added.astype(x.dtype)
