"""A whole model out of a checkpoint, and back, for training."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from flax import nnx

from common.checkpoints import Checkpoint
from common.families import FAMILIES, ModelConfig
from jax_engine.experts.dispatch import DenseDispatch
from jax_engine.experts.products import PlainProducts
from jax_engine.layers.variables import Source
from jax_engine.models.architecture import abstract_model, split
from jax_engine.models.encoder_decoder import EncoderDecoderModel
from jax_engine.models.spec import ModelSpec, check_shape
from jax_engine.tenants.weights import fill_pool, fill_tenant


def training_spec(config: ModelConfig) -> ModelSpec:
    """Every slot is the expert of its number; float32, and gradients for all.

    Raises:
        EngineError: for a shape that is not computed here.
    """
    shape = check_shape(config.shape, "to be trained")
    slots = (shape.experts.count,) * len(shape.sparse_layers)
    products = PlainProducts("float32", "float32")
    return ModelSpec(shape, products, DenseDispatch(), slots, shape.vocab_size)


def load_model(checkpoint: Checkpoint) -> EncoderDecoderModel:
    """A model with its own experts."""
    family, config, tensors = checkpoint.family, checkpoint.config, checkpoint.tensors
    spec = training_spec(config)
    graphdef, pool, tenant = split(abstract_model(spec))

    def own(layer: int, expert: int, projection: str) -> np.ndarray:
        return tensors[family.expert_tensor(config, layer, expert, projection)].read()

    def read(source: Source) -> np.ndarray:
        return tensors[family.tensor_name(config, *source)].read()

    tenant = fill_tenant(tenant, read, spec)
    model: EncoderDecoderModel = nnx.merge(graphdef, fill_pool(pool, own, spec), tenant)
    return model


def canonical_tensors(
    model: EncoderDecoderModel, config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """(canonical name, float32 [out, in]) of every tensor of a model that is trained."""
    family = FAMILIES[config.experts.family]
    _, pool, tenant = split(model)
    for _, variable in nnx.to_flat_state(tenant):
        sources = variable.get_metadata()["sources"]
        names = [family.tensor_name(config, *source) for source in sources]
        yield from zip(names, np.split(np.asarray(variable[...]), len(names)), strict=True)
    for _, variable in nnx.to_flat_state(pool):
        data = variable.get_metadata()
        for expert, matrix in enumerate(np.asarray(variable[...])):
            name = family.expert_tensor(config, data["layer"], expert, data["projection"])
            yield name, matrix
