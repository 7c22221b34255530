"""Small models of every family of decoders, of sizes that are odd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import helpers

ODD: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# head_dim is not hidden_size / heads where a family allows it.
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": ODD | {"num_local_experts": 5, "intermediate_size": 20, "head_dim": 10},
    "qwen3_moe": ODD
    | {
        "num_experts": 5,
        "moe_intermediate_size": 20,
        "intermediate_size": 28,
        "head_dim": 10,
        "num_hidden_layers": 3,
    },
    "olmoe": ODD | {"num_experts": 5, "intermediate_size": 20},
    "granitemoe": ODD
    | {
        "num_local_experts": 5,
        "intermediate_size": 20,
        "head_dim": 10,
        "embedding_multiplier": 2.5,
        "attention_multiplier": 0.21,
        "residual_multiplier": 0.4,
        "logits_scaling": 1.7,
        "tie_word_embeddings": True,
    },
}


def random(family: str, seed: int, **changes: Any) -> Any:
    return helpers.random_model(family, seed, **(SIZES[family] | changes))


def tenants(family: str, path: Path, **changes: Any) -> tuple[list[Any], dict[str, Path]]:
    """Two models of a family, the second a fine-tune of the first, and where they are saved."""
    base = random(family, 3, **changes)
    models = [base, helpers.tuned(base, 4)]
    return models, {n: helpers.save(m, path / n) for n, m in zip(("a", "b"), models, strict=True)}
