"""What tenants of one shape share: the graph of the module, and how its variables are ordered.

`nnx.split` by the types of variables gives (graphdef, pool, tenant). A step is compiled once for
the graphdef, and takes both as arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from flax import nnx

from jax_engine.layers.variables import Initializer, PoolVariable
from jax_engine.models.block import Block
from jax_engine.models.encoder_decoder import EncoderDecoderModel
from jax_engine.models.spec import ModelSpec

Leaves = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Architecture:
    """The graphdef, and the structure of pool and tenant states (abstract)."""

    spec: ModelSpec
    graphdef: Any
    pool_tree: Any
    tenant_tree: Any
    tenant_state: Any
    pool_state: Any

    @classmethod
    def of(cls, spec: ModelSpec) -> Architecture:
        graphdef, pool, tenant = split(abstract_model(spec))
        return cls(
            spec, graphdef, jax.tree.structure(pool), jax.tree.structure(tenant), tenant, pool
        )

    def _layer(self, tree: Any, leaves: Any, layer: int) -> list[Any]:
        """The leaves of one layer, by its number among all layers."""
        first = self.spec.first_of_decoder
        side, n = ("encoder", layer) if layer < first else ("decoder", layer - first)
        return jax.tree.leaves(jax.tree.unflatten(tree, leaves).get(side, {}).get(n, {}))

    def block_leaves(self, tenant: Leaves, layer: int) -> Leaves:
        """A tenant's own variables of one layer, in the order of `split(block)`."""
        return tuple(self._layer(self.tenant_tree, tenant, layer))

    def layer_copies(self, pool: Leaves, layer: int) -> tuple[Leaves, ...]:
        """The copies of one sparse layer, as `Dispatch` takes them."""
        flat = self._layer(self.pool_tree, pool, layer)
        shape = self.spec.shape
        width = len(shape.experts.projections(shape.hidden))
        return tuple(tuple(flat[i : i + width]) for i in range(0, len(flat), width))

    @cached_property
    def _outside(self) -> tuple[int, ...]:
        """Which of a tenant's leaves belong to no layer: embeddings, head, biases, last norms."""
        count = self.tenant_tree.num_leaves
        layers = range(len(self.spec.shape.layers))
        inside = {i for n in layers for i in self._layer(self.tenant_tree, range(count), n)}
        return tuple(i for i in range(count) if i not in inside)

    def outer_leaves(self, tenant: Leaves) -> Leaves:
        """A tenant's variables that belong to no layer."""
        return tuple(tenant[i] for i in self._outside)

    def outer_model(self, outer: Leaves) -> EncoderDecoderModel:
        """The module with `outer_leaves` in it and no weights in its layers, for tracing."""
        leaves = jax.tree.leaves(self.tenant_state)
        for i, leaf in zip(self._outside, outer, strict=True):
            leaves[i] = leaf
        return self.model(tuple(jax.tree.leaves(self.pool_state)), tuple(leaves))

    def model(self, pool: Leaves, tenant: Leaves) -> EncoderDecoderModel:
        """The module with these arrays in it; cheap enough only while tracing."""
        model: EncoderDecoderModel = nnx.merge(
            self.graphdef,
            jax.tree.unflatten(self.pool_tree, pool),
            jax.tree.unflatten(self.tenant_tree, tenant),
        )
        return model


def split(module: nnx.Module) -> tuple[Any, Any, Any]:
    """(graphdef, pool state, tenant state)."""
    parts: Any = nnx.split(module, PoolVariable, nnx.Param)
    graphdef, pool, tenant = parts
    return graphdef, pool, tenant


def abstract_model(spec: ModelSpec) -> EncoderDecoderModel:
    """The model's shapes without any memory: every variable holds a `jax.ShapeDtypeStruct`."""
    make: Callable[[], Any] = lambda: EncoderDecoderModel(spec, Initializer(None))  # noqa: E731
    model: EncoderDecoderModel = nnx.eval_shape(make)
    return model


def abstract_blocks(spec: ModelSpec) -> list[Block]:
    """The model's layers, encoder first, in the same way."""
    model = abstract_model(spec)
    return [*model.encoder, *model.decoder]
