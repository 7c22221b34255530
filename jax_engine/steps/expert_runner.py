"""Forwards side by side: those that wait at the same layer go through its experts in one call.

So a slot's weights are read once for all of them. Tokens meet on the host, where only those that an
expert takes are put together. The shape of that depends on how many there may be (`joint_bucket`)
and not on whose they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jax import Array

from common.errors import EngineError
from common.serving.backend import Observer
from jax_engine.experts.pool import DevicePool
from jax_engine.experts.residuals import LayerResiduals, LoadedResiduals
from jax_engine.models.architecture import Leaves
from jax_engine.models.spec import ModelSpec
from jax_engine.steps.buckets import joint_bucket
from jax_engine.steps.compilation import CountedJit
from jax_engine.steps.layered import Forward


class ExpertRunner:
    """A layer's experts for the tokens of all forwards that wait at it."""

    def __init__(self, spec: ModelSpec, jit: CountedJit):
        self._spec = spec
        self._together = jit("experts", self._experts_body)
        self._missing = jit("missing expert", self._missing_body)

    def _experts_body(
        self, copies: tuple[Leaves, ...], x: Array, slots: Array, residuals: LayerResiduals | None
    ) -> Array:
        return self._spec.dispatch(x, slots, copies, self._spec.feed_forward, residuals)

    def _missing_body(self, copy: Leaves, x: Array, slots: Array) -> Array:
        """x [T, H] through a copy that is not in the pool; slots: 0, or -1 for no expert."""
        if self._spec.dispatch.stacked:
            return self._spec.feed_forward(x, tuple(w[0] for w in copy))
        return self._spec.dispatch(x, slots, (copy,), self._spec.feed_forward)

    def run(
        self,
        forwards: Iterable[Forward],
        pool: DevicePool,
        residuals: LoadedResiduals,
        observer: Observer | None,
    ) -> None:
        """Bring forwards to their ends, those behind first."""
        waiting = list(forwards)
        for forward in waiting:
            forward.advance(None)
        while waiting := [forward for forward in waiting if forward.at is not None]:
            layer = min(forward.at.layer for forward in waiting if forward.at is not None)
            here = [forward for forward in waiting if forward.at and forward.at.layer == layer]
            self._feed(layer, here, pool, residuals, observer)

    def _feed(
        self,
        layer: int,
        forwards: Sequence[Forward],
        pool: DevicePool,
        residuals: LoadedResiduals,
        observer: Observer | None,
    ) -> None:
        """All forwards' tokens of a layer through its experts; what is missing is fetched."""
        at = [forward.at for forward in forwards if forward.at is not None]
        slots = [np.asarray(a.slots) for a in at]
        xs = [np.asarray(a.x) for a in at]
        added: list[np.ndarray | None] = [None] * len(at)
        if observer is not None:
            experts = pool.expert_of_slot(layer)
            for i, forward in enumerate(forwards):
                gates = np.asarray(at[i].gates)
                name = forward.tenant.name
                added[i] = _show(observer, name, experts, layer, xs[i], slots[i], gates)
        founds = [np.zeros_like(x) for x in xs]
        self._feed_resident(layer, forwards, pool, residuals, xs, slots, founds)
        resident = pool.num_slots(layer)
        for forward, x, chosen, found in zip(forwards, xs, slots, founds, strict=True):
            missed = chosen >= resident
            if missed.any():
                forward.misses += missed.sum(axis=1)
                self._add_missing(pool, forward.tenant.index, layer, x, chosen, found)
        for forward, a, found, more in zip(forwards, at, founds, added, strict=True):
            forward.advance((found, a.gates, more))

    def _feed_resident(
        self,
        layer: int,
        forwards: Sequence[Forward],
        pool: DevicePool,
        residuals: LoadedResiduals,
        xs: Sequence[np.ndarray],
        slots: Sequence[np.ndarray],
        founds: Sequence[np.ndarray],
    ) -> None:
        """What tokens get from resident copies, put into `founds`."""
        resident = pool.num_slots(layer)
        if not resident:
            return
        taken = [np.nonzero((s >= 0) & (s < resident)) for s in slots]
        joint = residuals.joint(layer)
        if joint is not None and self._spec.dispatch.stacked:
            # Each device of a mesh has some of the slots, and tells them by their numbers: a tenant
            # at a time.
            for i, forward in enumerate(forwards):
                own, one = forward.tenant.residuals[layer], slice(i, i + 1)
                self._dispatch(pool, layer, xs[one], slots[one], taken[one], founds[one], own)
            return
        if joint is not None:
            slots = [
                s + forward.tenant.index * resident
                for forward, s in zip(forwards, slots, strict=True)
            ]
        self._dispatch(pool, layer, xs, slots, taken, founds, joint)

    def _dispatch(
        self,
        pool: DevicePool,
        layer: int,
        xs: Sequence[np.ndarray],
        slots: Sequence[np.ndarray],
        taken: Sequence[tuple[np.ndarray, ...]],
        founds: Sequence[np.ndarray],
        residuals: LayerResiduals | None,
    ) -> None:
        """The tokens that are taken, in one call; their outputs are put into `founds`."""
        counts = [len(t[0]) for t in taken]
        # If it is 0, the call is made all the same: tokens must not decide when it is compiled.
        total = sum(counts)
        x = np.zeros((self._bucket(xs), xs[0].shape[-1]), dtype=xs[0].dtype)
        numbers = np.full(len(x), -1, dtype=np.int32)
        np.concatenate([v[t] for v, t in zip(xs, taken, strict=True)], out=x[:total])
        np.concatenate([s[t] for s, t in zip(slots, taken, strict=True)], out=numbers[:total])
        out = np.asarray(self._together(pool.copies[layer], x, numbers, residuals))
        first = 0
        for t, count, found in zip(taken, counts, founds, strict=True):
            found[t] = out[first : first + count]
            first += count

    def _add_missing(
        self,
        pool: DevicePool,
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
        devices = self._spec.dispatch.data_devices
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
    """Show the tokens that an expert takes to the observer.

    Args:
        experts: int64 [slots + experts], the expert that each slot number stands for.
    Returns:
        What it answers as [B, T, H], zeros elsewhere.
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
