"""Stores of many layers at Mixtral-8x7B's widths that fit on a small disk and on the card."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.material.random_models import MODELS, write_random
from benchmarks.material.shape import Shape
from common import Store, build_store
from common.planning.round_robin import plan_round_robin
from common.store.objects import Objects

MIXTRAL_8X7B = Shape(
    MODELS["mixtral"]
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
)
TINY = Shape(
    MODELS["tiny-mixtral"]
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_local_experts": 8,
        "vocab_size": 512,
    }
)

KV_BYTES = 2 << 30


def several(store: Store, num_layers: int, num_tenants: int) -> Store:
    """The store's first tenant with another number of layers, beside others with the same experts.

    Every layer has the weights of layer 0, and one copy of each expert serves all tenants. What is
    not an expert is other for each of them, as what tenants have equal is neither read nor copied
    for each: the first one's, turned by some places and written beside it.
    """
    first, family = store.manifest.tenants[0], store.family
    config = family.parse_config({**first.config.raw, "num_hidden_layers": num_layers}, "several")
    source = {
        name: re.sub(r"^model\.layers\.\d+", "model.layers.0", name)
        for name in family.all_shapes(config)
    }
    own = {source[name] for name in family.non_expert_shapes(config)}
    objects = Objects(store.path / "objects", store.manifest.objects)
    tenants = []
    for number in range(num_tenants):
        ids = {name: first.tensors[name] for name in source.values()}
        for name in own if number else ():
            array = store.ref(first.name, name).read()
            ids[name] = objects.put(np.roll(array.reshape(-1), number).reshape(array.shape))
        tensors = {name: ids[of] for name, of in source.items()}
        tenants.append(replace(first, name=f"tenant{number}", config=config, tensors=tensors))
    plan = plan_round_robin(
        np.zeros((num_layers, config.experts.num_experts)), tuple(t.name for t in tenants)
    )
    objects.flush()
    changed: dict[str, Any] = {
        "objects": objects.entries,
        "tenants": tuple(tenants),
        "plan": plan,
        "merged": {},
        "residuals": (),
    }
    return Store(store.path, replace(store.manifest, **changed))


def layers_that_fit(shape: Shape, device: torch.device, ready_tenants: int) -> int:
    """How many layers' experts the card holds beside so many tenants, caches and room to compute;
    all on a CPU."""
    layers = shape.parsed.experts.num_layers
    if device.type != "cuda":
        return layers
    free, _ = torch.cuda.mem_get_info(device)
    vocabulary = 2 * shape.head_weights * 2  # embedding and head
    rest = (shape.step_weights(0) - shape.head_weights) / layers
    layer = 2 * (shape.num_experts * shape.expert_weights + ready_tenants * rest)
    room = 0.9 * free - KV_BYTES - (4 << 30) - ready_tenants * vocabulary
    return max(1, min(layers, int(room / layer)))


def non_expert_store(root: Path, full: Shape) -> Store:
    """Two tenants with all layers' real non-expert weights and small experts: only the former are
    switched."""
    thin = Shape(full.config | {"intermediate_size": 64})
    paths = {
        f"tenant{seed}": write_random(root / f"thin{seed}", thin.config, "bfloat16", seed)
        for seed in (1, 2)
    }
    return build_store(root / "thin", paths, policy="round_robin")
