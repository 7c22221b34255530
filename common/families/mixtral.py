"""Mixtral: every layer sparse, gates renormalised over the picked experts and left in float32.

Source: transformers, models/mixtral/modeling_mixtral.py; layouts on disk: conversion_mapping.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from common.families.decoder import FUSED, NAMES, READ, DecoderFamily
from common.families.fields import Fields
from common.families.shape import Router


class MixtralFamily(DecoderFamily):
    """In files, w1 is the gate, w3 up and w2 down."""

    name = "mixtral"
    title = "Mixtral"
    architecture = "MixtralForCausalLM"
    default_eos_token_id = 2
    aliases: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}
    read = READ | {"num_local_experts", "use_sliding_window"}
    layouts = (
        {
            **NAMES,
            "router": "model.layers.{n}.block_sparse_moe.gate.weight",
            "gate": "model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight",
            "up": "model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight",
            "down": "model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight",
        },
        FUSED,
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    }

    def router(self, fields: Fields, top_k: int) -> Router:
        return Router(top_k, renormalise=True)

    def window(self, fields: Fields) -> int | None:
        """One for all layers, and no field that turns it off."""
        window = fields.optional_positive_int("sliding_window")
        if window is not None and fields.raw.get("use_sliding_window") is False:
            fields.notes.append(
                f"sliding_window {window} is applied: Mixtral does not read use_sliding_window "
                "(set the window to null)"
            )
        return window


FAMILY = MixtralFamily()
