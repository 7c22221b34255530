"""Switch Transformers for tests: random Hugging Face models, and T5X's files written by flax and
TensorStore alone.

The table from Hugging Face's names to T5X's is written here a second time, from the description of
the format, so that tests do not rest on the code they judge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import torch
from flax import serialization
from safetensors.numpy import save_file
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from common.families import FAMILIES

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_heads": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "num_experts": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}

# Tests write thousands of small files; none has to survive a power cut.
UNSYNCED = ts.Context({"file_io_sync": False})

# Shapes that differ in all that inference has to find; the tied and untied head, the router's bias.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "uneven depths": {"num_layers": 2, "num_decoder_layers": 3, "num_sparse_encoder_layers": 1},
    "wide": {
        "d_model": 12,
        "d_kv": 5,
        "d_ff": 40,
        "num_heads": 3,
        "num_experts": 7,
        "vocab_size": 33,
    },
    "all sparse": {
        "num_sparse_encoder_layers": 4,
        "num_sparse_decoder_layers": 4,
        "num_experts": 2,
    },
    "one layer": {
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "untied": {"tie_word_embeddings": False},
    "router bias": {"router_bias": True},
}


def random_switch(seed: int = 0, **changes: Any) -> SwitchTransformersForConditionalGeneration:
    """Random weights; where the head is not tied, one table of embeddings for both sides, as T5X
    has."""
    torch.manual_seed(seed)
    model = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**(SIZES | changes))
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
        for side in (model.encoder, model.decoder):
            side.embed_tokens.weight.copy_(model.shared.weight)
    return model


def arrays_of(model: SwitchTransformersForConditionalGeneration) -> dict[str, np.ndarray]:
    """Every parameter by Hugging Face's name, tied ones under each of theirs."""
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def gated_directory(path: Path, seed: int = 0, **changes: Any) -> Path:
    """A gated Switch as a Hugging Face directory; transformers has no module for one, so its arrays
    are made here."""
    raw = {
        k: v
        for k, v in SwitchTransformersConfig(**(SIZES | changes)).to_dict().items()
        if v is not None
    }
    raw |= {
        "model_type": "switch_transformers",
        "dense_act_fn": "gelu_new",
        "feed_forward_proj": "gated-gelu",
    }
    family = FAMILIES["switch_transformers"]
    rng = np.random.default_rng(seed)
    shapes = family.all_shapes(family.parse_config(raw, "test"))
    path.mkdir(parents=True)
    save_file(
        {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()},
        path / "model.safetensors",
    )
    (path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return path


def t5x_parameters(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """T5X's arrays, by their dotted names below `target`, from Hugging Face's tensors."""
    found: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    attention = {"SelfAttention": {"encoder": "attention", "decoder": "self_attention"}}
    attention["EncDecAttention"] = {"decoder": "encoder_decoder_attention"}
    for name, value in tensors.items():
        if name == "shared.weight":
            found["token_embedder.embedding"] = value
        elif name == "lm_head.weight":
            if not np.array_equal(value, tensors["shared.weight"]):
                found["decoder.logits_dense.kernel"] = value.T
        elif name.endswith("embed_tokens.weight"):
            pass
        elif match := re.fullmatch(r"(\w+)\.final_layer_norm\.weight", name):
            found[f"{match[1]}.{match[1]}_norm.scale"] = value
        else:
            match = re.fullmatch(r"(\w+)\.block\.(\d+)\.layer\.(\d)\.(.*)", name)
            assert match, name
            side, layer, part, rest = match.groups()
            place, words = f"{side}.layers_{layer}", rest.split(".")
            if "relative_attention_bias" in rest:
                found[f"{side}.relpos_bias.rel_embedding"] = value.T
            elif rest == "layer_norm.weight":
                norms = ["pre_attention", "pre_mlp"]
                if side == "decoder":
                    norms = ["pre_self_attention", "pre_cross_attention", "pre_mlp"]
                found[f"{place}.{norms[int(part)]}_layer_norm.scale"] = value
            elif words[0] in attention:
                kind = {"q": "query", "k": "key", "v": "value", "o": "out"}[words[1]]
                found[f"{place}.{attention[words[0]][side]}.{kind}.kernel"] = value.T
            elif "experts" in words:
                number, projection = int(words[2].removeprefix("expert_")), words[3]
                experts.setdefault(f"{place}.mlp.expert.{projection}.kernel", {})[number] = value.T
            elif "router" in words:
                kind = {"weight": "kernel", "bias": "bias"}[words[-1]]
                found[f"{place}.mlp.router.router_weights.w.{kind}"] = value.T
            else:
                found[f"{place}.mlp.{words[1]}.kernel"] = value.T
    for name, rows in experts.items():
        found[name] = np.stack([rows[i] for i in range(len(rows))])
    return found


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return tree


def write_t5x(
    path: Path, parameters: Mapping[str, np.ndarray], *, old_paths: bool = False, inline: str = ""
) -> Path:
    """A T5X directory, with flax's serialization and TensorStore; chunks of a few rows, so that
    there are several.

    old_paths: a bucket's driver, and the path beside it, as tensorstore before 0.1.14 had it.
    inline: parameters whose name contains this stand in the index itself.
    """
    leaves: dict[str, Any] = {}
    for name, value in parameters.items():
        if inline and inline in name:
            leaves[name] = np.ascontiguousarray(value)
            continue
        chunks = [n // 2 if n % 2 == 0 else n for n in value.shape]
        metadata = {"shape": list(value.shape), "chunks": chunks, "compressor": {"id": "gzip"}}
        spec = {"driver": "zarr", "dtype": value.dtype.name, "metadata": metadata}
        real = spec | {"kvstore": {"driver": "file", "path": f"{path}/target.{name}/"}}
        ts.open(real, create=True, open=True, context=UNSYNCED).result().write(value).result()
        if old_paths:
            leaves[name] = spec | {
                "kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket"},
                "path": f"target.{name}",
            }
        else:
            leaves[name] = spec | {"kvstore": {"driver": "file", "path": f"target.{name}/"}}
    save_index(
        path,
        {"version": 3, "optimizer": {"target": nested(leaves), "state": {"step": np.int32(3)}}},
    )
    return path


def save_index(path: Path, tree: Any) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))


def load_index(path: Path) -> Any:
    return serialization.msgpack_restore((path / "checkpoint").read_bytes())
