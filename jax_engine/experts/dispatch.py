"""Expert dispatch: tokens, and the slot of each, through the copies of a layer's pool.

Ways to do it behind one face; what each is for was measured (benchmarks/switch_dispatch.py,
docs/results):
- NativeDispatch: one call of our own CPU kernels, which read the slots that are hit and nothing
  else;
- LoopDispatch: XLA on one CPU device, one array a slot; a loop over blocks of sorted tokens of one
  slot, each a `lax.switch` to its slot's product, so no weight is copied and time does not grow
  with the pool;
- MeshDispatch: stacked slots sharded over the mesh axis `expert`, tokens over `data`; also one
  accelerator;
- DenseDispatch: every expert on every token, then a selection; differentiable and simple, for
  training small models.

Where a tenant has residuals beside the copies of a layer, their products are added before the
activation and to the output (`experts.residuals`). DenseDispatch does without. For tokens of
several tenants the tables of their residuals lie one after the other, S rows each, and number v
stands for slot v mod S with row v of the tables.

Legend: tokens T, slots S, hidden H, intermediate I. A slot outside 0..S-1 gives zeros.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_engine.experts.residuals import LayerResiduals

if TYPE_CHECKING:
    from jax_engine.native import Kernels

Array = jax.Array
Matrices = tuple[Array, ...]
"""The projections of one copy: (wi, wo) or (wi_0, wi_1, wo); stacked ones have a leading axis of
slots."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


@dataclass(frozen=True)
class FeedForward:
    """What an expert computes: `act(x wi) wo`, or gated `(act(x wi_0) * (x wi_1)) wo`."""

    activation: str
    gated: bool
    intermediate_size: int

    def __call__(self, x: Array, copy: Matrices) -> Array:
        """[T, H] -> [T, H] through one copy of plain [out, in] matrices."""
        return self.last(self.hidden(self.inner(x, copy)), copy)

    def inner(self, x: Array, copy: Matrices) -> list[Array]:
        """What comes before the activation: [T, H] -> one [T, I], or two of a gated expert."""
        return [jnp.einsum("tk,nk->tn", x, w.astype(x.dtype)) for w in copy[:-1]]

    def hidden(self, inner: Sequence[Array]) -> Array:
        act = ACTIVATIONS[self.activation]
        return act(inner[0]) * inner[1] if self.gated else act(inner[0])

    def last(self, hidden: Array, copy: Matrices) -> Array:
        """[T, I] -> [T, H]."""
        return jnp.einsum("tk,nk->tn", hidden, copy[-1].astype(hidden.dtype))


class Dispatch(ABC):
    """stacked: whether a layer's copies are one array a projection [S, out, in], or one a slot.

    data_devices: tokens come in a multiple of it.
    """

    stacked: bool
    data_devices = 1

    @abstractmethod
    def __call__(
        self,
        x: Array,
        slots: Array,
        copies: Sequence[Matrices],
        ff: FeedForward,
        residuals: LayerResiduals | None = None,
    ) -> Array:
        """x: [T, H]; slots: int32 [T]; copies: one a slot, or a single stacked one. Returns [T, H].

        residuals: what the tenant, or each of several, adds to the copies of this layer; None:
        nothing is compiled for them. MeshDispatch takes one tenant's alone.
        """

    def single(self, x: Array, copy: Matrices, ff: FeedForward) -> Array:
        """All tokens [T, H] through one copy, such as a dense layer's."""
        return ff(x, copy)


@dataclass(frozen=True)
class NativeDispatch(Dispatch):
    """Our own CPU kernels; copies are packed."""

    kernels: Kernels
    stacked = False

    def __call__(
        self,
        x: Array,
        slots: Array,
        copies: Sequence[Matrices],
        ff: FeedForward,
        residuals: LayerResiduals | None = None,
    ) -> Array:
        return self.kernels.experts(
            x,
            slots,
            copies,
            ff.activation,
            intermediate_size=ff.intermediate_size,
            gated=ff.gated,
            residuals=None if residuals is None else (residuals.words, residuals.table),
        )

    def single(self, x: Array, copy: Matrices, ff: FeedForward) -> Array:
        return self(x, jnp.zeros(len(x), jnp.int32), (copy,), ff)


@dataclass(frozen=True)
class LoopDispatch(Dispatch):
    """One array a slot, on one device."""

    stacked = False

    def __call__(
        self,
        x: Array,
        slots: Array,
        copies: Sequence[Matrices],
        ff: FeedForward,
        residuals: LayerResiduals | None = None,
    ) -> Array:
        if residuals is None:
            branches = [lambda rows, copy=copy: ff(rows, copy) for copy in copies]
            return over_blocks(
                x, slots, len(copies), lambda rows, slot: lax.switch(slot, branches, rows)
            )
        # A residual's product is the same code for all slots, so it stands beside the branches, not
        # in each.
        first = [lambda rows, copy=copy: ff.inner(rows, copy) for copy in copies]
        last = [lambda hidden, copy=copy: ff.last(hidden, copy) for copy in copies]

        def product(rows: Array, number: Array) -> Array:
            slot = number % len(copies)
            inner = lax.switch(slot, first, rows)
            return through(residuals, ff, rows, number, inner, partial(lax.switch, slot, last))

        return over_blocks(x, slots, residuals.table.shape[0], product)


@dataclass(frozen=True)
class MeshDispatch(Dispatch):
    """Stacked slots over the axis `expert`, tokens over the axis `data`.

    Every device computes, for its own tokens, what its own slots contribute, and the contributions
    are summed over `expert`. With static shapes and nothing dropped, an all-to-all would have to
    provide for all of a device's tokens going to one other device, so it would move at least as
    much as this sum does. Weights stay where they are.
    Residuals are on every device: they are a few per cent of the copies.
    """

    mesh: Mesh
    stacked = True

    @property
    def data_devices(self) -> int:  # type: ignore[override]
        return int(self.mesh.shape["data"])

    def __call__(
        self,
        x: Array,
        slots: Array,
        copies: Sequence[Matrices],
        ff: FeedForward,
        residuals: LayerResiduals | None = None,
    ) -> Array:
        (stack,) = copies
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"

        def local(x: Array, slots: Array, residuals: LayerResiduals | None, *stack: Array) -> Array:
            count = stack[0].shape[0]
            first = lax.axis_index("expert") * count
            mine = slots - first
            x = lax.pcast(x, ("expert",), to="varying")  # what is summed differs along this axis
            if on_cpu:

                def product(rows: Array, slot: Array) -> Array:
                    copy = tuple(lax.dynamic_index_in_dim(w, slot, keepdims=False) for w in stack)
                    if residuals is None:
                        return ff(rows, copy)
                    inner = ff.inner(rows, copy)
                    last = partial(ff.last, copy=copy)
                    return through(residuals, ff, rows, first + slot, inner, last)

                found = over_blocks(x, mine, count, product)
            else:
                found = _ragged(x, mine, stack, ff, residuals, first)
            summed: Array = lax.psum(found, "expert")
            return summed

        tokens, experts = PartitionSpec("data"), PartitionSpec("expert")
        specs = (tokens, tokens, PartitionSpec(), *[experts] * len(stack))
        run = jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=tokens)
        return run(x, slots, residuals, *stack)

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Sharding of an array whose leading dimensions lie along these axes."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))


@dataclass(frozen=True)
class DenseDispatch(Dispatch):
    """Every expert on every token: S times the work, and gradients for all."""

    stacked = True

    def __call__(
        self,
        x: Array,
        slots: Array,
        copies: Sequence[Matrices],
        ff: FeedForward,
        residuals: LayerResiduals | None = None,
    ) -> Array:
        assert residuals is None, "training has no residuals"
        (stack,) = copies
        act = ACTIVATIONS[ff.activation]
        inner = [jnp.einsum("tk,snk->stn", x, w) for w in stack[:-1]]
        hidden = act(inner[0]) * inner[1] if ff.gated else act(inner[0])
        chosen = jax.nn.one_hot(slots, stack[0].shape[0], dtype=x.dtype)
        return jnp.einsum("stn,smn,ts->tm", hidden, stack[-1], chosen)


def with_residual(
    residuals: LayerResiduals, found: Array, x: Array, slot: Array, projection: int
) -> Array:
    """The product of x [T, K] with a projection, found [T, N], and what the slot's residual adds to
    it."""
    added = residuals.product(x, slot, projection, found.shape[1])
    return found if added is None else (found + added).astype(found.dtype)


def through(
    residuals: LayerResiduals,
    ff: FeedForward,
    rows: Array,
    slot: Array,
    inner: Sequence[Array],
    last: Callable[[Array], Array],
) -> Array:
    """Rows [T, H] of one slot through its copy, with what the slot's residual adds to each product.

    Args:
        inner: the copy's products before the activation.
        last: the copy's product behind it.
    """
    hidden = ff.hidden(
        [with_residual(residuals, found, rows, slot, i) for i, found in enumerate(inner)]
    )
    return with_residual(residuals, last(hidden), hidden, slot, len(inner))


def block_rows(tokens: int, slots: int) -> int:
    """Rows of a block: 1 up to two tokens a slot, then what a slot gets on average, up to the next
    power of two, at most 32.

    Larger blocks read a slot's weights fewer times, smaller ones compute fewer rows of padding, and
    XLA's product of one row runs at several times the rate of its products of 2 to 16; measured in
    benchmarks/switch_dispatch.py.
    """
    share = -(-tokens // slots)
    return 1 if share <= 2 else min(32, 1 << (share - 1).bit_length())


def over_blocks(
    x: Array,
    slots: Array,
    num_slots: int,
    product: Callable[[Array, Array], Array],
    size: int | None = None,
    outputs: int | None = None,
) -> Array:
    """`product(rows [b, H], slot)` for every block of up to b tokens of one slot; others get zeros.

    size: b; None: by `block_rows`. outputs: columns of the products; None: H.
    """
    tokens, size = x.shape[0], size or block_rows(x.shape[0], num_slots)
    slots = jnp.where((slots >= 0) & (slots < num_slots), slots, num_slots)
    order = jnp.argsort(slots, stable=True)
    counts = jnp.bincount(slots, length=num_slots + 1)[:num_slots]
    blocks = -(-counts // size)
    ends = jnp.cumsum(blocks)
    firsts = jnp.cumsum(counts) - counts
    limit = min(tokens, tokens // size + num_slots)  # no more blocks than this can be
    slot_of = jnp.minimum(jnp.searchsorted(ends, jnp.arange(limit), side="right"), num_slots - 1)
    start_of = firsts[slot_of] + (jnp.arange(limit) - (ends - blocks)[slot_of]) * size
    stop_of = (firsts + counts)[slot_of]
    padded = jnp.concatenate([x[order], jnp.zeros((size, x.shape[1]), x.dtype)])

    def body(i: Array, out: Array) -> Array:
        start = start_of[i]
        rows = lax.dynamic_slice_in_dim(padded, start, size)
        mine = (start + jnp.arange(size) < stop_of[i])[:, None]
        old = lax.dynamic_slice_in_dim(out, start, size)
        return lax.dynamic_update_slice_in_dim(
            out, jnp.where(mine, product(rows, slot_of[i]), old), start, 0
        )

    out = jnp.zeros_like(padded, shape=(len(padded), outputs or x.shape[1]))
    zeros = jnp.zeros_like(x, shape=(tokens, out.shape[1]))
    return zeros.at[order].set(lax.fori_loop(0, ends[-1], body, out)[:tokens])


def _ragged(
    x: Array,
    slots: Array,
    stack: Matrices,
    ff: FeedForward,
    residuals: LayerResiduals | None = None,
    first: Array | int = 0,
) -> Array:
    """Grouped products of sorted tokens (`lax.ragged_dot`), for accelerators that have a kernel for
    them.

    Residuals' products are a loop over blocks here, too. first: the slot in the whole layer that
    slot 0 is.
    """
    num_slots = stack[0].shape[0]
    slots = jnp.where((slots >= 0) & (slots < num_slots), slots, num_slots)
    order = jnp.argsort(slots, stable=True)
    sizes = jnp.bincount(slots, length=num_slots + 1)[:num_slots].astype(jnp.int32)
    rows, sorted_slots = x[order], slots[order]

    def product(rows: Array, projection: int) -> Array:
        weight = stack[projection]
        found = lax.ragged_dot(rows, jnp.swapaxes(weight, 1, 2).astype(x.dtype), sizes)
        if residuals is None or not residuals.forms[projection]:
            return found

        def add(rows: Array, slot: Array) -> Array:
            zeros = jnp.zeros_like(rows, shape=(len(rows), weight.shape[1]))
            return with_residual(residuals, zeros, rows, slot + first, projection)

        return found + over_blocks(rows, sorted_slots, num_slots, add, outputs=weight.shape[1])

    inner = [product(rows, i) for i in range(len(stack) - 1)]
    found = product(ff.hidden(inner), len(stack) - 1)
    # Rows past the last group belong to no slot here; what a kernel leaves there is not defined.
    found = jnp.where((jnp.arange(len(x)) < sizes.sum())[:, None], found, 0)
    return jnp.zeros_like(x).at[order].set(found)
