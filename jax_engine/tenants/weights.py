"""Checkpoint or store tensors into the model's variables, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.checkpoints import Checkpoint
from common.families import FAMILIES
from common.families.switch_transformers import SwitchTransformersFamily, as_switch
from jax_engine.experts.dispatch import DenseDispatch
from jax_engine.experts.products import PlainProducts, Products, to_numpy
from jax_engine.models.encoder_decoder import Settings, SwitchTransformer, abstract_model, split

Read = Callable[[str], np.ndarray]
"""A tensor by its canonical name."""

EMBEDDINGS = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "lm_head.weight",
)


def family() -> SwitchTransformersFamily:
    """The family that this engine serves."""
    found = FAMILIES["switch_transformers"]
    assert isinstance(found, SwitchTransformersFamily)
    return found


def fill_tenant(
    state: Any,
    read: Read,
    s: Settings,
    put: Callable[[Any], jax.Array] = jnp.asarray,
    once: Callable[
        [tuple[str, ...], bool, Callable[[], jax.Array]], jax.Array
    ] = lambda sources, packed, make: make(),
) -> Any:
    """A tenant's variables from its tensors. state: what `nnx.split` gives of an abstract model for
    `nnx.Param`.

    once: (names of a variable's tensors, whether they are packed, makes it) -> the variable, made
        or there already.
    """

    def fill(path: Any, variable: Any) -> Any:
        data = variable.get_metadata()
        return variable.replace(once(tuple(data["sources"]), data["packed"], lambda: made(data)))

    def made(data: Any) -> jax.Array:
        parts = [
            s.products.prepare(read(name)) if data["packed"] else to_numpy(read(name), "float32")
            for name in data["sources"]
        ]
        array = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if data["sources"][0] in EMBEDDINGS and len(array) < s.vocab_size:
            array = np.concatenate(
                [array, np.zeros((s.vocab_size - len(array), array.shape[1]), array.dtype)]
            )
        return put(s.products.pack(array) if data["packed"] else array)

    return nnx.map_state(fill, state)


def pack_copy(matrices: list[np.ndarray], products: Products) -> list[Any]:
    """One copy's matrices as a slot of an unstacked pool holds them."""
    return [products.pack(products.prepare(m)) for m in matrices]


def fill_pool(
    state: Any,
    read: Callable[[int, int, str], np.ndarray],
    s: Settings,
    put: Callable[[Any], jax.Array] = jnp.asarray,
    kept: Callable[[int, int | None, str], jax.Array | None] = lambda layer, slot, projection: None,
) -> Any:
    """The pool's variables. read: (layer, slot, projection) -> [out, in]. kept: a variable that is
    on the device
    already, None: there is none; slot None: all slots stacked."""

    def fill(path: Any, variable: Any) -> Any:
        data = variable.get_metadata()
        layer, slot, projection = data["layer"], data["slot"], data["projection"]
        found = kept(layer, slot, projection)
        if found is not None:
            return variable.replace(found)
        if slot is not None:
            return variable.replace(
                put(s.products.pack(s.products.prepare(read(layer, slot, projection))))
            )
        whole = np.stack(
            [s.products.prepare(read(layer, i, projection)) for i in range(s.slots[layer])]
        )
        return variable.replace(put(whole))

    return nnx.map_state(fill, state)


def load_model(checkpoint: Checkpoint) -> SwitchTransformer:
    """A whole model with its own experts, in float32, for training: every slot is the expert of its
    number."""
    config = as_switch(checkpoint.config)
    spec = config.experts
    slots = (spec.num_experts,) * spec.num_layers
    s = Settings(
        config, PlainProducts("float32", "float32"), DenseDispatch(), slots, config.vocab_size
    )
    graphdef, pool, tenant = split(abstract_model(s))

    def own(layer: int, expert: int, projection: str) -> np.ndarray:
        return checkpoint.tensors[family().expert_tensor(config, layer, expert, projection)].read()

    tenant = fill_tenant(tenant, lambda name: checkpoint.tensors[name].read(), s)
    model: SwitchTransformer = nnx.merge(graphdef, fill_pool(pool, own, s), tenant)
    return model


def canonical_tensors(model: SwitchTransformer) -> Iterator[tuple[str, np.ndarray]]:
    """(canonical name, float32 [out, in]) of every tensor of a model as `load_model` makes it."""
    config = model.settings.config
    _, pool, tenant = split(model)
    for _, variable in nnx.to_flat_state(tenant):
        names = variable.get_metadata()["sources"]
        yield from zip(names, np.split(np.asarray(variable[...]), len(names)), strict=True)
    for _, variable in nnx.to_flat_state(pool):
        data = variable.get_metadata()
        for expert, matrix in enumerate(np.asarray(variable[...])):
            yield family().expert_tensor(config, data["layer"], expert, data["projection"]), matrix
