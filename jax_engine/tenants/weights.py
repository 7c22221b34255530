"""Tensors into the model's variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.families.shape import EMBED
from jax_engine.experts.products import Products, to_numpy
from jax_engine.layers.variables import Source
from jax_engine.models.encoder_decoder import TABLES
from jax_engine.models.spec import ModelSpec


def fill_tenant(
    state: Any,
    read: Callable[[Source], np.ndarray],
    spec: ModelSpec,
    put: Callable[[Any], jax.Array] = jnp.asarray,
    once: Callable[
        [tuple[Source, ...], bool, Callable[[], jax.Array]], jax.Array
    ] = lambda sources, packed, make: make(),
) -> Any:
    """A tenant's variables from its tensors.

    Args:
        state: what `split` gives of an abstract model.
        once: (a variable's sources, whether it is packed, makes it) -> the variable, made or there
            already.
    """

    def fill(path: Any, variable: Any) -> Any:
        data = variable.get_metadata()
        return variable.replace(once(tuple(data["sources"]), data["packed"], lambda: made(data)))

    def made(data: Any) -> jax.Array:
        parts = [
            spec.products.prepare(read(source))
            if data["packed"]
            else to_numpy(read(source), "float32")
            for source in data["sources"]
        ]
        array = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if data["sources"][0][0] in (EMBED, *TABLES) and len(array) < spec.vocab_size:
            padding = np.zeros((spec.vocab_size - len(array), array.shape[1]), array.dtype)
            array = np.concatenate([array, padding])
        return put(spec.products.pack(array) if data["packed"] else array)

    return nnx.map_state(fill, state)


def pack_copy(matrices: list[np.ndarray], products: Products) -> list[Any]:
    """One copy's matrices as a slot of an unstacked pool holds them."""
    return [products.pack(products.prepare(m)) for m in matrices]


def fill_pool(
    state: Any,
    read: Callable[[int, int, str], np.ndarray],
    spec: ModelSpec,
    put: Callable[[Any], jax.Array] = jnp.asarray,
    kept: Callable[[int, int | None, str], jax.Array | None] = lambda layer, slot, projection: None,
) -> Any:
    """The pool's variables.

    Args:
        read: (sparse layer, slot, projection) -> [out, in].
        kept: a variable that is on the device already, None: there is none; slot None: all slots
            stacked.
    """

    def fill(path: Any, variable: Any) -> Any:
        data = variable.get_metadata()
        layer, slot, projection = data["layer"], data["slot"], data["projection"]
        found = kept(layer, slot, projection)
        if found is not None:
            return variable.replace(found)
        if slot is not None:
            (packed,) = pack_copy([read(layer, slot, projection)], spec.products)
            return variable.replace(put(packed))
        whole = np.stack(
            [spec.products.prepare(read(layer, i, projection)) for i in range(spec.slots[layer])]
        )
        return variable.replace(put(whole))

    return nnx.map_state(fill, state)
