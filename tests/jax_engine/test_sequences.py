"""Sequences through the backend: any schedule gives what each gives alone, and what Hugging Face's
model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from common import EngineError
from common.serving.backend import Part, Row
from tests.helpers import assert_close, build_round_robin, prompts, rest_slow
from tests.jax_engine.conftest import SwitchFamily, backend_for, save_family
from tests.jax_engine.residual_plans import mixed
from tests.schedules import CLOSE, Asked, advance, alone, check_equal, requests_of, run
from tests.switch_models import (
    hf_greedy,
    hf_logits,
    oracle,
    oracle_of_store,
    random_switch,
    with_residuals,
)

CASES: dict[str, tuple[Any, bool, dict[str, Any]]] = {
    "native": (None, False, {"products": "native"}),
    "misses, plain": (3, False, {"products": "plain"}),
    "plain": (None, False, {"products": "plain"}),
    "residuals": (None, True, {"products": "native"}),
    "residuals, plain": (None, True, {"products": "plain"}),
    "misses": (3, False, {"products": "native", "spare_slots": 2}),
    "residuals and misses": (5, True, {"products": "native"}),
    "capacity": (None, False, {"products": "native", "expert_capacity": 2}),
    "few ready": ("all", False, {"products": "native", "ready_tenants": 2}),
    "mesh": (None, False, {"mesh": (2, 2)}),
    "mesh, residuals": (5, True, {"mesh": (2, 2)}),
}


@pytest.mark.parametrize("case", rest_slow(CASES))
def test_a_random_schedule_equals_each_alone(
    small_family: SwitchFamily, tmp_path: Path, case: str
) -> None:
    slots, residuals, options = CASES[case]
    if "mesh" in options and len(jax.devices("cpu")) < 8:
        pytest.skip("needs 8 virtual CPU devices: see tests/conftest.py")
    store = build_round_robin(tmp_path / "store", small_family.paths, slots=slots)
    if residuals:
        store = with_residuals(store, mixed, merged=(0,))
    backend = backend_for(store, **options)
    expected = alone(backend, requests_of(store.tenants, 1, 5, longest=17))
    before = backend.stats()
    found = requests_of(store.tenants, 1, 5, longest=17)
    preempted = run(backend, found, seed=1, most_tenants=options.get("ready_tenants"))
    check_equal(found, expected)
    after = backend.stats()
    if not preempted:
        assert [(a.hits, a.misses) for a in found] == [(a.hits, a.misses) for a in expected]
    assert after["misses"] - before["misses"] == sum(a.misses for a in found)
    assert after["hits"] - before["hits"] == sum(a.hits for a in found)
    assert (after["misses"] > 0) == (slots in (3, 5))
    assert after["kv_cache_used_bytes"] == 0 and not backend.sequences.caches.caches


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_more_random_schedules(small_family: SwitchFamily, tmp_path: Path, seed: int) -> None:
    store = build_round_robin(tmp_path / "store", small_family.paths, slots=(None, 5)[seed % 2])
    backend = backend_for(store)
    expected = alone(backend, requests_of(store.tenants, seed, 12, longest=90, answer=40))
    found = requests_of(store.tenants, seed, 12, longest=90, answer=40)
    run(backend, found, seed)
    check_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("slots", rest_slow([9, None]))
def test_a_random_schedule_equals_hugging_face(
    switch_family: SwitchFamily, tmp_path: Path, slots: Any
) -> None:
    store = build_round_robin(tmp_path / "store", switch_family.paths, slots=slots)
    models = {n: oracle(switch_family.models, i, store.plan) for i, n in enumerate(store.tenants)}
    found = requests_of(store.tenants, 3, 6)
    run(backend_for(store), found, seed=4)
    for asked in found:
        assert asked.answer == hf_greedy(models[asked.tenant], asked.prompt, asked.count)
        theirs = hf_logits(models[asked.tenant], [asked.prompt], [[0, *asked.answer[:-1]]])[0]
        assert_close(np.stack(asked.logits), theirs[-len(asked.logits) :])


def test_residuals_of_several_tenants_in_a_step_equal_hugging_face(
    small_family: SwitchFamily, tmp_path: Path
) -> None:
    store = with_residuals(
        build_round_robin(tmp_path / "store", small_family.paths), mixed, merged=(0, 2)
    )
    models = [
        oracle_of_store(m, store, n)
        for m, n in zip(small_family.models, store.tenants, strict=True)
    ]
    backend = backend_for(store)
    together = [
        Asked(name, row, 5)
        for name, row in zip(store.tenants * 2, prompts(5, [4, 9, 12, 7, 3, 8]), strict=True)
    ]
    for asked in together:
        asked.begin(backend)
    for _ in range(5):
        advance(backend, [(a, a.unread) for a in together])
    for i, asked in enumerate(together):
        assert asked.answer == hf_greedy(models[i % 3], asked.prompt, 5)


@pytest.mark.slow
@pytest.mark.parametrize("cut", rest_slow([[3, 3, 3, 2], [1] * 11, [4, 7], [10, 1]]), ids=str)
def test_reading_in_pieces(switch_family: SwitchFamily, tmp_path: Path, cut: list[int]) -> None:
    """Also of an answer that was given before; another tenant answers meanwhile."""
    store = build_round_robin(tmp_path / "store", switch_family.paths)
    backend = backend_for(store)
    row, (other,) = prompts(0, [8])[0], prompts(1, [5])
    (expected,) = alone(backend, [Asked("ana", row, 6)])
    asked, busy = Asked("ana", row, 6, expected.answer[:3]), Asked("bob", other, 30)
    for one in (asked, busy):
        one.begin(backend)
    advance(backend, [(busy, busy.unread)])
    done = []
    for read in cut:
        advance(backend, [(asked, read), (busy, 0)])
        sequence = backend.sequences._sequences[asked.number or 0]
        done.append(sequence.layers)
        assert (sequence.x is None) == (asked.unread == 0 or not sequence.layers)
    assert done == [4 * min(8, n) // 8 for n in np.cumsum(cut)]
    while not asked.is_done:
        advance(backend, [(asked, 0)])
    assert asked.answer == expected.answer
    for a, b in zip(asked.logits, expected.logits[3:], strict=True):
        assert_close(a, b, CLOSE)
    assert busy.answer == hf_greedy(
        oracle(switch_family.models, 2, store.plan), other, len(busy.answer)
    )


@pytest.mark.slow
def test_an_answer_read_again_drops_nothing(tmp_path: Path) -> None:
    """Capacity counts the tokens of a row that are computed at once; an answer's came one by
    one."""
    family = save_family(tmp_path, [random_switch(3)])
    backend = backend_for(build_round_robin(tmp_path / "store", family.paths), expert_capacity=1)
    (expected,) = alone(backend, [Asked("base", prompts(0, [9])[0], 12)])
    again = Asked("base", expected.prompt, 12, expected.answer[:10])
    again.begin(backend)
    advance(backend, [(again, again.unread)])
    advance(backend, [(again, 0)])
    assert again.answer == expected.answer
    for a, b in zip(again.logits, expected.logits[10:], strict=True):
        assert_close(a, b, CLOSE)


def test_steps_that_make_no_sense(small_family: SwitchFamily, tmp_path: Path) -> None:
    backend = backend_for(build_round_robin(tmp_path / "store", small_family.paths))
    number = backend.begin(Row("ana", (5, 6), 4))
    for part in (Part(number, 3), Part(number, 0, 5), Part(number)):
        with pytest.raises(EngineError, match="does not fit a sequence with 2 unread tokens"):
            backend.step([part])
    backend.step([Part(number, 2)])
    with pytest.raises(EngineError, match="does not fit a sequence with 0 unread tokens"):
        backend.step([Part(number)])


@pytest.mark.slow
def test_a_step_that_fails_can_be_ended(small_family: SwitchFamily, tmp_path: Path) -> None:
    """And sequences that were not in it go on."""
    store = build_round_robin(tmp_path / "store", small_family.paths)
    backend = backend_for(store)
    good, bad = (Asked("ana", p, 5) for p in prompts(0, [5, 9]))
    for asked in (good, bad):
        asked.begin(backend)
    advance(backend, [(good, 5)])

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    for read in (9, 0):
        backend.observe(fail)
        with pytest.raises(RuntimeError, match="no"):
            backend.step([bad.part(read)] if read else [Part(bad.number or 0, 9)])
        backend.observe(None)
        backend.end([bad.number or 0])
        bad.begin(backend)
    while not good.is_done:
        advance(backend, [(good, 0)])
    assert good.answer == alone(backend, [Asked("ana", good.prompt, 5)])[0].answer


# A store that changes.
