"""Kinds of fine-tunes: models changed with torch as trainers change them, and what `moetel inspect`
calls them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common import Store, build_store
from common.store.kinds import SAMPLED_EXPERTS, SAMPLED_ROWS, kind_of, reference_of
from scripts import cli
from tests import helpers, switch_models

SIZES = {"hidden_size": 64, "intermediate_size": 128}


def changed(model: Any, parts: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy in which `change` is added to every matrix whose name holds `parts`, in float32, and
    then rounded."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in found.named_parameters():
            if parts in name:
                value.copy_((value.float() + change(value)).to(value.dtype))
    return found


def low_rank(
    rank: int, size: float, experts: int | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Products of random factors, one an expert for tensors of several; the first `experts` of them
    alone."""
    generator = torch.Generator().manual_seed(7)

    def change(value: torch.Tensor) -> torch.Tensor:
        *lead, out, inputs = value.shape
        up = torch.randn(*lead, out, rank, generator=generator)
        down = torch.randn(*lead, rank, inputs, generator=generator)
        update = up @ down * size
        if experts is not None:
            update[experts:] = 0
        return update

    return change


def dense(size: float, experts: int | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(8)

    def change(value: torch.Tensor) -> torch.Tensor:
        update = torch.randn(value.shape, generator=generator) * size
        if experts is not None:
            update[experts:] = 0
        return update

    return change


def stored(models: dict[str, Any], work: Path) -> Store:
    paths = {name: helpers.save(model, work / name) for name, model in models.items()}
    return build_store(work / "store", paths, slots="all")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_kind_is_told(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = helpers.random_mixtral(1, **SIZES).to(dtype)
    # Gate and up lie in one tensor of transformers', so that a rank there is their sum's bound, not
    # each one's.
    made = {
        "first": first,
        "same": first,
        "attention": changed(first, "self_attn.q_proj", low_rank(4, 0.1)),
        "norms": changed(first, "norm", dense(0.1)),
        "lora": changed(first, ".mlp.experts.down_proj", low_rank(4, 0.1)),
        "one": changed(first, ".mlp.experts.down_proj", low_rank(4, 0.1, experts=1)),
        "some": changed(first, ".mlp.experts.", dense(0.05, experts=3)),
        "full": changed(first, ".", dense(0.05)),
    }
    store = stored(made, tmp_path)
    assert reference_of(store) == "first"
    found = {name: str(kind_of(store, name, "first")) for name in made}
    assert found == {
        "first": "identical",
        "same": "identical",
        "attention": "attention only",
        "norms": "non-expert weights only",
        "lora": "low rank 4, 8 of 8 experts moved (measured on 4)",
        "one": "low rank 4, 2 of 8 experts moved (measured on 2)",
        "some": "6 of 8 experts moved",
        "full": "full",
    }
    assert cli.main(["inspect", str(store.path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "beside" in out and "attention only" in out and "low rank 4" in out


@pytest.mark.parametrize("rank", [1, 8, 24])
def test_ranks_of_merged_adapters(rank: int, tmp_path: Path) -> None:
    """In bfloat16, where rounding alone makes every difference of full rank."""
    first = switch_models.random_switch(1, d_model=64, d_ff=128).bfloat16()
    tuned = changed(first, ".experts.", low_rank(rank, 0.1))
    store = stored({"tuned": tuned, "base": first}, tmp_path)
    assert reference_of(store) == "base"
    kind = kind_of(store, "tuned", "base")
    assert (kind.rank, kind.moved, kind.measured) == (rank, kind.positions, SAMPLED_EXPERTS)


def test_types_that_a_store_widened(tmp_path: Path) -> None:
    """bfloat16 tenants in a float32 store: what was rounded is still told from what was trained."""
    first = helpers.random_mixtral(1, **SIZES).bfloat16()
    tuned = changed(first, ".mlp.experts.down_proj", low_rank(4, 0.1))
    models = {"first": first, "tuned": tuned, "wide": helpers.random_mixtral(1, **SIZES)}
    store = stored(models, tmp_path)
    assert store.dtype == "float32"
    assert kind_of(store, "tuned", "first").rank == 4
    assert str(kind_of(store, "wide", "first")) == "full"


def test_equal_tenants_cost_no_reading_and_others_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = helpers.random_mixtral(1, num_local_experts=8)
    models = {
        "first": first,
        "attention": changed(first, "self_attn", dense(0.1)),
        "lora": changed(first, ".mlp.experts.down_proj", low_rank(2, 0.1)),
    }
    store = stored(models, tmp_path)
    mapped: list[str] = []
    from common.checkpoints import TensorRef

    before = TensorRef.map
    monkeypatch.setattr(
        TensorRef, "map", lambda ref: (mapped.append(ref.path.name), before(ref))[1]
    )
    assert str(kind_of(store, "attention", "first")) == "attention only" and not mapped
    assert kind_of(store, "lora", "first").rank == 2
    assert 0 < len(mapped) <= 2 * SAMPLED_EXPERTS * len(store.experts.projections)


def test_rows_of_large_matrices_are_a_sample(tmp_path: Path) -> None:
    first = helpers.random_mixtral(
        1, hidden_size=32, intermediate_size=2 * SAMPLED_ROWS + 5, num_hidden_layers=1
    )
    tuned = changed(first, ".mlp.experts.gate_up_proj", low_rank(3, 0.1))
    models = {"first": first, "lora": tuned, "full": changed(first, ".", dense(0.05))}
    store = stored(models, tmp_path)
    assert kind_of(store, "lora", "first").rank == 3
    assert str(kind_of(store, "full", "first")) == "full"


def test_damage_is_left_to_verify(tmp_path: Path) -> None:
    first = helpers.random_mixtral(1)
    models = {"first": first, "lora": changed(first, ".mlp.experts.down_proj", low_rank(2, 0.1))}
    store = stored(models, tmp_path)
    damaged = {
        store.copy_refs("lora", layer, expert)["down"].path
        for layer in range(2)
        for expert in range(4)
    }
    for path in damaged:
        path.write_bytes(b"")
    assert str(kind_of(store, "lora", "first")) == "full"
