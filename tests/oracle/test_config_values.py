"""Values of config.json: each is read as transformers reads it, does nothing, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common import CheckpointError
from common.checkpoints import open_checkpoint
from common.families import FAMILIES
from tests import families, helpers, switch_models
from tests.helpers import rest_slow
from tests.oracle.directories import check_same, copied, edit_config, theirs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight query and eight key heads, so that the class's default of key heads fits; long enough
    for every rope."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}
    model = helpers.random_mixtral(5, **sizes, max_position_embeddings=256)
    path = helpers.save(model, tmp_path_factory.mktemp("fields") / "base")
    edit_config(path, rope_parameters=...)
    return path


LINEAR, YARN = {"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

SAME: dict[str, tuple[dict[str, Any], str | None]] = {
    "no rope at all": ({}, None),
    "theta at the top": ({"rope_theta": 100.0}, None),
    "theta twice": (
        {"rope_theta": 100.0, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        r"rope_theta 50.0 within rope_parameters is taken and not 100.0",
    ),
    "scaling and theta": ({"rope_theta": 100.0, "rope_scaling": LINEAR}, None),
    "scaling beside parameters": (
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        "rope_scaling is taken and rope_parameters, which differs, is not",
    ),
    "empty scaling beside parameters": (
        {"rope_scaling": {}, "rope_parameters": LINEAR | {"rope_theta": 50.0}},
        None,
    ),
    "older type": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, None),
    "type against rope_type": (
        {"rope_scaling": {"type": "yarn"} | LINEAR},
        "rope type 'linear' is taken and not 'type' 'yarn'",
    ),
    "yarn": (
        {"rope_parameters": YARN | {"rope_theta": 100.0, "original_max_position_embeddings": 64}},
        None,
    ),
    "yarn, original length left out": ({"rope_parameters": YARN | {"rope_theta": 100.0}}, None),
    "yarn, original length beside": (
        {
            "rope_parameters": YARN | {"rope_theta": 100.0, "original_max_position_embeddings": 16},
            "original_max_position_embeddings": 64,
        },
        None,
    ),
    "llama3": (
        {"rope_parameters": LLAMA3 | {"rope_theta": 100.0, "original_max_position_embeddings": 16}},
        None,
    ),
    "other name of a field": ({"num_local_experts": ..., "num_experts": 4}, None),
    "both names": ({"num_experts": 4}, None),
    "key heads left out": ({"num_key_value_heads": ...}, "does not state num_key_value_heads"),
    "head_dim null": ({"head_dim": None}, None),
    "no activation or epsilon": ({"hidden_act": ..., "rms_norm_eps": ...}, None),
    "torch_dtype against dtype": ({"dtype": "float32", "torch_dtype": "float16"}, None),
    "window": ({"sliding_window": 3}, None),
    "window turned off in vain": (
        {"sliding_window": 3, "use_sliding_window": False},
        "sliding_window 3 is applied: Mixtral does not read use_sliding_window",
    ),
    "training's fields": (
        {"output_router_logits": True, "router_jitter_noise": 0.1, "attention_dropout": 0.5},
        None,
    ),
    "no quantisation": ({"quantization_config": None}, None),
    "neutral": (
        {"attention_bias": False, "final_logit_softcapping": None, "partial_rotary_factor": 1.0},
        None,
    ),
    "unknown": ({"colour": "red"}, "fields of config.json that nothing reads: colour"),
}


@pytest.mark.parametrize("kind", SAME)
def test_fields_are_read_as_transformers_does(kind: str, base: Path, tmp_path: Path) -> None:
    changes, note = SAME[kind]
    path = copied(base, tmp_path / "it")
    edit_config(path, **changes)
    store = check_same(path, tmp_path)
    notes = store.tenant("t").notes
    assert not notes if note is None else any(note in one for one in notes), notes
    store.export("t", tmp_path / "export")
    helpers.assert_close(theirs(tmp_path / "export"), theirs(path))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "names that disagree": (
        {"num_experts": 8},
        "'num_experts' is 8, but 'num_local_experts', another name of it, is 4",
    ),
    "nested rope": (
        {"rope_parameters": {"full_attention": LINEAR}},
        "'rope_parameters' has settings for each type",
    ),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "asks for a partial_rotary_factor"),
    "rope number as text": (
        {"rope_parameters": YARN | {"beta_fast": "32"}},
        "'rope_parameters' has 'beta_fast' '32'",
    ),
    "number as text": ({"rms_norm_eps": "1e-05"}, "'rms_norm_eps' is '1e-05'; expected a number"),
    "flag as text": (
        {"tie_word_embeddings": "false"},
        "'tie_word_embeddings' is 'false'; expected true or false",
    ),
    "whole number as float": (
        {"num_hidden_layers": 2.0},
        "'num_hidden_layers' is 2.0; expected a whole number",
    ),
    "bias": ({"attention_bias": True}, "'attention_bias' is True, which is not supported"),
    "softcap": (
        {"attn_logit_softcapping": 50.0},
        "'attn_logit_softcapping' is 50.0, which is not supported",
    ),
    "scaling": ({"logits_scaling": 8.0}, "'logits_scaling' is 8.0, which is not supported"),
    "shared experts": ({"n_shared_experts": 1}, "'n_shared_experts' is 1, which is not supported"),
    "layers that differ": (
        {"per_layer_config": {"0": {"sliding_window": 2}}},
        "'per_layer_config' is",
    ),
    "types of layers": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "'layer_types' is",
    ),
    "encoder": (
        {"is_encoder_decoder": True},
        "'is_encoder_decoder' is true; Mixtral has no encoder",
    ),
    "quantised": ({"quantization_config": {"bits": 4}}, "'quantization_config' is set; quantised"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_change_the_maths_is_refused_by_name(
    kind: str, base: Path, tmp_path: Path
) -> None:
    changes, message = REFUSED[kind]
    path = copied(base, tmp_path / "it")
    edit_config(path, **changes)
    with pytest.raises(
        CheckpointError, match=rf"config\.json: field {message}|config\.json: .*{message}"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": ..., "hidden_size": 32, "num_heads": ..., "num_attention_heads": 4},
        {
            "num_layers": ...,
            "num_hidden_layers": 2,
            "num_sparse_encoder_layers": 12,
            "encoder_sparse_step": ...,
        },
        {"num_decoder_layers": None},
        {
            "add_router_probs": True,
            "router_jitter_noise": 0.5,
            "is_decoder": True,
            "expert_capacity": 4096,
        },
        {"scale_decoder_outputs": True, "dropout_rate": 0.5, "feed_forward_proj": "relu"},
    ],
    ids=[
        "other names",
        "steps by the default's layers",
        "null layers",
        "training's fields",
        "T5's fields",
    ],
)
def test_a_switchs_fields(changes: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("jax")
    # With a step of 1 every layer is sparse, which is what 12 default layers // 12 gives too.
    sparse = 2 if changes.get("num_sparse_encoder_layers") == 12 else 1
    path = helpers.save(
        switch_models.random_switch(3, num_sparse_encoder_layers=sparse), tmp_path / "it"
    )
    edit_config(path, **changes)
    assert check_same(path, tmp_path).tenant("t").notes == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "'hidden_size' is 64, but 'd_model', another name of it, is 32"),
        ({"is_encoder_decoder": False}, "'is_encoder_decoder' is false"),
        (
            {"scale_decoder_outputs": False},
            "'scale_decoder_outputs' is False and tie_word_embeddings True",
        ),
        ({"attention_bias": True}, "'attention_bias' is True, which is not supported"),
        ({"router_bias": "yes"}, "'router_bias' is 'yes'; expected true or false"),
    ],
)
def test_a_switchs_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = helpers.save(switch_models.random_switch(3), tmp_path / "it")
    edit_config(path, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


QWEN3, OLMOE, GRANITE = "qwen3_moe", "olmoe", "granitemoe"

OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str | None]] = {
    "other name of a field": (QWEN3, {}, {"num_local_experts": ..., "num_experts": 5}, None),
    "norm_topk_prob left out": (QWEN3, {"norm_topk_prob": False}, {"norm_topk_prob": ...}, None),
    "window without use": (
        QWEN3,
        {},
        {"sliding_window": 3, "use_sliding_window": False, "max_window_layers": 1},
        None,
    ),
    "the default window": (
        QWEN3,
        {"max_position_embeddings": 8192},
        {"sliding_window": ..., "use_sliding_window": True},
        None,
    ),
    "no layer is dense": (QWEN3, {}, {"mlp_only_layers": None, "decoder_sparse_step": 1}, None),
    "key heads left out": (
        OLMOE,
        {"num_key_value_heads": 3},
        {"num_key_value_heads": ...},
        "does not state num_key_value_heads 3",
    ),
    "no clip": (OLMOE, {}, {"clip_qkv": None, "rope_scaling": None}, None),
    "olmoe's other name": (OLMOE, {}, {"num_experts": ..., "num_local_experts": 5}, None),
    "multipliers left out": (
        GRANITE,
        {},
        {
            "embedding_multiplier": ...,
            "attention_multiplier": ...,
            "residual_multiplier": ...,
            "logits_scaling": ...,
        },
        None,
    ),
    "theta beside": (GRANITE, {}, {"rope_parameters": ..., "rope_theta": 77.0}, None),
}


@pytest.mark.parametrize("kind", rest_slow(OTHERS, 10))
def test_fields_of_other_families_are_read_as_transformers_does(kind: str, tmp_path: Path) -> None:
    family, made, changes, note = OTHERS[kind]
    path = helpers.save(families.random(family, 3, **made), tmp_path / "it")
    edit_config(path, **changes)
    notes = check_same(path, tmp_path).tenant("t").notes
    assert not notes if note is None else any(note in one for one in notes), notes


OTHERS_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "window": (OLMOE, {"sliding_window": 4}, "'sliding_window' is 4, which is not supported"),
    "granite's window": (GRANITE, {"sliding_window": 4}, "'sliding_window' is 4, which is not sup"),
    "heads that are no hidden size": (OLMOE, {"head_dim": 8}, "'head_dim' is 8 for 3 heads"),
    "no clip at all": (OLMOE, {"clip_qkv": 0}, "'clip_qkv' is 0.0; expected a number above 0"),
    "clip elsewhere": (QWEN3, {"clip_qkv": 4.0}, "'clip_qkv' is 4.0, which is not supported"),
    "no sparse layer": (
        QWEN3,
        {"mlp_only_layers": [0, 1, 2]},
        "'decoder_sparse_step' is 1, which with mlp_only_layers .* leaves no sparse layer of 3",
    ),
    "shared expert": (
        QWEN3,
        {"shared_expert_intermediate_size": 8},
        "'shared_expert_intermediate_size' is 8, which is not supported",
    ),
    "other gates": (GRANITE, {"norm_topk_prob": False}, "'norm_topk_prob' is False, which is not"),
    "multiplier elsewhere": (
        OLMOE,
        {"residual_multiplier": 0.5},
        "'residual_multiplier' is 0.5, which is not supported",
    ),
    "no scaling": (GRANITE, {"logits_scaling": 0}, "'logits_scaling' is 0.0; expected a number"),
}


@pytest.mark.parametrize("kind", rest_slow(OTHERS_REFUSED, 10))
def test_refusals_of_other_families(kind: str) -> None:
    name, changes, message = OTHERS_REFUSED[kind]
    family = FAMILIES[name]
    fields = family.fields(families.SIZES[name] | changes, "config.json")
    with pytest.raises(CheckpointError, match=f"config.json: field {message}"):
        family.parse(fields)
        family.check_fields(fields)
