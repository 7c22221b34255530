"""How many weights a model has where, counted on its family's tensors: what floors are made of."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from benchmarks.material.random_models import MODELS
from common.families import FAMILIES, ModelConfig


@dataclass(frozen=True)
class Shape:
    """A model's sizes. config: as config.json has it."""

    config: dict[str, Any]

    @cached_property
    def parsed(self) -> ModelConfig:
        return FAMILIES[self.config["model_type"]].parse_config(self.config, "--sizes")

    @property
    def vocab_size(self) -> int:
        return self.parsed.vocab_size

    @property
    def num_experts(self) -> int:
        return self.parsed.experts.num_experts

    @property
    def expert_weights(self) -> int:
        return self.parsed.experts.copy_elements

    @cached_property
    def _non_experts(self) -> dict[str, int]:
        """Matrices of everything that is not an expert."""
        shapes = FAMILIES[self.config["model_type"]].non_expert_shapes(self.parsed)
        return {
            name: prod(shape)
            for name, shape in shapes.items()
            if len(shape) > 1 and "relative_attention_bias" not in name
        }

    @property
    def head_weights(self) -> int:
        return self.vocab_size * self.parsed.experts.hidden_size

    @property
    def sparse_layers(self) -> int:
        """Layers with experts that a step goes through: of the decoder, where there are two."""
        layers = self.parsed.experts.expert_layers
        return sum("encoder" not in layer for layer in layers)

    @cached_property
    def _read_by_a_step(self) -> dict[str, int]:
        """Of the embedding a step reads a few rows; of cross-attention keys and values are
        cached."""
        left_out = ("embed", "shared", "encoder.", "EncDecAttention.k", "EncDecAttention.v")
        read = {
            name: count
            for name, count in self._non_experts.items()
            if not any(part in name for part in left_out)
        }
        return {"lm_head.weight": self.head_weights} | read

    def step_weights_of(self, parts: Sequence[str]) -> int:
        """Of the weights that a step reads, those whose tensors' names hold one of the parts."""
        return sum(
            count
            for name, count in self._read_by_a_step.items()
            if any(part in name for part in parts)
        )

    def step_weights(self, experts_hit: float) -> float:
        """Weights that a decode step reads, if so many different experts are hit a layer."""
        experts = self.sparse_layers * experts_hit * self.expert_weights
        return sum(self._read_by_a_step.values()) + experts

    def prompt_flops(self, tokens: int) -> float:
        """Multiplications and additions of a prompt's products; attention scores and the head
        aside."""
        top_k = self.parsed.experts.top_k
        if not self.parsed.is_encoder_decoder:
            return 2 * tokens * (self.step_weights(top_k) - self.head_weights)
        layers = len(self.parsed.experts.expert_layers) - self.sparse_layers
        read = sum(
            count
            for name, count in self._non_experts.items()
            if any(p in name for p in ("encoder.", "EncDecAttention.k", "EncDecAttention.v"))
        )
        return 2 * tokens * (read + layers * top_k * self.expert_weights)

    def __str__(self) -> str:
        sizes = {k: v for k, v in self.config.items() if type(v) is int and "token_id" not in k}
        return f"{self.config['model_type']}, " + ", ".join(f"{k} {v}" for k, v in sizes.items())


def add_model(parser: argparse.ArgumentParser, **default_sizes: Mapping[str, int]) -> None:
    """--family and --sizes. default_sizes: of each family, beside those of `MODELS`."""
    families = ("mixtral", "switch", "olmoe", "qwen3-30b-a3b")
    parser.add_argument("--family", choices=families, default="mixtral")
    parser.add_argument(
        "--sizes",
        nargs="*",
        default=[],
        metavar="NAME=N",
        help="sizes of the random model by their names in config.json, as num_hidden_layers=2",
    )
    parser.set_defaults(default_sizes=default_sizes)


def shape_of(args: argparse.Namespace) -> Shape:
    """The random model that is asked for. Raises SystemExit for a size that it has not."""
    config = MODELS[args.family] | dict(args.default_sizes.get(args.family, {}))
    for text in args.sizes:
        name, _, value = text.partition("=")
        if type(config.get(name)) is not int or not value.isdigit():
            known = ", ".join(k for k, v in config.items() if type(v) is int)
            raise SystemExit(f"--sizes {text}: write NAME=N of {known}")
        config[name] = int(value)
    return Shape(config)
