"""One core for both families: one rule gives the plan, whichever engine asks, and whatever format a
tenant came in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import common.build.build
from common import load_engine
from tests import helpers, switch_models
from tests.helpers import shared_path

# The plans that these tests state are those of the paper's rule.
build_store = partial(common.build.build.build_store, policy="round_robin")


def mixtral_expert(model: Any, layer: int, expert: int) -> torch.Tensor:
    experts = model.model.layers[layer].mlp.experts
    return torch.cat(
        [experts.gate_up_proj[expert].flatten(), experts.down_proj[expert].flatten()]
    ).double()


def switch_expert(model: Any, layer: int, expert: int) -> torch.Tensor:
    found = switch_models.sparse_mlps(model)[layer].experts[f"expert_{expert}"]
    return torch.cat([p.flatten() for p in found.parameters()]).double()


CASES: dict[
    str,
    tuple[Callable[[int], Any], Callable[[Any, int], Any], Callable[[Any, int, int], torch.Tensor]],
] = {
    "torch": (helpers.random_mixtral, helpers.tuned, mixtral_expert),
    "jax": (switch_models.random_switch, switch_models.tuned, switch_expert),
}


@pytest.mark.parametrize("slots", [None, 5])
@pytest.mark.parametrize("backend", CASES)
def test_the_plan_is_the_papers_rule_on_hugging_faces_weights(
    backend: str, slots: Any, tmp_path: Path
) -> None:
    """Algorithm 1 of arXiv 2505.06481, written here a second time: positions by distance, owners in
    turn."""
    pytest.importorskip(backend)
    make, tune, weights = CASES[backend]
    base = make(0)
    models = [base, tune(base, 1), tune(base, 2)]
    paths = {f"t{i}": helpers.save(m, tmp_path / f"t{i}") for i, m in enumerate(models)}
    store = build_store(tmp_path / "store", paths, slots=slots)
    layers, experts = store.experts.num_layers, store.experts.num_experts
    distance = np.zeros((layers, experts), dtype=np.float64)
    with torch.no_grad():
        for layer in range(layers):
            for expert in range(experts):
                flat = [weights(m, layer, expert) for m in models]
                distance[layer, expert] = sum(
                    float((a - b).norm()) for i, a in enumerate(flat) for b in flat[i + 1 :]
                )
    expected = np.full(layers * experts, -1)
    for turn, position in enumerate(np.argsort(distance.reshape(-1), kind="stable")[:slots]):
        expected[position] = turn % 3
    with load_engine(store) as engine:
        assert np.array_equal(engine.plan.owner, expected.reshape(layers, experts))


def test_a_t5x_and_a_hugging_face_directory_give_one_store(tmp_path: Path) -> None:
    pytest.importorskip("tensorstore")
    folder = shared_path("fixtures/switch_tiny")
    others = {n: folder / n for n in ("tenant1", "tenant2")}
    plain = build_store(tmp_path / "plain", {"base": folder / "hf"} | others)
    t5x = build_store(
        tmp_path / "t5x",
        {"base": folder / "t5x" / "checkpoint_1000"} | others,
        configs={"base": folder / "hf" / "config.json"},
    )
    assert [dict(t.tensors) for t in plain.manifest.tenants] == [
        dict(t.tensors) for t in t5x.manifest.tenants
    ]
    assert plain.manifest.objects == t5x.manifest.objects
    assert (
        np.array_equal(plain.plan.serving, t5x.plan.serving)
        and plain.plan.copies == t5x.plan.copies
    )
    assert np.array_equal(plain.distances.matrix, t5x.distances.matrix)


def test_what_t5x_does_not_say_is_said(tmp_path: Path) -> None:
    pytest.importorskip("tensorstore")
    store = build_store(
        tmp_path / "store", {"base": shared_path("fixtures/switch_tiny/t5x/checkpoint_1000")}
    )
    assert any("relative_attention_max_distance" in note for note in store.tenant("base").notes)
