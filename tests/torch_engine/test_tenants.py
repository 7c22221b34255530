"""Tenants that differ in all but their experts, and tenants that have most of their own weights
equal."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from common import load_engine
from tests import helpers
from tests.conftest import Family
from tests.helpers import assert_close, hf_greedy, hf_logits, rest_slow
from tests.torch_engine.comparison import NEW
from torch_engine.tenants.by_copy import TenantsByCopy

# What belongs to a tenant alone: everything that experts do not see.
OWN: dict[str, dict[str, Any]] = {
    "usual": {},
    "heads": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 40},
    "window": {"sliding_window": 4, "rms_norm_eps": 1e-3, "max_position_embeddings": 64},
    "tied": {
        "tie_word_embeddings": True,
        "vocab_size": 120,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e3},
    },
}


@pytest.fixture
def unlike(tmp_path: Path) -> Family:
    """Four tenants that differ in all but their experts' shape, in one type or another."""
    models = [helpers.random_mixtral(i, **changes) for i, changes in enumerate(OWN.values())]
    return Family(
        {n: helpers.save(m, tmp_path / n) for n, m in zip(OWN, models, strict=True)}, models
    )


@pytest.mark.parametrize(
    "way", ["in place", "in place, one ready", "by copy", "by copy, one ready", "by copy, two"]
)
def test_tenants_may_differ_in_all_but_their_experts(
    unlike: Family, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`by copy` is the path that CUDA takes, here on the host's memory: one buffer serves tenants
    of any size."""
    if "copy" in way:
        monkeypatch.setattr(
            "torch_engine.backend.TenantsInPlace",
            lambda store, dtype, capacity, product: TenantsByCopy(
                store, dtype, torch.device("cpu"), capacity
            ),
        )
    capacity = 1 if "one" in way else 2 if "two" in way else None
    store = helpers.build_round_robin(tmp_path / "store", unlike.paths, slots=6)
    oracles = [helpers.oracle(unlike.models, i, store.plan) for i in range(4)]
    names = unlike.names
    rng = random.Random(0)
    with load_engine(store, ready_tenants=capacity) as engine:
        for index in [*range(4), *(rng.randrange(4) for _ in range(8))]:
            row = helpers.prompts(index, [13], oracles[index].config.vocab_size)[0]
            assert_close(
                engine.logits(names[index], [row]),
                hf_logits(oracles[index], [row]),
                what=names[index],
            )
        requests = [
            (i, helpers.prompts(n, [3 + n], oracles[i].config.vocab_size)[0])
            for n, i in enumerate([2, 0, 1, 3, 3, 1, 0, 2])
        ]
        answers = engine.generate_batch([(names[i], row) for i, row in requests], NEW)
        for (index, row), answer in zip(requests, answers, strict=True):
            assert list(answer.token_ids) == hf_greedy(oracles[index], row, NEW.max_new_tokens), (
                names[index]
            )
        assert (engine.stats()["reconfigured_bytes"] > 0) == ("copy" in way or capacity is not None)


@pytest.fixture
def adapted(tmp_path: Path) -> Family:
    """A base, two adapters of its attention, one of which moved the last norm as well, and one that
    moved all."""
    base = helpers.random_mixtral(0)
    other = helpers.tuned(base, 3)
    models = [
        base,
        helpers.adapted(base, helpers.tuned(base, 1), ["q_proj", "v_proj"]),
        helpers.adapted(base, helpers.tuned(base, 2), ["o_proj", "model.norm"]),
        other,
    ]
    names = ("base", "qv", "o", "other")
    return Family(
        {n: helpers.save(m, tmp_path / n) for n, m in zip(names, models, strict=True)}, models
    )


@pytest.mark.parametrize(
    "options", rest_slow([{}, {"products": "plain"}, {"ready_tenants": 2}], 2), ids=str
)
@pytest.mark.parametrize("copies", [False, True], ids=["in place", "by copy"])
def test_what_tenants_have_equal_is_held_once(
    adapted: Family,
    tmp_path: Path,
    copies: bool,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if copies:
        monkeypatch.setattr(
            "torch_engine.backend.TenantsInPlace",
            lambda store, dtype, capacity, product: TenantsByCopy(
                store, dtype, torch.device("cpu"), capacity
            ),
        )
    # On the device all places are as large as the last tenant's, see below.
    count = 3 if copies else 4
    paths = {n: adapted.paths[n] for n in adapted.names[:count]}
    store = helpers.build_round_robin(tmp_path / "store", paths, slots=6)
    oracles = [helpers.oracle(adapted.models[:count], i, store.plan) for i in range(count)]
    rows = helpers.prompts(0, [9, 4, 17, 6, 5, 12, 3, 8])
    whole = store.non_expert_bytes("base")
    with load_engine(store, **options) as engine:
        # All that the first three have of their own: matrices of attention in each of two layers.
        held, most = engine.stats()["non_expert_bytes"], 0.35 * whole
        if "ready_tenants" not in options:
            assert (count - 2) * whole < held < (count - 2) * whole + 3 * most
        requests = [(engine.tenants[i % count], row) for i, row in enumerate(rows)]
        for (name, row), answer in zip(requests, engine.generate_batch(requests, NEW), strict=True):
            assert list(answer.token_ids) == hf_greedy(
                oracles[engine.tenants.index(name)], row, NEW.max_new_tokens
            )
        for i, name in enumerate(engine.tenants):
            assert_close(
                engine.logits(name, [rows[i]]), hf_logits(oracles[i], [rows[i]]), what=name
            )
        if "ready_tenants" in options:
            before = engine.stats()
            for name in ("base", "qv", "o", "base"):
                engine.generate(name, rows[0], NEW)
            after = engine.stats()
            switches = after["reconfigurations"] - before["reconfigurations"]
            copied = after["reconfigured_bytes"] - before["reconfigured_bytes"]
            assert switches >= 3 and copied < most * switches


@pytest.mark.parametrize("copies", [False, True], ids=["in place", "by copy"])
def test_what_tenants_had_equal_goes_with_the_last_of_them(
    adapted: Family, tmp_path: Path, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if copies:
        monkeypatch.setattr(
            "torch_engine.backend.TenantsInPlace",
            lambda store, dtype, capacity, product: TenantsByCopy(
                store, dtype, torch.device("cpu"), capacity
            ),
        )
    paths = adapted.paths
    four = helpers.build_round_robin(tmp_path / "four", paths)
    with load_engine(four) as engine:
        # A tenant without anything in common makes all places on the device as large as its own.
        assert (engine.stats()["non_expert_bytes"] < 3 * four.non_expert_bytes("base")) == (
            not copies
        )
    three = helpers.build_round_robin(
        tmp_path / "three", {n: paths[n] for n in ("base", "qv", "o")}
    )
    two = helpers.build_round_robin(tmp_path / "two", {n: paths[n] for n in ("other", "o")})
    row = helpers.prompts(1, [7])[0]
    with load_engine(three) as engine:
        few = engine.stats()["non_expert_bytes"]
        assert few < 2.05 * three.non_expert_bytes("base")
        for store in (two, three):
            engine.update(store)
            with load_engine(store) as fresh:
                for name in store.tenants:
                    assert_close(engine.logits(name, [row]), fresh.logits(name, [row]))
                # A tenant whose weights lie in its own buffer keeps them there when others that
                # have them come.
                held, expected = (e.stats()["non_expert_bytes"] for e in (engine, fresh))
                assert (
                    expected
                    <= held
                    <= (expected if not copies else expected + store.non_expert_bytes("o"))
                )
