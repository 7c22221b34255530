"""Fields of config.json: those of transformers' classes are known, and absent ones have their
defaults."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import (
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.generation import GenerationConfig

from common import CheckpointError
from common.families import FAMILIES
from common.families.fields import HARMLESS, NEUTRAL
from common.families.shape import (
    Decoder,
    EncoderDecoder,
    RelativePositions,
    Rope,
    Scalars,
    sparse_layers,
)
from tests import helpers, switch_models

CLASSES: dict[str, Any] = {
    "mixtral": MixtralConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "olmoe": OlmoeConfig,
    "granitemoe": GraniteMoeConfig,
    "switch_transformers": SwitchTransformersConfig,
}
SMALL: dict[str, dict[str, Any]] = {
    **{name: dict(helpers.SIZES) for name in CLASSES},
    "switch_transformers": dict(switch_models.SIZES),
}
# Not of transformers' classes: other names for the same, older ones, and our own.
BESIDE = {
    "rope_scaling",
    "rope_theta",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "layer_types",
    "head_dim",
    "sliding_window",
}
BESIDE |= {
    "use_sliding_window",
    "feed_forward_proj",
    "is_gated_act",
    "encoder_sparse_step",
    "decoder_sparse_step",
}
BESIDE |= {
    "decoder_start_token_id",
    "scale_decoder_outputs",
    "moetel_untied",
    "moetel_sparse_layers",
}
# Which token a Switch's decoder starts from is decided from several fields.
LENIENT = {
    ("mixtral", "use_sliding_window"),
    *(("switch_transformers", field) for field in ("feed_forward_proj", "is_gated_act")),
    *(("switch_transformers", field) for field in ("pad_token_id", "dense_act_fn")),
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_of_transformers_class_is_known(name: str) -> None:
    found, read, aliases = CLASSES[name], FAMILIES[name].read, FAMILIES[name].aliases
    fields = {f.name for f in dataclasses.fields(found)}
    fields |= {*found.attribute_map, *found.attribute_map.values()}
    assert dict(aliases) == found.attribute_map
    assert fields <= read | HARMLESS | set(NEUTRAL) | set(aliases)
    assert read - fields <= BESIDE, "a field that is read is transformers', or stated here"
    assert not read & HARMLESS - {"pad_token_id", "decoder_start_token_id", "is_encoder_decoder"}
    assert set(GenerationConfig._get_default_generation_params()) <= HARMLESS


@pytest.mark.parametrize(
    ("name", "field"),
    [
        (name, field)
        for name in CLASSES
        for field in sorted(FAMILIES[name].read)
        if (name, field) not in LENIENT
    ],
)
def test_what_is_read_is_checked(name: str, field: str) -> None:
    """Nonsense in any field that is read is refused by that field's name: it was looked at."""
    raw = SMALL[name] | {field: ["nonsense"]}
    if field == "original_max_position_embeddings":
        raw["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0}
    with pytest.raises(CheckpointError, match=r"config\.json: field '[a-z_]+' ") as caught:
        FAMILIES[name].parse_config(raw, "config.json")
    assert "nonsense" in str(caught.value) and field.removeprefix("original_max_") in str(
        caught.value
    )


DECODERS = [name for name in CLASSES if name != "switch_transformers"]


@pytest.mark.parametrize("name", DECODERS)
def test_absent_fields_have_the_classs_defaults(name: str) -> None:
    """A config.json that states nothing is transformers' config made of nothing."""
    theirs: Any = CLASSES[name]()
    family = FAMILIES[name]
    shape = family.parse_config({}, "config.json").shape
    assert isinstance(shape, Decoder) and isinstance(shape.attention.positions, Rope)
    size = getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    head_dim = getattr(theirs, "head_dim", None)
    assert (shape.vocab_size, shape.hidden) == (theirs.vocab_size, theirs.hidden_size)
    assert shape.max_positions == theirs.max_position_embeddings
    assert len(shape.layers) == len(shape.sparse_layers) == theirs.num_hidden_layers
    assert shape.norm_eps == theirs.rms_norm_eps
    assert shape.tied_head == theirs.tie_word_embeddings
    assert shape.experts.count == theirs.num_local_experts
    assert shape.experts.router.renormalise == getattr(theirs, "norm_topk_prob", name == "mixtral")
    assert (shape.experts.inner, shape.experts.activation) == (size, theirs.hidden_act)
    assert shape.experts.router.top_k == theirs.num_experts_per_tok
    assert shape.attention.heads == theirs.num_attention_heads
    assert shape.attention.kv_heads == theirs.num_key_value_heads
    assert shape.attention.head_dim == (
        head_dim or theirs.hidden_size // theirs.num_attention_heads
    )
    assert shape.attention.window == getattr(theirs, "sliding_window", None)
    assert shape.attention.clip == getattr(theirs, "clip_qkv", None)
    assert shape.attention.bias == getattr(theirs, "attention_bias", False)
    assert dict(shape.attention.positions.parameters) == theirs.rope_parameters
    assert shape.attention.scale == getattr(
        theirs, "attention_multiplier", shape.attention.head_dim**-0.5
    )
    assert shape.scalars == Scalars(
        embedding=getattr(theirs, "embedding_multiplier", 1.0),
        residual=getattr(theirs, "residual_multiplier", 1.0),
        logits_divisor=getattr(theirs, "logits_scaling", 1.0),
    )
    # What transformers takes where config.json has no such field.
    assert family.default_eos_token_id == theirs.eos_token_id


def test_a_switchs_absent_fields_have_the_classs_defaults() -> None:
    theirs = SwitchTransformersConfig()
    shape = FAMILIES["switch_transformers"].parse_config({}, "config.json").shape
    assert isinstance(shape, EncoderDecoder)
    router = shape.experts.router
    assert (shape.vocab_size, shape.hidden) == (theirs.vocab_size, theirs.d_model)
    assert (shape.experts.count, shape.experts.inner) == (theirs.num_experts, theirs.d_ff)
    assert (shape.experts.activation, shape.experts.gated) == (theirs.dense_act_fn, False)
    assert (router.dtype, router.bias) == (theirs.router_dtype, theirs.router_bias)
    assert router.capacity == theirs.expert_capacity
    assert (shape.attention.heads, shape.attention.head_dim) == (theirs.num_heads, theirs.d_kv)
    assert shape.attention.positions == RelativePositions(
        theirs.relative_attention_num_buckets, theirs.relative_attention_max_distance
    )
    assert shape.norm_eps == theirs.layer_norm_epsilon
    assert len(shape.encoder) == theirs.num_layers
    assert len(shape.decoder) == theirs.num_decoder_layers
    for layers, step in (
        (shape.encoder, theirs.encoder_sparse_step),
        (shape.decoder, theirs.decoder_sparse_step),
    ):
        assert sparse_layers(layers) == tuple(range(1, 12, step))
    assert (not shape.own_tables) == theirs.tie_word_embeddings
