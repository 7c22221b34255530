"""Qwen3-MoE: norms of each head's queries and keys, many small experts, dense layers where the
config says so.

Source: transformers, models/qwen3_moe/modeling_qwen3_moe.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from common.families.decoder import FUSED, PER_EXPERT, READ, DecoderFamily
from common.families.fields import Fields
from common.families.shape import Attention, Mlp, Router, alternate


class Qwen3MoeFamily(DecoderFamily):
    """`intermediate_size` is that of dense layers, `moe_intermediate_size` that of experts."""

    name = "qwen3_moe"
    title = "Qwen3-MoE"
    architecture = "Qwen3MoeForCausalLM"
    aliases: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}
    read = READ | frozenset(
        """
        num_local_experts moe_intermediate_size norm_topk_prob attention_bias use_sliding_window
        decoder_sparse_step mlp_only_layers
        """.split()
    )
    layouts = (PER_EXPERT, FUSED)
    size_field = "moe_intermediate_size"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "sliding_window": 4096,
    }

    def attention(self, fields: Fields, usual: Attention) -> Attention:
        bias = fields.flag("attention_bias", False)
        return replace(usual, qk_norm="head", bias=bias)

    def router(self, fields: Fields, top_k: int) -> Router:
        return Router(top_k, renormalise=fields.flag("norm_topk_prob", False), gates="hidden")

    def window(self, fields: Fields) -> int | None:
        """One for all layers where it is in use; transformers does not read max_window_layers."""
        absent = "sliding_window" not in fields.raw
        window = (
            self.defaults["sliding_window"]
            if absent
            else fields.optional_positive_int("sliding_window")
        )
        return window if fields.flag("use_sliding_window", False) else None

    def layers(self, fields: Fields, count: int) -> tuple[Mlp, ...]:
        step = fields.positive_int("decoder_sparse_step", default=1)
        dense = fields.raw.get("mlp_only_layers") or ()
        if not isinstance(dense, list | tuple) or not all(type(n) is int for n in dense):
            raise fields.error("mlp_only_layers", f"is {dense!r}; expected numbers of layers")
        inner = fields.positive_int("intermediate_size", self.defaults["intermediate_size"])
        found = alternate([n not in dense and (n + 1) % step == 0 for n in range(count)], inner)
        if all(n in dense or (n + 1) % step for n in range(count)):
            raise fields.error(
                "decoder_sparse_step",
                f"is {step}, which with mlp_only_layers {list(dense)} leaves no sparse layer of "
                f"{count}; a model without experts has none to share",
            )
        return found


FAMILY = Qwen3MoeFamily()
