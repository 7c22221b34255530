"""Switch Transformers and oracles for tests, made with Hugging Face's code alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from common import Plan, Store
from common.plan.residual import Part
from common.store.change import set_plan
from tests import helpers

Model = SwitchTransformersForConditionalGeneration

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_experts": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "expert_capacity": 4096,
}


def random_switch(seed: int, gated: bool = False, **changes: Any) -> Model:
    """Random weights wide enough that tokens spread over experts and greedy choices are clear.

    gated: every feed-forward becomes transformers' own gated module of T5, which its Switch has no
        setting for.
    """
    torch.manual_seed(seed)
    model = Model(SwitchTransformersConfig(**(SIZES | changes))).eval()
    if gated:
        c = model.config
        t5 = T5Config(
            d_model=c.d_model, d_ff=c.d_ff, feed_forward_proj="gated-gelu", dropout_rate=0.0
        )
        for block in blocks(model):
            if block.is_sparse:
                experts = block.layer[-1].mlp.experts
                for name in list(experts):
                    experts[name] = T5DenseGatedActDense(t5)
            else:
                block.layer[-1].mlp = T5DenseGatedActDense(t5)
        c.feed_forward_proj, c.is_gated_act, c.dense_act_fn = "gated-gelu", True, "gelu_new"
        model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.uniform_(0.7, 1.3)
            elif (
                "router" in name
                or "embed" in name
                or "shared" in name
                or "relative" in name
                or "lm_head" in name
            ):
                parameter.normal_(0, 1.0)
            elif ".q." in name:
                parameter.normal_(0, 0.15)
            else:
                parameter.normal_(0, 0.25)
    return model


def blocks(model: Model) -> list[nn.Module]:
    return [*model.encoder.block, *model.decoder.block]


def sparse_mlps(model: Model) -> list[Any]:
    """The sparse feed-forwards in the order that plans count them."""
    return [block.layer[-1].mlp for block in blocks(model) if block.is_sparse]


def tuned(model: Model, seed: int, size: float = 0.05) -> Model:
    """A fine-tune: every weight moved, the experts' more the higher their index, so that distances
    differ."""
    found = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * size
            if ".experts.expert_" in name:
                noise *= 1 + int(name.split(".experts.expert_")[1].split(".")[0])
            parameter += noise
    return found


def oracle(tenants: Sequence[Model], index: int, plan: Plan) -> Model:
    """The tenant's Hugging Face model with each expert replaced as the plan says; its own where it
    misses."""
    model = copy.deepcopy(tenants[index])
    for layer, ours in enumerate(sparse_mlps(model)):
        for expert in range(plan.num_experts):
            slot = plan.serving[index, layer, expert]
            if slot >= 0:
                theirs = sparse_mlps(tenants[plan.copies[slot].owner])[layer]
                ours.experts[f"expert_{expert}"] = copy.deepcopy(theirs.experts[f"expert_{expert}"])
    return model


def oracle_of_store(model: Model, store: Store, name: str) -> Model:
    """A tenant's Hugging Face model with the weights that the store serves it: copies, its own, and
    residuals."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for layer, mlp in enumerate(sparse_mlps(found)):
            for expert in range(store.plan.num_experts):
                module = mlp.experts[f"expert_{expert}"]
                served = store.served_expert(name, layer, expert)
                up = "wi_1" if "gate" in served else "wi"
                for projection, weight in served.items():
                    theirs = {"gate": "wi_0", "up": up, "down": "wo"}[projection]
                    getattr(module, theirs).weight.copy_(torch.from_numpy(weight))
    return found


def with_residuals(
    store: Store, parts: Callable[[int, int, int], Sequence[Part]], merged: Sequence[int] = ()
) -> Store:
    """Give a store's plan random residuals, and make the copies in some slots the mean of all
    tenants' weights.

    parts: (tenant, layer, expert) -> the parts there, none for no residual; asked wherever a copy
        serves the tenant.
    """
    plan, means = helpers.with_merged(store, merged)
    plan, records = helpers.with_residuals(plan, dict(store.experts.projections), parts, size=0.07)
    return set_plan(store.path, plan, means, records)


def with_capacity(model: Model, capacity: int) -> Model:
    for mlp in sparse_mlps(model):
        mlp.router.expert_capacity = capacity
    return model


@torch.inference_mode()
def hf_logits(model: Model, ids: Any, decoder_ids: Any, mask: Any = None) -> np.ndarray:
    """float32 [batch, decoder tokens, vocab]."""
    out = model(
        input_ids=torch.as_tensor(ids),
        attention_mask=None if mask is None else torch.as_tensor(mask),
        decoder_input_ids=torch.as_tensor(decoder_ids),
        use_cache=False,
    )
    return out.logits.float().numpy()


@torch.inference_mode()
def hf_greedy(model: Model, prompt: Sequence[int], count: int, eos: int | None = None) -> list[int]:
    """New tokens of greedy generation, the row alone and unpadded; the start token left out."""
    model.generation_config.eos_token_id = eos
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return out[0, 1:].tolist()
