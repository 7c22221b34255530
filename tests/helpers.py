"""Checkpoints and oracles for tests, made with Hugging Face's code alone.

Functions that need torch or transformers import them: tests of `common` use the others without
either.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from common import Plan, build_store
from common.dtypes import to_float32
from common.plan.plan import MERGED, MISS
from common.plan.residual import (
    SIGN,
    Part,
    Residual,
    join_parts,
    pack_low_rank,
    pack_sign,
    row_bytes,
)
from common.store import Store

if TYPE_CHECKING:
    from transformers import MixtralForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("MOETEL_SHARED", REPOSITORY.parent / "shared"))
DATA = REPOSITORY / "tests" / "data"

# The bound of the fixtures' README: padding, kernels and order of sums move float32 logits by about
# 1e-5.
TOLERANCE = 1e-4

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def shared_path(name: str) -> Path:
    """A file or folder of the shared material; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent; set MOETEL_SHARED to the folder that holds it")
    return path


def rest_slow(values: Iterable[Any], quick: int = 1, names: int = 1) -> list[Any]:
    """Parameters of which the first `quick` run by default, and the others where slow tests run, as
    in CI.

    names: how many arguments each value is for.
    """
    rows = [v if names > 1 else (v,) for v in values]
    return [
        pytest.param(*row, marks=pytest.mark.slow if i >= quick else ())
        for i, row in enumerate(rows)
    ]


def examples(count: int) -> int:
    """How many examples a property is tested with: a fifth, in CI all."""
    return count if os.environ.get("CI") else max(10, count // 5)


def random_mixtral(seed: int, **changes: Any) -> MixtralForCausalLM:
    """A small Mixtral of random weights, see `random_model`."""
    return random_model("mixtral", seed, **(SIZES | changes))


def random_model(family: str, seed: int, **config: Any) -> Any:
    """Random weights wide enough that tokens spread over experts and greedy choices are clear.

    config: fields of the config class of transformers' `family`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    # Eager experts take every shape; transformers' grouped products want aligned ones.
    made = AutoConfig.for_model(family, **config, experts_implementation="eager")
    model = AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.3)
            elif parameter.ndim == 1:
                parameter.uniform_(0.7, 1.3)
            elif name.endswith(("gate.weight", "router.weight")) or "embed" in name:
                parameter.normal_(0, 1.0)
            elif "lm_head" in name:
                parameter.normal_(0, 1.0)
            else:
                parameter.normal_(0, 0.15)
    return model


def expert_modules(model: Any) -> list[Any]:
    """The experts of each sparse layer: transformers' modules with `gate_up_proj` [E, 2I, H] and
    `down_proj` [E, H, I]."""
    return [m for m in model.modules() if hasattr(m, "gate_up_proj")]


def tuned(model: MixtralForCausalLM, seed: int, size: float = 0.05) -> MixtralForCausalLM:
    """A fine-tune: every weight moved, the experts' more the higher their index, so that distances
    differ."""
    import torch

    found = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * size
            if ".experts." in name:
                noise *= 1 + torch.arange(len(parameter))[:, None, None]
            parameter += noise.to(parameter.dtype)
    return found


def adapted(model: Any, moved: Any, parts: Sequence[str]) -> Any:
    """A fine-tune that moved nothing but its experts and parameters whose names hold one of
    `parts`, like an adapter
    that was merged: of everything else `moved` takes the values of `model`."""
    import torch

    found = copy.deepcopy(moved)
    with torch.no_grad():
        for (name, value), before in zip(found.named_parameters(), model.parameters(), strict=True):
            if ".experts." not in name and not any(part in name for part in parts):
                value.copy_(before)
    return found


def save(model: MixtralForCausalLM, path: Path, **options: Any) -> Path:
    model.save_pretrained(path, **options)
    return path


def tensor_names(path: Path) -> list[str]:
    """Names of all tensors in a directory's files."""
    from safetensors import safe_open

    found: list[str] = []
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            found += tensors.keys()
    return found


def load(path: Path, dtype: Any = "float32") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, experts_implementation="eager"
    ).eval()


def oracle(tenants: Sequence[MixtralForCausalLM], index: int, plan: Plan) -> MixtralForCausalLM:
    """The tenant's Hugging Face model with each expert replaced as the plan says; its own where it
    misses."""
    model = copy.deepcopy(tenants[index])
    own, all_experts = expert_modules(model), [expert_modules(m) for m in tenants]
    for layer in range(plan.num_layers):
        for expert in range(plan.num_experts):
            slot = plan.serving[index, layer, expert]
            owner = index if slot < 0 else plan.copies[slot].owner
            ours, theirs = own[layer], all_experts[owner][layer]
            ours.gate_up_proj.data[expert] = theirs.gate_up_proj.data[expert]
            ours.down_proj.data[expert] = theirs.down_proj.data[expert]
    return model


def hf_logits(model: MixtralForCausalLM, ids: Any, mask: Any = None) -> np.ndarray:
    """float32 [batch, seq, vocab]."""
    import torch

    given = torch.as_tensor(ids)
    attention_mask = None if mask is None else torch.as_tensor(mask)
    positions = None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        out = model(
            input_ids=given, attention_mask=attention_mask, position_ids=positions, use_cache=False
        )
    return out.logits.float().numpy()


def hf_greedy(
    model: MixtralForCausalLM, prompt: Sequence[int], count: int, eos: int | None = None
) -> list[int]:
    """New tokens of greedy generation, the row alone and unpadded."""
    import torch

    ids = torch.tensor([list(prompt)])
    model.generation_config.eos_token_id = eos
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
        )
    return out[0, len(prompt) :].tolist()


def prompts(seed: int, lengths: Sequence[int], vocab_size: int = 96) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab_size, size=n).tolist() for n in lengths]


def padded(rows: Sequence[Sequence[int]], side: str = "right") -> tuple[np.ndarray, np.ndarray]:
    """input_ids and attention_mask, int64 [batch, longest]."""
    longest = max(map(len, rows))
    ids, mask = (
        np.zeros((len(rows), longest), dtype=np.int64),
        np.zeros((len(rows), longest), dtype=np.int64),
    )
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def assert_close(
    found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE, what: str = "logits"
) -> None:
    """Fails with the largest and the mean difference."""
    assert found.shape == expected.shape, f"{what}: {found.shape} against {expected.shape}"
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    assert difference.max() <= tolerance, (
        f"{what}: max {difference.max():.3g}, mean {difference.mean():.3g}"
    )


def fingerprint(path: Path) -> dict[str, str]:
    """Every file below a path with its hash, the lock left out."""
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def oracle_of_store(
    store: Store, models: Sequence[MixtralForCausalLM], index: int
) -> MixtralForCausalLM:
    """The tenant's Hugging Face model in float32, its experts set to what the store serves: copies
    plus residuals."""
    import torch

    model = copy.deepcopy(models[index]).float()
    for layer in range(store.plan.num_layers):
        experts = expert_modules(model)[layer]
        for expert in range(store.plan.num_experts):
            served = {
                p: torch.from_numpy(w)
                for p, w in store.served_expert(store.tenants[index], layer, expert).items()
            }
            experts.gate_up_proj.data[expert] = torch.cat((served["gate"], served["up"]))
            experts.down_proj.data[expert] = served["down"]
    return model


def random_record(
    parts: Sequence[Part], shapes: Mapping[str, tuple[int, ...]], seed: int, size: float
) -> np.ndarray:
    """The record of parts with random content, each part's matrix with entries of about `size`:
    uint8 [bytes]."""
    rng = np.random.default_rng(seed)
    packed = []
    for part in parts:
        outputs, inputs = shapes[part.projection]
        if part.kind == SIGN:
            scale = rng.uniform(0.5, 1.5, size=-(-outputs // part.size)) * size
            packed.append(
                pack_sign(scale.astype(np.float32), rng.random((outputs, inputs)) < 0.5, part.size)
            )
            continue
        if part.bits <= 8:
            v, u = (rng.integers(0, 2**part.bits, size=(part.size, n)) for n in (inputs, outputs))
        else:
            v, u = (rng.standard_normal((part.size, n)) for n in (inputs, outputs))
        spread = (
            (4**part.bits - 1) / 12 if part.bits <= 8 else 1.0
        )  # variance of a product's two factors
        scale = rng.uniform(0.5, 1.5, size=part.size) * size / (spread * part.size**0.5)
        data = pack_low_rank(scale.astype(np.float32), v, u, part.bits)
        if part.like is not None:  # it has the other's v
            of_u = part.size * row_bytes(outputs, part.bits)
            data = np.concatenate([data[: part.v_offset], data[len(data) - of_u :]])
        packed.append(data)
    return join_parts(packed)


def with_residuals(
    plan: Plan,
    shapes: Mapping[str, tuple[int, ...]],
    parts: Callable[[int, int, int], Sequence[Part]],
    seed: int = 0,
    size: float = 0.05,
) -> tuple[Plan, list[np.ndarray]]:
    """The plan with random residuals, and their records, for `common.store.set_plan`.

    parts: (tenant, layer, expert) -> the parts there, none for no residual; asked wherever a copy
        serves the tenant.
    shapes: of the expert's projections, `dict(store.experts.projections)`. size: of the entries of
        a part's matrix.
    """
    residuals, records = [], []
    for place in np.argwhere(plan.serving != MISS).tolist():
        chosen = tuple(parts(*place))
        if chosen:
            residuals.append(Residual(*place, chosen))
            records.append(random_record(chosen, shapes, seed + len(records), size))
    return replace(plan, residuals=tuple(residuals)), records


def with_merged(
    store: Store, slots: Sequence[int]
) -> tuple[Plan, dict[int, dict[str, np.ndarray]]]:
    """The store's plan with these copies replaced by the mean of all tenants', and that mean, for
    `set_plan`."""
    plan, merged = store.plan, {}
    copies = list(plan.copies)
    for slot in slots:
        at = plan.copies[slot]
        own = [store.copy_refs(name, at.layer, at.expert) for name in store.tenants]
        merged[slot] = {p: np.mean([to_float32(o[p].read()) for o in own], axis=0) for p in own[0]}
        copies[slot] = replace(at, owner=MERGED, mix=(1 / len(own),) * len(own))
    return replace(plan, copies=tuple(copies)), merged


def build_round_robin(path: Path, tenants: Any, **options: Any) -> Store:
    """A store by the paper's rule, unless options say otherwise: every copy is a tenant's own, as
    `oracle` supposes, and nothing is added to it."""
    return build_store(path, tenants, **({"policy": "round_robin"} | options))


def flip(store: Store, object_id: str) -> Path:
    """Change an object's first byte. Returns its file."""
    path, offset = store.objects.path(object_id), store.objects.ref(object_id).offset
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    return path
