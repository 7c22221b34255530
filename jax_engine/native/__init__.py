"""Our own CPU kernels for the JAX engine (`common/kernels`), called from jitted code through XLA's
foreign function interface (`ffi.cc`) with XLA's own threads.

XLA multiplies few rows at a fraction of the memory's rate. The kernels read packed weights, for
decoding and for prompts alike, and a layer of experts is one call. Nothing depends on them: on
another processor, without Linux or a compiler, or with MOETEL_NATIVE=0 in the environment, `load`
returns None and XLA does all products.

Letters in shapes: T rows, K inputs, N outputs, B = ceil(N / 64) blocks of outputs, S slots, I
    intermediate size. Packed weights: `common.kernels.packed_weights`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from common.kernels import build, packed_weights
from common.kernels.packed_weights import ACTIVATIONS, BLOCK

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("ffi.cc")

_loads = itertools.count()
_Array = TypeVar("_Array", np.ndarray, jax.Array)


def pack(weight: _Array) -> _Array:
    """`common.kernels.packed_weights.pack`, also for jax's arrays: [..., N, K] -> [..., B, K, 64]
    in float32, [..., B, ceil(K / 2), 128] in bfloat16."""
    if isinstance(weight, np.ndarray):
        return packed_weights.pack(weight)
    *stack, outputs, inputs = weight.shape
    itemsize = weight.dtype.itemsize
    blocks, steps, size = packed_weights.packed_shape(outputs, inputs, itemsize)
    lanes = packed_weights.lanes(itemsize)
    padding = [(0, blocks * BLOCK - outputs), (0, steps * lanes - inputs)]
    padded = jnp.pad(weight, [(0, 0)] * len(stack) + padding)
    cells = padded.reshape(*stack, blocks, BLOCK, steps, lanes).swapaxes(-3, -2)
    return cells.reshape(*stack, blocks, steps, size)


@dataclass(frozen=True)
class Kernels:
    """The kernels as functions for jitted code. Sums are float32; a row's bits depend on no other
    row.

    linear_target, experts_target, residuals_target: names under which XLA knows the handlers.
    threads: at most so many, or None for all that XLA's own pool has. target: the instructions that
        they use.
    """

    linear_target: str
    experts_target: str
    residuals_target: str
    target: str
    threads: int | None = None

    @staticmethod
    def pack(weight: _Array) -> _Array:
        """As the function `pack`."""
        return pack(weight)

    def linear(self, x: jax.Array, packed: jax.Array, out_features: int) -> jax.Array:
        """`x @ weight.T`: float32 [..., K] -> float32 [..., N].

        packed: float32 or bfloat16, from `pack`. out_features: N.
        """
        rows = _rows(x)
        if rows.shape[0] == 0 or out_features == 0:
            return jnp.zeros((*x.shape[:-1], out_features), jnp.float32)
        call: Any = jax.ffi.ffi_call(self.linear_target, _result(rows.shape[0], out_features))
        out: jax.Array = call(rows, packed, threads=np.int64(self.threads or 0))
        return out.reshape(*x.shape[:-1], out_features)

    def experts(
        self,
        x: jax.Array,
        slots: jax.Array,
        pool: Sequence[Sequence[jax.Array]],
        activation: str,
        *,
        intermediate_size: int,
        out_features: int | None = None,
        gated: bool = False,
        residuals: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """The feed-forward of each row's slot: float32 [..., K] -> float32 [..., N], zeros where it
        is not in 0..S-1.

        slots: int32 [...], as x without its last axis. pool: for each slot its packed projections,
            all float32 or all
        bfloat16: wi, for gated ones a second, and wo. Ungated `act(x @
        wi.T) @ wo.T`, gated `(act(x @ wi_0.T) * (x @ wi_1.T)) @ wo.T`. intermediate_size: I.
        out_features: N, K if not given. Only slots that a row names are read.

        residuals: the words and the table of a `LayerResiduals`, laid out in
        blocks. The table is looked at when the call runs; a part that lies outside the words is an
        error then, which jax raises. If it has S rows for each of several tenants, `slots` are rows
        of it, and row v's weights are those of slot v mod S: they are read once for all tenants'
        rows.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {activation!r} is not supported, expected one of {sorted(ACTIVATIONS)}"
            )
        if slots.shape != x.shape[:-1]:
            raise ValueError(
                f"slots have shape {slots.shape}, x {x.shape}: expected one slot for each row of x"
            )
        projections = 3 if gated else 2
        for i, slot in enumerate(pool):
            if len(slot) != projections:
                raise ValueError(
                    f"slot {i} has {len(slot)} projections, expected {projections} with "
                    f"gated={gated}"
                )
        rows = _rows(x)
        out_features = rows.shape[1] if out_features is None else out_features
        if rows.shape[0] == 0 or out_features == 0:
            return jnp.zeros((*x.shape[:-1], out_features), jnp.float32)
        # The scratch is a result, so that XLA plans its memory with everything else's instead of a
        # call asking for it.
        results = (
            _result(rows.shape[0], out_features),
            _result(rows.shape[0], intermediate_size),
        )
        target = self.experts_target if residuals is None else self.residuals_target
        out, _ = jax.ffi.ffi_call(target, results)(
            rows,
            slots.reshape(-1).astype(jnp.int32),
            *(residuals or ()),
            *(array for slot in pool for array in slot),
            threads=np.int64(self.threads or 0),
            activation=np.int64(ACTIVATIONS[activation]),
            gated=gated,
            intermediate_size=np.int64(intermediate_size),
        )
        return out.reshape(*x.shape[:-1], out_features)


def _rows(x: jax.Array) -> jax.Array:
    """float32 [..., K] -> [T, K]."""
    if x.dtype != jnp.float32:
        raise TypeError(f"x is {x.dtype}, the kernels take float32")
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _result(*shape: int) -> Any:
    make: Any = jax.ShapeDtypeStruct  # not annotated in jax
    return make(shape, np.dtype(np.float32))


@cache
def load() -> Kernels | None:
    """The kernels, or None where they cannot be had; the reason is logged.

    Raises EngineError if the environment's MOETEL_NATIVE is malformed.
    """
    # The headers are the installed jaxlib's, so its version decides what is compiled.
    flags = ("-isystem", jax.ffi.include_dir(), f'-DJAXLIB="{version_of("jaxlib")}"')
    try:
        library = build.load(SOURCE, flags)
        number = next(_loads)  # XLA refuses a name that it knows for another function
        names = ("linear", "experts", "experts_with_residuals")
        handlers = tuple(f"moetel_{name}_{number}" for name in names)
        capsule_of: Any = jax.ffi.pycapsule  # not annotated in jax
        for name, handler in zip(names, handlers, strict=True):
            function = getattr(library.functions, f"moetel_ffi_{name}")
            jax.ffi.register_ffi_target(handler, capsule_of(function), platform="cpu")
        kernels = Kernels(handlers[0], handlers[1], handlers[2], library.target)
        if _called_rightly(kernels):
            return kernels
        reason = "a product through XLA differs from numpy's"
    except (build.Unavailable, AttributeError, RuntimeError) as error:
        reason = str(error)
    logger.info("own CPU kernels are not used: %s", reason)
    return None


def _called_rightly(kernels: Kernels) -> bool:
    """Whether a product through XLA equals numpy's; `build.load` has proved the kernels."""
    x, weight = (
        np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        for shape in ((9, 70), (100, 70))
    )
    # `load` may be called while something is traced; the trial is to run all the same, and on the
    # CPU.
    with jax.ensure_compile_time_eval(), jax.default_device(jax.devices("cpu")[0]):
        found = np.asarray(kernels.linear(jnp.asarray(x), jnp.asarray(pack(weight)), 100))
    return np.allclose(found, x @ weight.T, atol=1e-3)
