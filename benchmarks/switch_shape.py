"""Random Switch Transformers of real sizes, written in seconds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoints import write_hugging_face
from common.dtypes import BY_NAME
from common.families import FAMILIES


@dataclass(frozen=True)
class SwitchShape:
    """A Switch Transformer's sizes; the defaults are google/switch-base-8."""

    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 3072
    num_heads: int = 12
    num_layers: int = 12
    num_sparse_layers: int = 6
    num_experts: int = 8
    vocab_size: int = 32128

    @property
    def config(self) -> dict[str, Any]:
        return {
            "model_type": "switch_transformers",
            "vocab_size": self.vocab_size,
            "d_model": self.d_model,
            "d_kv": self.d_kv,
            "d_ff": self.d_ff,
            "num_heads": self.num_heads,
            "num_layers": self.num_layers,
            "num_decoder_layers": self.num_layers,
            "num_sparse_encoder_layers": self.num_sparse_layers,
            "num_sparse_decoder_layers": self.num_sparse_layers,
            "num_experts": self.num_experts,
            "expert_capacity": 64,
            "dense_act_fn": "relu",
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": True,
        }

    @property
    def _attention(self) -> int:
        return 4 * self.d_model * self.num_heads * self.d_kv

    @property
    def expert_weights(self) -> int:
        return 2 * self.d_model * self.d_ff

    def step_weights(self, experts_hit: float) -> float:
        """Weights that a decode step reads: cross-attention's keys and values are cached, the head
        is the embedding."""
        dense = self.num_layers - self.num_sparse_layers
        attention = self._attention * 3 // 2
        feed = (dense + self.num_sparse_layers * experts_hit) * self.expert_weights
        return self.num_layers * attention + feed + self.vocab_size * self.d_model

    def encoder_flops(self, tokens: int) -> float:
        """Of the encoder's products and of the decoder's keys and values of the prompt; attention
        scores aside."""
        return 2 * tokens * self.num_layers * (self._attention * 3 / 2 + self.expert_weights)


def write_random_switch(
    path: Path,
    shape: SwitchShape,
    dtype: str,
    seed: int = 0,
    moved: float = 0.0,
    frozen_experts: bool = False,
) -> Path:
    """Write a random checkpoint. Routers spread tokens over experts.

    moved: standard deviation, relative to the weights', of a second noise that is added with seed
        `seed`, to the same
    first noise whatever the seed: a fine-tune. frozen_experts: to all but the experts.
    """
    family = FAMILIES["switch_transformers"]
    config = family.parse_config(shape.config, "shape")
    base = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)
    other = np.random.default_rng(1 + seed).standard_normal(1 << 20, dtype=np.float32)
    path.mkdir(parents=True, exist_ok=True)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        # Each tensor repeats one block of noise from another start: fresh noise for gigabytes would
        # take minutes.
        for number, (name, size) in enumerate(family.all_shapes(config).items()):
            count = int(np.prod(size))
            if name.endswith("layer_norm.weight"):
                yield name, np.ones(size, BY_NAME[dtype])
                continue
            start = number * 7919 % len(base)
            values = np.resize(np.roll(base, start), count)
            if moved and not (frozen_experts and ".experts." in name):
                values = values + moved * np.resize(np.roll(other, start), count)
            wide = "shared" in name or "router" in name
            std = 1.0 if wide else size[-1] ** -0.5 * (shape.d_kv**-0.5 if ".q." in name else 1)
            if ".wo." in name or ".o." in name:
                # Else what all tokens share grows with depth, and routers send them to few experts.
                std *= 0.2
            yield name, (values * np.float32(std)).astype(BY_NAME[dtype]).reshape(size)

    write_hugging_face(path, family.hf_config(config, dtype), tensors())
    (path / "generation_config.json").write_text(
        json.dumps({"decoder_start_token_id": 0, "eos_token_id": 1})
    )
    return path


def add_switch_shape(parser: argparse.ArgumentParser) -> None:
    for name, value in SwitchShape().__dict__.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}"
        )


def switch_shape_of(args: argparse.Namespace) -> SwitchShape:
    return SwitchShape(**{name: getattr(args, name) for name in SwitchShape().__dict__})
