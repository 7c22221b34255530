"""OLMoE: norms of whole queries and keys, before they are cut into heads, then a clip.

Source: transformers, models/olmoe/modeling_olmoe.py. Names of tensors: `decoder.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from common.families.decoder import FUSED, PER_EXPERT, READ, DecoderFamily
from common.families.fields import Fields
from common.families.shape import Attention, Router


class OlmoeFamily(DecoderFamily):
    """`intermediate_size` is that of an expert."""

    name = "olmoe"
    title = "OLMoE"
    architecture = "OlmoeForCausalLM"
    default_eos_token_id = 50279
    aliases: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}
    read = READ | {"num_experts", "norm_topk_prob", "attention_bias", "clip_qkv"}
    layouts = (PER_EXPERT, FUSED)
    count_field = "num_experts"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
    }

    def attention(self, fields: Fields, usual: Attention) -> Attention:
        hidden = fields.positive_int("hidden_size", self.defaults["hidden_size"])
        if usual.heads * usual.head_dim != hidden:
            raise fields.error(
                "head_dim",
                f"is {usual.head_dim} for {usual.heads} heads; the norm of an OLMoE's queries has "
                f"hidden_size {hidden} numbers, so they must make up that",
            )
        given = fields.raw.get("clip_qkv")
        clip = None if given is None else fields.positive_number("clip_qkv", 1.0)
        bias = fields.flag("attention_bias", False)
        return replace(usual, qk_norm="whole", bias=bias, clip=clip)

    def router(self, fields: Fields, top_k: int) -> Router:
        return Router(top_k, renormalise=fields.flag("norm_topk_prob", False), gates="hidden")


FAMILY = OlmoeFamily()
