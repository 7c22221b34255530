"""Random checkpoints for tests of `common`, written with numpy and safetensors alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.helpers import SIZES

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


@dataclass(frozen=True)
class Model:
    """A config.json, and tensors by the names of the family's checkpoints."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]

    def to(self, dtype: str) -> Model:
        tensors = {name: value.astype(DTYPES[dtype]) for name, value in self.tensors.items()}
        return Model(self.config | {"dtype": dtype}, tensors)

    def changed(self, name: str, change: Callable[[np.ndarray], Any]) -> Model:
        """A copy of which `change` has edited one tensor in place."""
        tensors = self.tensors | {name: self.tensors[name].copy()}
        change(tensors[name])
        return Model(self.config, tensors)


def random_mixtral(seed: int, **changes: Any) -> Model:
    """Random float32 weights, as wide as those of `helpers.random_mixtral`."""
    c = SIZES | {"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False} | changes
    hidden, inter, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    head_dim = hidden // c["num_attention_heads"]
    key_values = c["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(c["num_hidden_layers"]):
        place = f"model.layers.{layer}"
        shapes[f"{place}.input_layernorm.weight"] = shapes[
            f"{place}.post_attention_layernorm.weight"
        ] = (hidden,)
        for name, outputs in (("q", hidden), ("k", key_values), ("v", key_values), ("o", hidden)):
            shapes[f"{place}.self_attn.{name}_proj.weight"] = (outputs, hidden)
        shapes[f"{place}.block_sparse_moe.gate.weight"] = (c["num_local_experts"], hidden)
        for expert in range(c["num_local_experts"]):
            for name, shape in (
                ("w1", (inter, hidden)),
                ("w2", (hidden, inter)),
                ("w3", (inter, hidden)),
            ):
                shapes[f"{place}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    rng = np.random.default_rng(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if "norm" in name:
            return rng.uniform(0.7, 1.3, shape)
        wide = name.endswith("gate.weight") or "embed" in name or "lm_head" in name
        return rng.normal(0, 1.0 if wide else 0.15, shape)

    tensors = {name: drawn(name, shape).astype(np.float32) for name, shape in shapes.items()}
    rope = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    return Model({"model_type": "mixtral", "dtype": "float32"} | rope | c, tensors)


def tuned(model: Model, seed: int, size: float = 0.05) -> Model:
    """A fine-tune: every weight moved, the experts' more the higher their index, so that distances
    differ."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, value in model.tensors.items():
        expert = re.search(r"\.experts\.(\d+)\.", name)
        noise = rng.standard_normal(value.shape) * size * (1 + int(expert[1]) if expert else 1)
        tensors[name] = value + noise.astype(value.dtype)
    return Model(model.config, tensors)


def save(model: Model, path: Path, max_shard_bytes: int | None = None) -> Path:
    """A Hugging Face directory; with `max_shard_bytes` in shards, each of at least one tensor, and
    their index."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(model.config))
    special = {k: v for k, v in model.config.items() if k.endswith("_token_id")}
    (path / "generation_config.json").write_text(json.dumps(special))
    if max_shard_bytes is None:
        save_file(model.tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, value in model.tensors.items():
        if (
            shards[-1]
            and sum(v.nbytes for v in shards[-1].values()) + value.nbytes > max_shard_bytes
        ):
            shards.append({})
        shards[-1][name] = value
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return path
