"""Configs of T5X directories: found from shapes, completed by a config.json, or contradicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import CheckpointError
from common.checkpoints import (
    Checkpoint,
    open_checkpoint,
    read_asset,
    write_t5x,
)
from common.checkpoints.t5x_config import sparse_step
from common.families.shape import Mlp, sparse_layers
from common.families.switch_transformers import shape_of
from tests import switch
from tests.oracle.checkpoints.t5x.same import moved_experts


def sides(checkpoint: Checkpoint) -> tuple[tuple[Mlp, ...], tuple[Mlp, ...]]:
    shape = shape_of(checkpoint.config)
    return shape.encoder, shape.decoder


def test_sparse_layers_that_transformers_has_no_rule_for(
    parameters: dict[str, np.ndarray], tmp_path: Path
) -> None:
    path = switch.write_t5x(tmp_path / "checkpoint_3", moved_experts(parameters))
    found = open_checkpoint(path)
    assert [sparse_layers(s) for s in sides(found)] == [(2, 5), (1, 3)]
    assert found.config.raw["moetel_sparse_layers"] == {"encoder": [2, 5], "decoder": [1, 3]}
    assert found.config.experts.num_layers == 4
    with pytest.raises(CheckpointError, match=r"sparse encoder layers \[2, 5\]"):
        found.family.hf_config(found.config, "float32")
    # A config for transformers that has as many sparse layers is believed but for where they are.
    config = switch.random_switch(num_layers=6).config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    given = open_checkpoint(path, tmp_path / "config.json")
    assert [sparse_layers(s) for s in sides(given)] == [(2, 5), (1, 3)]
    assert given.config.raw["relative_attention_max_distance"] == 20
    assert any(
        "sparse encoder layers are [2, 5]" in note and "mean [1, 4]" in note for note in given.notes
    )
    config["moetel_sparse_layers"] = {"encoder": [2, 5], "decoder": [1, 3]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert open_checkpoint(path, tmp_path).notes == ()
    config["moetel_sparse_layers"]["encoder"] = [1, 5]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"'moetel_sparse_layers' .* encoder layers \[1, 5\]"):
        open_checkpoint(path, tmp_path)


@pytest.mark.parametrize(
    ("sparse", "num_layers", "step"),
    [
        ((), 3, 0),
        ((0, 1), 2, 1),
        ((0,), 1, 1),
        ((1, 3), 4, 2),
        ((1,), 4, 4),
        ((1, 4), 6, 3),
        ((2, 5), 6, None),
    ],
)
def test_steps_are_those_of_transformers(
    sparse: tuple[int, ...], num_layers: int, step: int | None
) -> None:
    assert sparse_step(sparse, num_layers) == step


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("vocab_size", 50, r"48 \(target.token_embedder.embedding is \[48, 16\]\)"),
        ("d_model", 32, r"16 \(target.token_embedder.embedding is \[48, 16\]\)"),
        ("hidden_size", 32, r"16 \(target.token_embedder"),
        ("d_kv", 8, r"4 \(target.encoder.layers_0.attention.query.kernel is \[16, 16\], 4 heads\)"),
        ("d_ff", 64, r"24 \(target.decoder.layers_0.mlp.wi.kernel is \[16, 24\]\)"),
        ("num_layers", 12, r"4 \(4 layers in target.encoder\)"),
        ("num_decoder_layers", 2, r"4 \(4 layers in target.decoder\)"),
        ("num_heads", 8, r"4 \(target.encoder.relpos_bias.rel_embedding is \[4, 8\]\)"),
        (
            "num_experts",
            8,
            r"4 \(target.encoder.layers_1.mlp.router.router_weights.w.kernel is \[16, 4\]\)",
        ),
        ("relative_attention_num_buckets", 32, r"8 \(target.encoder.relpos_bias"),
        ("tie_word_embeddings", False, r"True \(target.decoder.logits_dense.kernel is absent\)"),
        (
            "router_bias",
            True,
            r"False \(target.encoder.layers_1.mlp.router.router_weights.w.bias is absent\)",
        ),
        ("num_sparse_encoder_layers", 4, r"experts \(mlp.expert\) in layers \[1, 3\] of 4"),
        ("decoder_sparse_step", 1, r"makes the decoder layers \[0, 1, 2, 3\] sparse"),
        ("feed_forward_proj", "gated-gelu", r"wi alone \(not gated\)"),
        ("is_gated_act", True, r"wi alone \(not gated\)"),
        ("model_type", "mixtral", r"the checkpoint holds a Switch Transformer"),
        ("num_heads", "four", r"'num_heads' is 'four', but the checkpoint has 4"),
        ("expert_capacity", -1, r"'expert_capacity' is -1; expected a whole number"),
    ],
)
def test_configs_that_contradict(
    field: str, value: Any, found: str, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({field: value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=found) as caught:
        open_checkpoint(checkpoint, tmp_path / "config.json")
    assert str(tmp_path / "config.json") in str(caught.value)
    assert repr(value) in str(caught.value)


def test_config_fields_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    """In the checkpoint's own directory, or named; null stays null; what is not ours travels
    along."""
    raw = {
        "layer_norm_epsilon": 1e-5,
        "eos_token_id": None,
        "n_positions": 512,
        "task_specific_params": {"a": 1},
    }
    (checkpoint / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    (checkpoint / "spiece.model").write_bytes(b"pieces")
    found = open_checkpoint(checkpoint)
    assert raw.items() <= found.config.raw.items()
    assert shape_of(found.config).norm_eps == 1e-5
    assert set(found.assets) == {"config.json", "spiece.model"}
    assert "epsilon" not in found.notes[0] and "eos" not in found.notes[0]
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"layer_norm_epsilon": 1e-4}), encoding="utf-8")
    (other / "tokenizer.json").write_text("{}", encoding="utf-8")
    named = open_checkpoint(checkpoint, other)
    assert shape_of(named.config).norm_eps == 1e-4
    assert json.loads(read_asset(named.assets["config.json"])) == named.config.raw
    assert (
        named.assets["tokenizer.json"] == other / "tokenizer.json"
        and "spiece.model" in named.assets
    )
    with pytest.raises(CheckpointError, match=r"nowhere.json: no such file"):
        open_checkpoint(checkpoint, tmp_path / "nowhere.json")
    with pytest.raises(CheckpointError, match=r"checkpoint_3/config.json: no such file"):
        (checkpoint / "config.json").unlink()
        open_checkpoint(checkpoint, checkpoint)


def test_a_config_for_a_hugging_face_directory_is_refused(tmp_path: Path) -> None:
    switch.random_switch().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has its own config\.json"):
        open_checkpoint(tmp_path, tmp_path / "config.json")


def test_gated_configs(tmp_path: Path) -> None:
    source = open_checkpoint(switch.gated_directory(tmp_path / "hf"))
    path = tmp_path / "t5x"
    path.mkdir()
    write_t5x(path, source)
    (path / "config.json").write_text(json.dumps({"dense_act_fn": "silu"}), encoding="utf-8")
    found = open_checkpoint(path)
    assert found.config.experts.activation == "silu" and shape_of(found.config).experts.gated
    (path / "config.json").write_text(json.dumps({"feed_forward_proj": "relu"}), encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"'feed_forward_proj' is 'relu', .* wi_0 and wi_1 \(gated\)"
    ):
        open_checkpoint(path)
