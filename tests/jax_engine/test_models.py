"""The model: which shapes it is built from, and how large it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from common import EngineError
from common.families import FAMILIES, Decoder, EncoderDecoder
from common.families.shape import Rope, Sparse
from jax_engine.experts.dispatch import LoopDispatch
from jax_engine.experts.products import PlainProducts
from jax_engine.layers.variables import PoolVariable
from jax_engine.models.architecture import abstract_model
from jax_engine.models.spec import ModelSpec, check_shape
from tests.helpers import rest_slow
from tests.switch_models import SIZES


def switch_shape() -> EncoderDecoder:
    raw = {"model_type": "switch_transformers"} | SIZES
    shape = FAMILIES["switch_transformers"].parse_config(raw, "config.json").shape
    assert isinstance(shape, EncoderDecoder)
    return shape


@dataclass(frozen=True)
class LaterSparse(Sparse):
    """A record that got a field after this engine was written."""

    shared_inner: int | None = None


def changed(record: str, **fields: Any) -> EncoderDecoder:
    """The shape with other values in one of its records."""
    shape = switch_shape()
    if record == "router":
        router = replace(shape.experts.router, **fields)
        return replace(shape, experts=replace(shape.experts, router=router))
    if record == "shape":
        return replace(shape, **fields)
    return replace(shape, **{record: replace(getattr(shape, record), **fields)})


@pytest.mark.parametrize(
    ("record", "fields", "named"),
    [
        ("attention", {"kv_heads": 2}, "attention.kv_heads = 2"),
        ("attention", {"qk_norm": "head"}, "attention.qk_norm = 'head'"),
        ("attention", {"bias": True}, "attention.bias = True"),
        ("attention", {"window": 8}, "attention.window = 8"),
        ("attention", {"clip": 1.0}, "attention.clip = 1.0"),
        ("attention", {"positions": Rope(())}, "attention.positions = Rope"),
        ("router", {"top_k": 2}, "experts.router.top_k = 2"),
        ("router", {"renormalise": True}, "experts.router.renormalise = True"),
        ("router", {"softmax": "picked"}, "experts.router.softmax = 'picked'"),
        ("router", {"gates": "float32"}, "experts.router.gates = 'float32'"),
        ("experts", {"activation": "tanh"}, "experts.activation = 'tanh'"),
        ("scalars", {"embedding": 2.0}, "scalars.embedding = 2.0"),
        ("scalars", {"residual": 0.5}, "scalars.residual = 0.5"),
        ("scalars", {"logits_divisor": 2.0}, "scalars.logits_divisor = 2.0"),
        ("shape", {"encoder": ()}, r"layers = \("),
        (
            "shape",
            {"encoder": (LaterSparse(0, shared_inner=8),)},
            r"layers\[0\].shared_inner = 8",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    record: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(EngineError, match=f"tenant 'ana': the jax engine does not compute {named}"):
        check_shape(changed(record, **fields), "ana")


def test_what_is_computed_is_taken() -> None:
    assert check_shape(switch_shape(), "ana") == switch_shape()


def test_a_decoder_is_sent_to_the_other_engine() -> None:
    shape = FAMILIES["mixtral"].parse_config({"model_type": "mixtral"}, "config.json").shape
    assert isinstance(shape, Decoder)
    with pytest.raises(EngineError, match=r"tenant .ana. is a Decoder; .* use backend=.torch."):
        check_shape(shape, "ana")


@pytest.mark.parametrize(
    ("experts", "parameters"),
    rest_slow([(8, 0.62e9), (64, 3.8e9), (128, 7.4e9), (256, 14.7e9)], names=2),
)
def test_real_sizes_build_abstractly(experts: int, parameters: float) -> None:
    """google/switch-base-N, as its config.json has it, without memory. Sizes: the hub's."""
    raw = {
        "model_type": "switch_transformers",
        "vocab_size": 32128,
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 3072,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_heads": 12,
        "num_sparse_encoder_layers": 6,
        "num_sparse_decoder_layers": 6,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "num_experts": experts,
        "dense_act_fn": "relu",
        "feed_forward_proj": "relu",
        "decoder_start_token_id": 0,
    }
    config = FAMILIES["switch_transformers"].parse_config(raw, "config.json")
    spec = ModelSpec(
        check_shape(config.shape, "base"),
        PlainProducts("float32", "float32"),
        LoopDispatch(),
        (experts,) * 12,
        32128,
    )
    _, pool, tenant = nnx.split(abstract_model(spec), PoolVariable, nnx.Param)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves((pool, tenant)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((pool, tenant)))
    assert abs(count - parameters) < 0.03 * parameters
    assert len(jax.tree.leaves(pool)) == 12 * experts * 2
