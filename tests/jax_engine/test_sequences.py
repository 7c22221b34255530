"""Sequences through the backend: any schedule gives what each gives alone, and what Hugging Face's
model gives."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from common import EngineError, SamplingParams, SchedulerOptions, Store, load_engine
from common.serving.backend import Part, Row
from jax_engine import load_backend
from jax_engine.backend import JaxBackend
from jax_engine.tenants import weights
from tests import helpers
from tests.helpers import assert_close, build_round_robin, prompts, rest_slow
from tests.jax_engine.conftest import SwitchFamily, save_family
from tests.jax_engine.schedules import Asked, advance, alone, requests_of, run
from tests.jax_engine.test_residuals import mixed
from tests.switch_models import (
    hf_greedy,
    hf_logits,
    oracle,
    oracle_of_store,
    random_switch,
    tuned,
    with_residuals,
)

CLOSE = 1e-4


@pytest.fixture(scope="module")
def small_family(tmp_path_factory: pytest.TempPathFactory) -> SwitchFamily:
    """base, ana and bob: three encoder layers, one of them sparse, and two decoder layers; 4
    experts, float32."""
    base = random_switch(0, num_layers=3, num_sparse_encoder_layers=1)
    return save_family(tmp_path_factory.mktemp("small"), [base, tuned(base, 1), tuned(base, 2)])


def backend_for(store: Store, **options: Any) -> JaxBackend:
    """A backend, or a skip where our own kernels cannot be had."""
    if options.get("products") == "native":
        from jax_engine import native

        if native.load() is None:
            pytest.skip("no kernels of our own here: see native.load for what they need")
    backend = load_backend(store, **options)
    assert isinstance(backend, JaxBackend)
    return backend


def check_equal(found: Sequence[Asked], expected: Sequence[Asked]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.answer == theirs.answer
        for a, b in zip(ours.logits[-len(theirs.logits) :], theirs.logits, strict=True):
            assert_close(a, b, CLOSE)


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
    put_off = run(backend, found, seed=1, most_tenants=options.get("ready_tenants"))
    check_equal(found, expected)
    after = backend.stats()
    if not put_off:
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


@pytest.mark.slow
@pytest.mark.parametrize("slots", rest_slow([5, None]))
def test_a_pause_leaves_caches_as_they_are(
    small_family: SwitchFamily, tmp_path: Path, slots: Any
) -> None:
    """Bit for bit, in steps of its own tenant, in whole calls and layer by layer, and of others."""
    store = build_round_robin(tmp_path / "store", small_family.paths, slots=slots)
    backend = backend_for(store)
    waits, goes, other = (
        Asked(n, p, 40) for n, p in zip(("ana", "ana", "bob"), prompts(2, [9, 4, 12]), strict=True)
    )
    for one in (waits, goes, other):
        one.begin(backend)
    advance(backend, [(a, a.unread) for a in (waits, goes, other)])
    advance(backend, [(waits, 0), (goes, 0)])

    def held() -> list[np.ndarray]:
        held = backend.sequences.caches.caches["ana"]
        row = held.row_of(waits.number or 0)
        cache = [np.array(a[row, :, : held.lengths[row]]) for pair in held.cache for a in pair]
        return cache + [np.array(a[row, :, :9]) for pair in held.encoded for a in pair]

    before = held()
    for _ in range(3):
        advance(backend, [(goes, 0)])
        advance(backend, [(goes, 0), (other, 0)])
    assert all(np.array_equal(a, b) for a, b in zip(before, held(), strict=True))
    late = Asked("ana", prompts(3, [30])[0], 3)
    late.begin(backend)
    advance(backend, [(late, late.unread), (goes, 0)])  # the caches move to larger arrays
    assert all(np.array_equal(a, b) for a, b in zip(before, held(), strict=True))
    advance(backend, [(waits, 0)])
    assert waits.answer == alone(backend, [Asked("ana", waits.prompt, 3)])[0].answer


@pytest.mark.slow
def test_memory_is_counted_and_freed(small_family: SwitchFamily, tmp_path: Path) -> None:
    backend = backend_for(build_round_robin(tmp_path / "store", small_family.paths))
    requests = [
        Asked(n, p, 40)
        for n, p in zip(("base", "ana", "ana", "ana"), prompts(0, [5, 20, 40, 3]), strict=True)
    ]
    others = {id(a): a for a in jax.live_arrays()}  # what this process's other tests have left

    def used() -> int:
        held = backend.sequences.caches.caches.values()
        real = sum(
            a.nbytes for cache in held for pair in [*cache.cache, *cache.encoded] for a in pair
        )
        real += sum(s.x.nbytes for s in backend.sequences._sequences.values() if s.x is not None)
        assert backend.stats()["kv_cache_used_bytes"] == real
        return real

    for asked in requests:
        asked.begin(backend)
    assert used() == 0
    advance(backend, [(a, a.unread - 1) for a in requests])
    assert 0 < used() == sum(n * 32 * 4 for n in (16, 32, 48, 16))
    advance(backend, [(a, a.unread) for a in requests])
    # Two decoder layers, keys and values, 4 heads of 8, float32: 512 bytes a token.
    assert used() == 512 * (1 * (32 + 16) + 4 * (32 + 48))
    backend.end([requests[0].number or 0])
    assert used() == 512 * 4 * (32 + 48)
    backend.end([requests[i].number or 0 for i in (2, 3)])
    for _ in range(30):
        advance(backend, [(requests[1], 0)])
    assert used() == 512 * (32 + 32)  # after a while it moves to smaller arrays
    advance(backend, [(requests[1], 0)])
    advance(backend, [(requests[1], 0)])
    assert used() == 512 * (64 + 32)
    assert requests[1].answer == alone(backend, [Asked("ana", requests[1].prompt, 33)])[0].answer
    backend.end([requests[1].number or 0, 999])
    assert used() == 0
    gc.collect()
    assert not [a for a in jax.live_arrays() if a.ndim == 4 and id(a) not in others]


@pytest.mark.slow
def test_what_fits_and_what_does_not(small_family: SwitchFamily, tmp_path: Path) -> None:
    store = build_round_robin(tmp_path / "store", small_family.paths)
    # Memory for two rows, 32 tokens and prompts up to 16, or for one row of a longer one.
    backend = backend_for(store, kv_cache_bytes=512 * 2 * (32 + 16))
    assert backend.stats()["kv_cache_bytes"] == 512 * 96
    assert backend.max_length("ana") == 32  # 512 * (32 + 32) + the encoder's states
    first, second, third, long = (Asked("ana", p, 100) for p in prompts(0, [5, 9, 7, 17]))
    for asked in (first, second, third, long):
        asked.begin(backend)

    def parts(*some: tuple[Asked, int]) -> list[Part]:
        return [a.part(read) for a, read in some]

    assert backend.fits(parts((first, 5), (second, 9)))
    assert not backend.fits(parts((first, 5), (second, 9), (third, 7)))
    assert backend.fits(parts((long, 17))) and not backend.fits(parts((long, 17), (first, 5)))
    assert backend.fits(parts((long, 17)), ahead=31)
    assert not backend.fits(parts((first, 5)), ahead=64)
    assert backend.fits(parts((first, 5)), ahead=31) and backend.fits(parts((first, 5)), ahead=32)
    advance(backend, [(first, 5), (second, 9)])
    assert not backend.fits(parts((third, 7)))  # the others keep theirs
    assert not backend.fits(parts((third, 1)))  # nor do the encoder's states have room
    assert backend.fits(parts((first, 0)), ahead=30) and not backend.fits(
        parts((first, 0)), ahead=31
    )
    while len(first.answer) < 32:
        advance(backend, [(first, 0), (second, 0)])
    assert not backend.fits(parts((first, 0)))
    backend.end([second.number or 0])
    assert backend.fits(parts((first, 0)))
    advance(backend, [(first, 0)])  # memory is short, so the cache shrinks at once
    assert (
        backend.stats()["kv_cache_used_bytes"]
        == 512 * (64 + 16)
        <= backend.stats()["kv_cache_bytes"]
    )
    assert first.answer == alone(backend_for(store), [Asked("ana", first.prompt, 33)])[0].answer


def test_the_longest_answer_counts_for_room(small_family: SwitchFamily, tmp_path: Path) -> None:
    """ahead looks no farther than max_new_tokens."""
    store = build_round_robin(tmp_path / "store", small_family.paths)
    backend = backend_for(store, kv_cache_bytes=512 * (32 + 16) + 4 * 32 * 16)
    short, long = (backend.begin(Row("ana", (5, 6), n)) for n in (32, 33))
    assert backend.fits([Part(short, 2)], ahead=1000) and not backend.fits(
        [Part(long, 2)], ahead=1000
    )


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4GiB"])
def test_bad_room_is_refused(small_family: SwitchFamily, tmp_path: Path, value: Any) -> None:
    store = build_round_robin(tmp_path / "store", small_family.paths)
    with pytest.raises(EngineError, match=r"kv_cache_bytes is .*; give a whole number from 1"):
        load_backend(store, kv_cache_bytes=value)
    with pytest.raises(
        EngineError, match="kv_cache_bytes is 100; one short sequence of tenant 'base' takes 26624"
    ):
        load_backend(store, kv_cache_bytes=100)


def test_room_by_default(small_family: SwitchFamily, tmp_path: Path) -> None:
    backend = backend_for(build_round_robin(tmp_path / "store", small_family.paths))
    assert 0 < backend.stats()["kv_cache_bytes"] <= 4 << 30
    assert backend.max_length("ana") == backend.loaded.shape("ana").max_positions


@pytest.mark.slow
def test_other_tenants_compile_nothing(small_family: SwitchFamily, tmp_path: Path) -> None:
    """Sequences come, wait and end, of one tenant and of several, within the same buckets."""
    backend = backend_for(build_round_robin(tmp_path / "store", small_family.paths))
    names = backend.loaded.store.tenants

    def visit(order: Sequence[str]) -> None:
        one, two, three = (
            Asked(n, p, 9) for n, p in zip(order, prompts(0, [5, 9, 12]), strict=True)
        )
        for asked in (one, two, three):
            asked.begin(backend)
        advance(backend, [(one, one.unread)])
        advance(backend, [(one, 0)])
        advance(backend, [(one, 0), (two, two.unread)])
        advance(backend, [(one, 0), (two, 0)])
        advance(backend, [(two, 0), (three, 6)])
        advance(backend, [(one, 0), (two, 0), (three, 6)])
        advance(backend, [(one, 0), (two, 0), (three, 0)])
        backend.end([one.number or 0])
        advance(backend, [(two, 0), (three, 0)])
        backend.end([two.number or 0, three.number or 0])

    orders = [
        ("base", "ana", "bob"),
        ("ana", "ana", "bob"),
        ("base", "base", "base"),
        ("ana", "bob", "bob"),
    ]
    for order in orders:
        visit(order)
    before = backend.stats()["compilations"]
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event)
    )
    for order in orders:
        visit([names[(names.index(n) + 1) % 3] for n in order])
        visit([names[(names.index(n) + 2) % 3] for n in order])
    assert backend.stats()["compilations"] == before
    assert not [event for event in compiled if "backend_compile" in event]


@pytest.mark.slow
def test_usual_requests_after_warming_up_compile_nothing(
    small_family: SwitchFamily, tmp_path: Path
) -> None:
    store = build_round_robin(tmp_path / "store", small_family.paths)
    rows = prompts(4, [17, 20, 24, 24])
    new = SamplingParams(max_new_tokens=8, ignore_eos=True)
    with load_engine(
        store, backend="jax", device="cpu", scheduler=SchedulerOptions(max_num_seqs=4)
    ) as engine:
        assert engine.stats()["compilations"] == 0
        engine.warm_up()
        before = engine.stats()["compilations"]
        assert before > 0 and engine.stats()["kv_cache_used_bytes"] == 0
        for name in store.tenants:
            engine.generate(name, rows[0], new)
        engine.generate_batch([("ana", row) for row in rows[:2]], new)
        ana, bob = engine.submit("ana", rows[1], new), engine.submit("bob", rows[2], new)
        while engine.step():
            pass
        assert len(ana.token_ids) == len(bob.token_ids) == 8
        assert engine.stats()["compilations"] == before
        assert engine.stats()["tenants"]["base"]["generation_tokens"] == 8


@pytest.mark.slow
def test_reconfiguration_is_of_tenants_that_were_not_in_use(
    small_family: SwitchFamily, tmp_path: Path
) -> None:
    backend = backend_for(
        build_round_robin(tmp_path / "store", small_family.paths), ready_tenants=2
    )
    assert backend.max_ready_tenants == 2
    base, ana, bob = (
        Asked(n, p, 20) for n, p in zip(("base", "ana", "bob"), prompts(0, [5, 9, 12]), strict=True)
    )
    for asked in (base, ana, bob):
        asked.begin(backend)
    assert set(advance(backend, [(base, 5)])) == {"base"}
    assert set(advance(backend, [(base, 0), (ana, 9)])) == {"ana"}
    assert set(advance(backend, [(base, 0), (ana, 0)])) == set()
    assert backend.stats()["reconfigured_bytes"] == 0
    took = advance(backend, [(bob, 12), (ana, 0)])
    assert set(took) == {"bob"} and took["bob"] > 0
    assert backend.stats()["reconfigured_bytes"] == backend.stats()["non_expert_bytes"] // 2
    assert backend.stats()["ready_tenants"] == ["bob", "ana"]
    assert set(advance(backend, [(base, 0), (ana, 0)])) == {
        "base"
    }  # its caches waited without its weights
    assert backend.stats()["reconfigurations"] == 4
    assert base.answer == alone(backend, [Asked("base", base.prompt, len(base.answer))])[0].answer


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
    return [ref.path.stem for n in numbers for ref in store.slot_refs(n).values()]


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
def test_nothing_is_read_twice(
    small_family: SwitchFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = build_round_robin(tmp_path / "store", small_family.paths)
    backend = backend_for(store)

    monkeypatch.setattr("jax_engine.experts.pool.fill_pool", without_reading(weights.fill_pool))
    monkeypatch.setattr(
        "jax_engine.tenants.ready.fill_tenant", without_reading(weights.fill_tenant)
    )
    backend.update(Store.open(store.path))


def without_reading(fill: Any) -> Any:
    """A function that fills a state, refusing to read."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("an object was read")

    def run(state: Any, read: Any, *rest: Any) -> Any:
        return fill(state, refuse, *rest)

    return run


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
