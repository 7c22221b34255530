"""Random models of real shapes, for measurements of speed: no download, seconds to write."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import Store, StoreError, build_store
from common.checkpoints import write_hugging_face
from common.dtypes import BY_NAME
from common.families import FAMILIES
from common.progress import Progress, silent

NOISE = 1 << 20

_MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
}

_SWITCH: dict[str, Any] = {
    "model_type": "switch_transformers",
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_heads": 12,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_sparse_encoder_layers": 6,
    "num_sparse_decoder_layers": 6,
    "num_experts": 8,
    "expert_capacity": 64,
    "dense_act_fn": "relu",
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}

MODELS: dict[str, dict[str, Any]] = {
    # A Mixtral of 0.8 B parameters.
    "mixtral": _MIXTRAL,
    # Mixtral-8x7B's proportions at a thirty-second of its size: half its width, an eighth of its
    # layers and vocabulary. Non-expert weights are 3.6 % of the experts' as there (3.3 %); in the
    # shape above, mostly for its head, 7.6 %.
    "mixtral-slice": _MIXTRAL
    | {
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 4000,
    },
    # allenai/OLMoE-1B-7B-0924.
    "olmoe": {
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 50304,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    },
    # Qwen/Qwen3-30B-A3B.
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    },
    # google/switch-base-8.
    "switch": _SWITCH,
    # For trying commands themselves.
    "tiny-mixtral": _MIXTRAL
    | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 512,
    },
    "tiny-switch": _SWITCH
    | {
        "vocab_size": 96,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 256,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_experts": 4,
    },
}


def write_random(
    path: Path,
    config: dict[str, Any],
    dtype: str,
    seed: int = 0,
    *,
    moved: float | None = None,
    equal: Sequence[str] = (),
    same_layers: bool = False,
) -> Path:
    """Write a random checkpoint; routers spread tokens over experts.

    Args:
        config: as config.json has it.
        seed: seeds give tenants without anything in common, but for norms.
        moved: the weights are those of seed 0, and noise of this seed is added: a fine-tune. Its
            standard deviation is this share of the weights'.
        equal: tensors whose names hold one of these parts are those of seed 0.
        same_layers: every layer has the weights of layer 0, which a store keeps once.
    """
    family = FAMILIES[config["model_type"]]
    checked = family.parse_config(config, "a random model")
    noise = np.random.default_rng(0).standard_normal(NOISE, dtype=np.float32)
    path.mkdir(parents=True)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        # Each tensor repeats one block of noise from another start: fresh noise for gigabytes would
        # take minutes.
        numbers: dict[str, int] = {}
        for name, shape in family.all_shapes(checked).items():
            if len(shape) == 1:
                yield name, np.ones(shape, BY_NAME[dtype])
                continue
            known = re.sub(r"\.(layers|block)\.\d+\.", ".", name) if same_layers else name
            number = numbers.setdefault(known, len(numbers))
            mine = 0 if any(part in name for part in equal) else seed
            count = int(np.prod(shape))

            def block(of: int, number: int = number, count: int = count) -> np.ndarray:
                start = (number * 7919 + of * 104729) % NOISE
                if start + count <= NOISE:
                    return noise[start : start + count].copy()
                return np.resize(np.roll(noise, -start), count)

            values = block(mine if moved is None else 0)
            if moved and mine:
                values = values + moved * block(mine)
            values *= np.float32(_spread(name, shape, config))
            yield name, values.astype(BY_NAME[dtype]).reshape(shape)

    write_hugging_face(path, family.hf_config(checked, dtype), tensors())
    return path


def _spread(name: str, shape: tuple[int, ...], config: dict[str, Any]) -> float:
    """Standard deviation of a tensor's weights."""
    if any(part in name for part in ("embed_tokens", "shared", "router", "gate.weight")):
        return 1.0
    std = 1 / math.sqrt(shape[-1])
    if ".q." in name:  # T5 does not divide attention scores by the head's size
        std /= math.sqrt(config["d_kv"])
    if any(part in name for part in (".o.", ".wo.", "o_proj", ".w2.", "down_proj")):
        # Else what all tokens share grows with depth, and routers send them to few experts.
        std *= 0.2
    return std


def random_store(
    work: Path, model: str, num_tenants: int, dtype: str, progress: Progress = silent
) -> Store:
    """A store of random tenants under `work`, one copy a position by the paper's rule; the one that
    is there if it is.

    Takes the tenants' sizes on disk, and as much again while it is built. Raises StoreError.
    """
    config = MODELS[model]
    version = hashlib.sha256(json.dumps([config, dtype]).encode()).hexdigest()[:8]
    path = work / f"{model}-{num_tenants}-{version}"
    if path.exists():
        try:
            return Store.open(path)
        except StoreError as error:
            raise StoreError(f"{error}; remove {path} to have it made anew") from error
    scratch = work / f".{path.name}.checkpoints"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    names = [f"tenant{i}" for i in range(num_tenants)]
    try:
        with progress("writing random tenants", num_tenants) as advance:
            for seed, name in enumerate(names):
                write_random(scratch / name, config, dtype, seed)
                advance()
        return build_store(
            path, {n: scratch / n for n in names}, policy="round_robin", progress=progress
        )
    except OSError as error:
        raise StoreError(
            f"{work}: cannot be written: {error}; free some space or choose another --work"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
