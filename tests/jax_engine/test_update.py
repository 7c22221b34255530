"""A running backend takes a changed store: tenants come and go, plans change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from common import Store
from jax_engine.backend import JaxBackend
from tests import helpers
from tests.helpers import build_round_robin, prompts, rest_slow
from tests.jax_engine.conftest import SwitchFamily, backend_for
from tests.jax_engine.residual_plans import mixed
from tests.schedules import Asked, advance, alone, check_equal
from tests.switch_models import (
    hf_greedy,
    oracle,
    random_switch,
    with_residuals,
)


def test_a_tenant_joins_and_another_leaves(small_family: SwitchFamily, tmp_path: Path) -> None:
    """Every copy that both stores have stays where it is, running sequences go on, and nothing is
    compiled."""
    paths = small_family.paths
    two = build_round_robin(tmp_path / "two", {n: paths[n] for n in ("base", "ana")}, slots=None)
    # The same copies, with a third tenant who takes the place of the first.
    other = build_round_robin(tmp_path / "other", {n: paths[n] for n in ("ana", "bob")}, slots=None)
    backend = backend_for(two)
    asked = Asked("ana", prompts(0, [9])[0], 12)
    asked.begin(backend)
    advance(backend, [(asked, 9)])
    for _ in range(4):
        advance(backend, [(asked, 0)])
    compiled = backend.stats()["compilations"]
    kept = {c: i for i, c in enumerate(contents(two))}
    before, leaves = pointers(backend), backend.loaded.ready._ready["ana"].leaves
    backend.update(other)
    assert backend.loaded.store is other and backend.loaded.ready.ready == ["bob", "ana"]
    now = backend.loaded.ready._ready["ana"].leaves
    assert all(leaf is same for leaf, same in zip(now, leaves, strict=True))
    shared = 0
    for place, content in zip(pointers(backend), contents(other), strict=True):
        if content in kept:
            shared += 1
            assert place == before[kept[content]]
    assert shared > 0
    expected = alone(backend_for(other), [Asked("ana", asked.prompt, 12, [])])[0]
    while not asked.is_done:
        advance(backend, [(asked, 0)])
    assert backend.stats()["compilations"] == compiled
    again = Asked("ana", asked.prompt, 12, asked.answer[:5])
    again.begin(backend)
    advance(backend, [(again, again.unread)])
    new = alone(backend, [Asked("bob", prompts(1, [5])[0], 6), Asked("ana", asked.prompt, 12)])
    assert new[0].answer == hf_greedy(
        oracle(small_family.models[1:], 1, other.plan), new[0].prompt, 6
    )
    assert new[1].answer == expected.answer


def contents(store: Store) -> list[str]:
    """The objects of a store's slots, layer by layer, in the order of the pool's leaves."""
    numbers = sorted(range(len(store.plan.copies)), key=lambda n: store.plan.copies[n].layer)
    return [ref.file_tensor for n in numbers for ref in store.slot_refs(n).values()]


def pointers(backend: JaxBackend) -> list[int]:
    """Of the pool's arrays, layer by layer."""
    return [
        a.unsafe_buffer_pointer()
        for layer in backend.loaded.pool.copies
        for copy in layer
        for a in copy
    ]


@pytest.mark.slow
@pytest.mark.parametrize("options", rest_slow([{}, {"mesh": (1, 2)}]), ids=str)
@pytest.mark.parametrize("residuals", rest_slow([False, True]))
def test_another_plan(
    small_family: SwitchFamily, tmp_path: Path, residuals: bool, options: dict[str, Any]
) -> None:
    """More slots, other copies, residuals or none, misses that end: sequences go on with what the
    new plan gives."""
    if "mesh" in options and len(jax.devices("cpu")) < 8:
        pytest.skip("needs 8 virtual CPU devices: see tests/conftest.py")
    few = build_round_robin(tmp_path / "few", small_family.paths, slots=5)
    many = build_round_robin(tmp_path / "many", small_family.paths, slots="all")
    if residuals:
        few = with_residuals(few, mixed)
    backend = backend_for(few, **options)
    row = prompts(0, [9])[0]
    for store in (many, few, few, many):
        asked = Asked("bob", row, 8)
        asked.begin(backend)
        advance(backend, [(asked, 9)])
        first = list(asked.answer)
        backend.update(store)
        while not asked.is_done:
            advance(backend, [(asked, 0)])
        assert asked.answer[:1] == first
        backend.end([asked.number or 0])
        fresh = backend_for(store, **options)
        check_equal(alone(backend, [Asked("bob", row, 8)]), alone(fresh, [Asked("bob", row, 8)]))
        ours, theirs = backend.stats(), fresh.stats()
        for key in ("pool_bytes", "residual_bytes", "non_expert_bytes", "pool_slots"):
            assert ours[key] == theirs[key], key


@pytest.mark.slow
def test_changes_that_are_refused_change_nothing(
    small_family: SwitchFamily, tmp_path: Path
) -> None:
    paths = small_family.paths
    store = build_round_robin(tmp_path / "store", paths)
    backend = backend_for(store)
    asked = Asked("ana", prompts(0, [9])[0], 6)
    asked.begin(backend)
    advance(backend, [(asked, 9)])
    loaded, before = backend.loaded, backend.stats()
    other_heads = helpers.save(
        random_switch(0, num_layers=3, num_sparse_encoder_layers=1, num_heads=2), tmp_path / "2"
    )
    wide = helpers.save(
        random_switch(0, d_ff=96, num_layers=3, num_sparse_encoder_layers=1), tmp_path / "wide"
    )
    damaged = build_round_robin(tmp_path / "damaged", {**paths, "more": other_heads})
    ref = damaged.ref("more", "encoder.final_layer_norm.weight")
    ref.path.write_bytes(ref.path.read_bytes()[:-9])
    for changed, message in (
        (
            build_round_robin(tmp_path / "a", {"base": paths["base"]}),
            "tenant 'ana' is gone, but has unfinished",
        ),
        (
            build_round_robin(tmp_path / "b", {"ana": other_heads}),
            "tenant 'ana' has another config than before",
        ),
        (
            build_round_robin(tmp_path / "c", {"ana": wide}),
            "its experts have other shapes than those that were",
        ),
        (damaged, "truncated or damaged"),
    ):
        with pytest.raises(Exception, match=message) as error:
            backend.update(changed)
        assert type(error.value).__name__ in ("EngineError", "StoreError")
        assert backend.loaded is loaded and backend.stats() == before
    while not asked.is_done:
        advance(backend, [(asked, 0)])
    assert asked.answer == alone(backend_for(store), [Asked("ana", asked.prompt, 6)])[0].answer
