"""Granite MoE: four multipliers, and gates that are a softmax over the picked experts.

Source: transformers, models/granitemoe/modeling_granitemoe.py; layouts on disk:
conversion_mapping.py. Both keep all experts of a layer in one tensor; canonical names are as if
each matrix had its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from common.families.decoder import GATE_UP, NAMES, READ, DecoderFamily
from common.families.fields import Fields
from common.families.shape import Attention, Router, Scalars

MOE = "model.layers.{n}.block_sparse_moe"


class GraniteMoeFamily(DecoderFamily):
    """Attention's multiplier takes the place of the usual scale, whose default is 1."""

    name = "granitemoe"
    title = "Granite MoE"
    architecture = "GraniteMoeForCausalLM"
    default_eos_token_id = 2
    read = READ | frozenset(
        """
        num_local_experts attention_bias embedding_multiplier residual_multiplier
        attention_multiplier logits_scaling
        """.split()
    )
    layouts = (
        {
            **NAMES,
            "router": f"{MOE}.router.layer.weight",
            **{p: f"{MOE}.experts.{{e}}.{p}_proj.weight" for p in ("gate", "up", "down")},
        },
        {
            **NAMES,
            "router": f"{MOE}.router.layer.weight",
            GATE_UP: f"{MOE}.input_linear.weight",
            "down": f"{MOE}.output_linear.weight",
        },
        {
            **NAMES,
            "router": f"{MOE}.router.weight",
            GATE_UP: f"{MOE}.experts.gate_up_proj",
            "down": f"{MOE}.experts.down_proj",
        },
    )
    saved_layout = 1
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
    }

    def attention(self, fields: Fields, usual: Attention) -> Attention:
        scale = fields.number("attention_multiplier", 1.0)
        return replace(usual, scale=scale, bias=fields.flag("attention_bias", False))

    def router(self, fields: Fields, top_k: int) -> Router:
        return Router(top_k, softmax="picked", gates="hidden")

    def scalars(self, fields: Fields) -> Scalars:
        return Scalars(
            embedding=fields.number("embedding_multiplier", 1.0),
            residual=fields.number("residual_multiplier", 1.0),
            logits_divisor=fields.positive_number("logits_scaling", 1.0),
        )


FAMILY = GraniteMoeFamily()
