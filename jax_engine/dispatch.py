"""Expert dispatch: tokens, and the slot of each, through the copies of a layer's pool.

Ways to do it behind one face; what each is for was measured (benchmarks/switch_dispatch.py, docs/results):
- NativeDispatch: one call of our own CPU kernels, which read the slots that are hit and nothing else;
- LoopDispatch: XLA on one CPU device, one array a slot; a loop over blocks of sorted tokens of one slot, each a
  `lax.switch` to its slot's product, so no weight is copied and time does not grow with the pool;
- MeshDispatch: stacked slots sharded over the mesh axis `expert`, tokens over `data`; also one accelerator;
- DenseDispatch: every expert on every token, then a selection; differentiable and simple, for training small models.

Legend: tokens T, slots S, hidden H, intermediate I. A slot outside 0..S-1 gives zeros.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from jax_engine.native import Kernels

Array = jax.Array
Copy = tuple[Array, ...]
"""The projections of one copy: (wi, wo) or (wi_0, wi_1, wo); stacked ones have a leading axis of slots."""

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

    def __call__(self, x: Array, copy: Copy) -> Array:
        """[T, H] -> [T, H] through one copy of plain [out, in] matrices."""
        act = ACTIVATIONS[self.activation]
        inner = [jnp.einsum("tk,nk->tn", x, w.astype(x.dtype)) for w in copy[:-1]]
        hidden = act(inner[0]) * inner[1] if self.gated else act(inner[0])
        return jnp.einsum("tk,nk->tn", hidden, copy[-1].astype(x.dtype))


class Dispatch(ABC):
    """stacked: whether a layer's copies are one array a projection [S, out, in], or one a slot."""

    stacked: bool

    @abstractmethod
    def __call__(self, x: Array, slots: Array, copies: Sequence[Copy], ff: FeedForward) -> Array:
        """x: [T, H]; slots: int32 [T]; copies: one a slot, or a single stacked one. Returns [T, H]."""

    def single(self, x: Array, copy: Copy, ff: FeedForward) -> Array:
        """All tokens [T, H] through one copy, such as a dense layer's."""
        return ff(x, copy)


@dataclass(frozen=True)
class NativeDispatch(Dispatch):
    """Our own CPU kernels; copies are packed."""

    kernels: Kernels
    stacked = False

    def __call__(self, x: Array, slots: Array, copies: Sequence[Copy], ff: FeedForward) -> Array:
        return self.kernels.experts(
            x, slots, copies, ff.activation, intermediate_size=ff.intermediate_size, gated=ff.gated
        )

    def single(self, x: Array, copy: Copy, ff: FeedForward) -> Array:
        return self(x, jnp.zeros(len(x), jnp.int32), (copy,), ff)


@dataclass(frozen=True)
class LoopDispatch(Dispatch):
    """One array a slot, on one device."""

    stacked = False

    def __call__(self, x: Array, slots: Array, copies: Sequence[Copy], ff: FeedForward) -> Array:
        branches = [lambda rows, copy=copy: ff(rows, copy) for copy in copies]
        return over_blocks(x, slots, len(copies), lambda rows, slot: lax.switch(slot, branches, rows))


@dataclass(frozen=True)
class MeshDispatch(Dispatch):
    """Stacked slots over the axis `expert`, tokens over the axis `data`.

    Every device computes, for its own tokens, what its own slots contribute, and the contributions are summed over
    `expert`. With static shapes and nothing dropped, an all-to-all would have to provide for all of a device's tokens
    going to one other device, so it would move at least as much as this sum does. Weights stay where they are.
    """

    mesh: Mesh
    stacked = True

    def __call__(self, x: Array, slots: Array, copies: Sequence[Copy], ff: FeedForward) -> Array:
        (stack,) = copies
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"

        def local(x: Array, slots: Array, *stack: Array) -> Array:
            count = stack[0].shape[0]
            mine = slots - lax.axis_index("expert") * count
            x = lax.pcast(x, ("expert",), to="varying")  # what is summed differs along this axis
            if on_cpu:

                def product(rows: Array, slot: Array) -> Array:
                    return ff(rows, tuple(lax.dynamic_index_in_dim(w, slot, keepdims=False) for w in stack))

                found = over_blocks(x, mine, count, product)
            else:
                found = _ragged(x, mine, stack, ff)
            summed: Array = lax.psum(found, "expert")
            return summed

        tokens, experts = PartitionSpec("data"), PartitionSpec("expert")
        run = jax.shard_map(local, mesh=self.mesh, in_specs=(tokens, tokens, *[experts] * len(stack)), out_specs=tokens)
        return run(x, slots, *stack)

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Sharding of an array whose leading dimensions lie along these axes."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))


@dataclass(frozen=True)
class DenseDispatch(Dispatch):
    """Every expert on every token: S times the work, and gradients for all."""

    stacked = True

    def __call__(self, x: Array, slots: Array, copies: Sequence[Copy], ff: FeedForward) -> Array:
        (stack,) = copies
        act = ACTIVATIONS[ff.activation]
        inner = [jnp.einsum("tk,snk->stn", x, w) for w in stack[:-1]]
        hidden = act(inner[0]) * inner[1] if ff.gated else act(inner[0])
        chosen = jax.nn.one_hot(slots, stack[0].shape[0], dtype=x.dtype)
        return jnp.einsum("stn,smn,ts->tm", hidden, stack[-1], chosen)


def block_rows(tokens: int, slots: int) -> int:
    """Rows of a block: 1 up to two tokens a slot, then what a slot gets on average, up to the next power of two, at
    most 32.

    Larger blocks read a slot's weights fewer times, smaller ones compute fewer rows of padding, and XLA's product of
    one row runs at several times the rate of its products of 2 to 16; measured in benchmarks/switch_dispatch.py.
    """
    share = -(-tokens // slots)
    return 1 if share <= 2 else min(32, 1 << (share - 1).bit_length())


def over_blocks(
    x: Array,
    slots: Array,
    num_slots: int,
    product: Callable[[Array, Array], Array],
    size: int | None = None,
) -> Array:
    """`product(rows [b, H], slot)` for every block of up to b tokens of one slot; others are not touched.

    size: b; None: by `block_rows`.
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
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, product(rows, slot_of[i]), old), start, 0)

    out = jnp.zeros_like(padded)
    return jnp.zeros_like(x).at[order].set(lax.fori_loop(0, ends[-1], body, out)[:tokens])


def _ragged(x: Array, slots: Array, stack: Copy, ff: FeedForward) -> Array:
    """Grouped products of sorted tokens (`lax.ragged_dot`), for accelerators that have a kernel for them."""
    num_slots = stack[0].shape[0]
    slots = jnp.where((slots >= 0) & (slots < num_slots), slots, num_slots)
    order = jnp.argsort(slots, stable=True)
    sizes = jnp.bincount(slots, length=num_slots + 1)[:num_slots].astype(jnp.int32)
    rows = x[order]
    act = ACTIVATIONS[ff.activation]
    inner = [lax.ragged_dot(rows, jnp.swapaxes(w, 1, 2).astype(x.dtype), sizes) for w in stack[:-1]]
    hidden = act(inner[0]) * inner[1] if ff.gated else act(inner[0])
    found = lax.ragged_dot(hidden, jnp.swapaxes(stack[-1], 1, 2).astype(x.dtype), sizes)
    # Rows past the last group belong to no slot here; what a kernel leaves there is not defined.
    found = jnp.where((jnp.arange(len(x)) < sizes.sum())[:, None], found, 0)
    return jnp.zeros_like(x).at[order].set(found)
