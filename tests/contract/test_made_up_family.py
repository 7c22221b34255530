"""A family of a known shape needs one file: this one is defined here, and everything serves it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import SamplingParams, add_tenant, load_engine
from common.checkpoints import open_checkpoint
from common.families import FAMILIES
from common.families.decoder import READ, DecoderFamily
from common.families.fields import Fields
from common.families.shape import Attention, Mlp, Router, alternate
from tests import families, helpers

BLOCK = "trunk.{n}"
MATRICES = ("gate", "up", "down")
PER_EXPERT = {
    "embed": "tokens.table",
    "norm": "last.scale",
    "head": "answer.table",
    "input_norm": f"{BLOCK}.before.scale",
    "post_norm": f"{BLOCK}.between.scale",
    **{role: f"{BLOCK}.look.{role}" for role in ("q", "k", "v", "o", "q_norm", "k_norm")},
    "router": f"{BLOCK}.choose",
    **{p: f"{BLOCK}.expert.{{e}}.{p}" for p in MATRICES},
    **{f"dense_{p}": f"{BLOCK}.plain.{p}" for p in MATRICES},
}
STACKED = PER_EXPERT | {p: f"{BLOCK}.{p}s" for p in MATRICES}


class MadeUpFamily(DecoderFamily):
    """Qwen3-MoE's maths with other names: odd layers are dense, experts lie in a stack for each
    matrix."""

    name = "made_up"
    title = "Made-Up"
    architecture = "MadeUpForCausalLM"
    read = READ | {"experts"}
    count_field = "experts"
    layouts = (PER_EXPERT, STACKED)
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 101,
        "hidden_size": 36,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "experts": 5,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
    }

    def attention(self, fields: Fields, usual: Attention) -> Attention:
        return replace(usual, qk_norm="head")

    def router(self, fields: Fields, top_k: int) -> Router:
        return Router(top_k, gates="hidden")

    def layers(self, fields: Fields, count: int) -> tuple[Mlp, ...]:
        return alternate([n % 2 == 0 for n in range(count)], inner=28)


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> MadeUpFamily:
    made = MadeUpFamily()
    monkeypatch.setitem(FAMILIES, made.name, made)
    return made


# transformers' name of a tensor -> the made-up one, in the layout of one stack a matrix.
NAMES = {
    "model.embed_tokens.weight": "tokens.table",
    "model.norm.weight": "last.scale",
    "lm_head.weight": "answer.table",
    "input_layernorm.weight": "before.scale",
    "post_attention_layernorm.weight": "between.scale",
    **{f"self_attn.{p}_proj.weight": f"look.{p}" for p in "qkvo"},
    **{f"self_attn.{p}_norm.weight": f"look.{p}_norm" for p in "qk"},
    **{f"mlp.{p}_proj.weight": f"plain.{p}" for p in MATRICES},
    "mlp.gate.weight": "choose",
    "mlp.experts.down_proj": "downs",
}


def save_made_up(model: Any, path: Path) -> Path:
    """A Qwen3-MoE of transformers as a directory of the made-up family."""
    plain = helpers.save(model, path.with_name(f"{path.name}-plain"), save_original_format=False)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        if not layer.isdigit():
            tensors[NAMES[name]] = tensor
        elif rest == "mlp.experts.gate_up_proj":
            gates, ups = tensor.chunk(2, dim=1)
            tensors[f"trunk.{layer}.gates"] = gates.contiguous()
            tensors[f"trunk.{layer}.ups"] = ups.contiguous()
        else:
            tensors[f"trunk.{layer}.{NAMES[rest]}"] = tensor
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    config = {"model_type": "made_up", "head_dim": 10, "experts": 5, "intermediate_size": 20}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_one_file_is_enough(family: MadeUpFamily, tmp_path: Path) -> None:
    base = families.random("qwen3_moe", 0, mlp_only_layers=[1])
    models = [base, helpers.tuned(base, 1)]
    paths = {n: save_made_up(m, tmp_path / n) for n, m in zip("ab", models, strict=True)}
    helpers.build_round_robin(tmp_path / "store", {"a": paths["a"]})
    store = add_tenant(tmp_path / "store", "b", paths["b"])
    assert store.family is family and store.plan.num_layers == 2
    rows = helpers.prompts(0, (9, 4), 101)
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    with load_engine(store) as engine:
        for i, name in enumerate("ab"):
            model = helpers.oracle(models, i, store.plan)
            for row in rows:
                found = engine.logits(name, [row])
                helpers.assert_close(found, helpers.hf_logits(model, [row]))
                answer = engine.generate(name, row, params)
                assert list(answer.token_ids) == helpers.hf_greedy(model, row, 8)
    store.export("b", tmp_path / "export")
    expected = store.config("b")
    again = open_checkpoint(tmp_path / "export")
    assert (again.family, again.config.shape) == (family, expected.shape)
    assert "trunk.0.expert.4.down" in helpers.tensor_names(tmp_path / "export")
