"""Continuous batching of the PyTorch engine: whatever shares a step, each answer is Hugging Face's
for its tenant."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import EngineError, SamplingParams, SchedulerOptions, StoreError, load_engine
from common.build.build import build_store
from common.serving.backend import Part, Row
from common.serving.engine import Engine
from common.store import Store
from tests import helpers
from tests.conftest import Family
from tests.helpers import TOLERANCE, assert_close, hf_greedy, hf_logits, rest_slow
from torch_engine.backend import TorchBackend
from torch_engine.experts.grouped_pool import GroupedPool

WAYS: list[dict[str, Any]] = [
    {},
    {"products": "plain"},
    {"experts": "grouped", "products": "plain", "spare_slots": 2},
    {"products": "plain", "ready_tenants": 2},
]


def backend_of(engine: Engine) -> TorchBackend:
    backend = engine._require_backend()
    assert isinstance(backend, TorchBackend)
    return backend


def new(count: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True)


@pytest.fixture(scope="module")
def missing(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three tenants; positions without a copy."""
    return helpers.build_round_robin(
        tmp_path_factory.mktemp("steps") / "store", family.paths, slots=5
    )


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("seed", rest_slow([0, 1]))
def test_random_arrivals_cancellations_and_preemptions(
    family: Family, missing: Store, options: dict[str, Any], seed: int
) -> None:
    rng = random.Random(seed)
    oracles = [helpers.oracle(family.models, i, missing.plan) for i in range(3)]
    scheduler = SchedulerOptions(max_num_seqs=5, max_num_batched_tokens=16, prefill_chunk=7)
    with load_engine(missing, scheduler=scheduler, **options) as engine:
        pool = backend_of(engine).cache.pool
        kept = pool._empty[:6]  # so little that requests have to be put off
        pool._empty[:] = kept
        # Two that begin with room to grow, but not for all that both come to.
        made = []
        for index in range(2):
            row = helpers.prompts(index, [1])[0]
            made.append((index, row, engine.submit(family.names[index], row, new(60))))
        for _ in range(50):
            engine.step()
        for _ in range(8):
            index, length = rng.randrange(3), rng.choice([1, 3, 9, 17, 30])
            row = helpers.prompts(rng.randrange(4), [length])[0]  # some begin alike
            made.append(
                (index, row, engine.submit(family.names[index], row, new(rng.randrange(1, 20))))
            )
            for _ in range(rng.randrange(4)):
                engine.step()
            if rng.random() < 0.2:
                engine.cancel(rng.choice(made)[2])
        while engine.step():
            pass
        assert sorted([*pool._empty, *pool._idle]) == sorted(kept)
        assert engine.stats()["preemptions"] > 0
    for index, row, request in made:
        expected = hf_greedy(oracles[index], row, request.max_new_tokens)
        assert request.token_ids == expected[: len(request.token_ids)]
        assert request.finish_reason == "abort" or len(request.token_ids) == len(expected)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_logits_do_not_depend_on_how_a_prompt_is_cut(
    family: Family, missing: Store, options: dict[str, Any]
) -> None:
    row, other = helpers.prompts(3, [40, 5])
    model = helpers.oracle(family.models, 1, missing.plan)
    expected = hf_logits(model, [row])[0]
    with load_engine(missing, **options) as engine:
        backend = backend_of(engine)
        beside = backend.begin(Row(family.names[0], tuple(other), 50))
        last = int(backend.step([Part(beside, read=5)]).token_ids[0])
        for cuts in ([40], [1, 39], [16, 16, 8], [3] * 13 + [1]):
            sequence = backend.begin(Row(family.names[1], tuple(row), 4, cache_prefix=False))
            for i, read in enumerate(cuts):
                step = backend.step(
                    [Part(sequence, read, want_logits=True), Part(beside, token_id=last)]
                )
                last = int(step.token_ids[1])
                final = i == len(cuts) - 1
                assert (step.token_ids[0] >= 0) == final and (step.logits[0] is not None) == final
                assert step.logits[1] is None
                assert step.hits[0] + step.misses[0] == read * 2 * 2
            assert step.logits[0] is not None
            assert_close(step.logits[0], expected[-1], what=f"cut in {cuts}")
            backend.end([sequence])


@pytest.mark.parametrize("spare_slots", [1, 3, 6])
def test_expected_misses_are_brought_before_they_are_missed(
    family: Family, missing: Store, spare_slots: int
) -> None:
    """What CUDA does while others compute, on a CPU's tensors: the same answers, and fewer fetches
    in their way."""
    rows = helpers.prompts(8, [6, 4])
    order = [0, 1, 0, 2, 1, 0]
    expected = [
        [hf_greedy(helpers.oracle(family.models, i, missing.plan), row, 3) for row in rows]
        for i in range(3)
    ]
    fetches = []
    for prefetches in (False, True):
        with load_engine(
            missing, experts="grouped", products="plain", spare_slots=spare_slots, ready_tenants=1
        ) as engine:
            backend_of(engine).prefetches = prefetches
            for index in order:
                answers = engine.generate_batch(
                    [(family.names[index], row) for row in rows], new(3)
                )
                assert [list(a.token_ids) for a in answers] == expected[index]
            stats = engine.stats()
        # The last pass of the tenant before used an only slot, which stays.
        assert (stats["prefetches"] > 0) == (prefetches and spare_slots > 1)
        assert (
            stats["fetched_bytes"] == (stats["fetches"] + stats["prefetches"]) * missing.copy_bytes
        )
        fetches.append(stats["fetches"])
    assert fetches[1] < fetches[0] or spare_slots == 1


def test_what_is_expected_is_what_was_missed_most(family: Family, missing: Store) -> None:
    row = helpers.prompts(8, [6])[0]
    with load_engine(missing, experts="grouped", products="plain", spare_slots=4) as engine:
        pool = backend_of(engine).pool
        assert isinstance(pool, GroupedPool)
        pool.expect(0)
        assert pool.counts.prefetches == 0  # nothing is known of it yet
        for index in (0, 1):
            engine.generate(family.names[index], row, new(4))
        uses = pool._uses[0].copy()
        assert uses.sum() == pool._uses.sum() - pool._uses[1].sum() > 0
        assert pool._spare is not None
        held = set(pool._spare.filled)
        pool.expect(0)
        found = set(pool._spare.filled)
        brought = list(found - held)
        assert brought and pool.counts.prefetches == len(brought)
        left = [uses[layer, e] for layer, e in np.argwhere(uses) if (layer, e) not in found]
        assert min(uses[place] for place in brought) >= max(left, default=0)
        # What the last pass used stays; a second hint finds nothing to do.
        pool.expect(0)
        assert pool.counts.prefetches == len(brought)


def test_an_expected_miss_that_cannot_be_read_fails_who_misses_it(
    family: Family, missing: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = helpers.prompts(8, [6])[0]
    with load_engine(missing, experts="grouped", products="plain", spare_slots=4) as engine:
        pool = backend_of(engine).pool
        for index in (0, 1):
            engine.generate(family.names[index], row, new(4))

        def broken(layer: int, key: int) -> dict[str, Any]:
            raise OSError("the disk is gone")

        with monkeypatch.context() as patch:
            patch.setattr(pool, "_missed", broken)
            pool.expect(0)
            assert pool.counts.prefetches > 0
            with pytest.raises(OSError, match="the disk is gone"):
                engine.generate(family.names[0], row, new(4))
        engine.generate(family.names[1], row, new(4))


def test_a_paused_sequence_keeps_its_caches(family: Family, missing: Store) -> None:
    rows = helpers.prompts(5, [11, 6])
    models = [helpers.oracle(family.models, i, missing.plan) for i in range(2)]
    with load_engine(missing) as engine:
        backend = backend_of(engine)
        first, second = (backend.begin(Row(family.names[i], tuple(rows[i]), 30)) for i in range(2))
        got: list[list[int]] = [[], []]
        got[0].append(int(backend.step([Part(first, read=11)]).token_ids[0]))
        got[1].append(int(backend.step([Part(second, read=6)]).token_ids[0]))
        for turn in (0, 1, 1, 1, 0, 0, 1, 0):
            step = backend.step([Part((first, second)[turn], token_id=got[turn][-1])])
            got[turn].append(int(step.token_ids[0]))
    for row, model, tokens in zip(rows, models, got, strict=True):
        assert tokens == hf_greedy(model, row, len(tokens))


def test_what_was_put_off_goes_on_where_it_was(family: Family, missing: Store) -> None:
    row = helpers.prompts(6, [12])[0]
    whole = hf_greedy(helpers.oracle(family.models, 2, missing.plan), row, 9)
    with load_engine(missing) as engine:
        backend = backend_of(engine)
        sequence = backend.begin(Row(family.names[2], tuple(row), 9, answer=tuple(whole[:4])))
        assert backend.step([Part(sequence, read=7)]).token_ids[0] == -1
        assert backend.step([Part(sequence, read=9)]).token_ids[0] == whole[4]
        assert backend.step([Part(sequence, token_id=whole[4])]).token_ids[0] == whole[5]


def test_room_in_the_caches(family: Family, missing: Store) -> None:
    config = family.models[0].config
    one = (
        2
        * 2
        * 16
        * config.num_key_value_heads
        * (config.hidden_size // config.num_attention_heads)
        * 4
    )
    with load_engine(missing, kv_cache_bytes=4 * one + 1) as engine:
        backend = backend_of(engine)
        stats = engine.stats()
        assert (stats["kv_cache_bytes"], stats["kv_cache_used_bytes"]) == (4 * one, 0)
        assert backend.max_length(family.names[0]) == 64
        row = Row(family.names[0], tuple(helpers.prompts(0, [60])[0]), 60)
        a, b = backend.begin(row), backend.begin(row)
        assert backend.fits([Part(a, read=60)])
        assert not backend.fits([Part(a, read=33), Part(b, read=17)])
        assert backend.fits([Part(a, read=32), Part(b, read=32)])
        assert not backend.fits([Part(a, read=32), Part(b, read=32)], ahead=1)
        backend.step([Part(a, read=33)])
        assert engine.stats()["kv_cache_used_bytes"] == 3 * one
        assert backend.fits([Part(b, read=16)]) and not backend.fits([Part(b, read=17)])
        backend.end([a, b, 12345])
        assert engine.stats()["kv_cache_used_bytes"] == 0
        with pytest.raises(
            ValueError, match=r"has 70 tokens, there is room for 64 .*kv_cache_bytes"
        ):
            engine.generate(family.names[0], [1] * 70)
    with pytest.raises(
        EngineError, match=r"kv_cache_bytes is 1.00 KiB, a block of 16 tokens takes"
    ):
        load_engine(missing, kv_cache_bytes=1024)


def build_default(path: Path, tenants: dict[str, Path]) -> Store:
    """The default policy: merged copies, residuals."""
    return build_store(path, tenants, extra=0.5)


@pytest.mark.parametrize("options", [{}, {"experts": "grouped", "products": "plain"}], ids=str)
@pytest.mark.parametrize("build", [helpers.build_round_robin, build_default])
def test_update_keeps_what_did_not_change(
    family: Family, tmp_path: Path, options: dict[str, Any], build: Any
) -> None:
    """Running sequences go on through an update, and afterwards everything equals a fresh load."""
    names = family.names
    two = build(tmp_path / "two", {n: family.paths[n] for n in names[:2]})
    three = build(tmp_path / "three", {n: family.paths[n] for n in reversed(names)})
    row = helpers.prompts(1, [9])[0]
    with load_engine(three) as fresh:
        expected = {n: fresh.logits(n, [row]) for n in names}
    with load_engine(two, **options) as engine:
        before = engine.logits(names[0], [row])
        request = engine.submit(names[0], row, new(12))
        engine.step()
        engine.update(three)
        assert engine.tenants == three.tenants
        for name in names:
            assert_close(engine.logits(name, [row]), expected[name], TOLERANCE)
        while engine.step():
            pass
        assert len(request.token_ids) == 12
        engine.update(two)
        assert_close(engine.logits(names[0], [row]), before, TOLERANCE)
        assert names[2] not in engine.tenants


def test_an_update_reads_only_what_is_new(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = dict(family.paths)
    store = helpers.build_round_robin(tmp_path / "store", paths, slots=6)
    more = helpers.build_round_robin(tmp_path / "more", paths)
    with load_engine(store) as engine:
        pool = backend_of(engine).pool
        old = {id(e) for layer in pool._resident for e in layer}
        new = more.plan.num_slots - store.plan.num_slots
        engine.update(more)
        now = [e for layer in pool._resident for e in layer]
        same = {store.slot_content(i) for i in range(store.plan.num_slots)} & {
            more.slot_content(i) for i in range(more.plan.num_slots)
        }
        assert sum(id(e) in old for e in now) == len(same) > 0 and new > 0


@pytest.mark.parametrize("options", [{}, {"experts": "grouped", "products": "plain"}], ids=str)
def test_a_failed_update_changes_nothing(
    family: Family, tmp_path: Path, options: dict[str, Any]
) -> None:
    store = helpers.build_round_robin(
        tmp_path / "store", {n: family.paths[n] for n in family.names[:2]}
    )
    broken = helpers.build_round_robin(tmp_path / "broken", dict(family.paths))
    row = helpers.prompts(1, [9])[0]
    with load_engine(store, **options) as engine:
        before = {n: engine.logits(n, [row]) for n in engine.tenants}
        only = {r.path for n in broken.tenants for r in broken.copy_refs(n, 1, 3).values()}
        for path in only:
            path.unlink()
        with pytest.raises(StoreError, match="the file is missing"):
            engine.update(broken)
        assert engine.tenants == store.tenants
        for name, logits in before.items():
            np.testing.assert_array_equal(engine.logits(name, [row]), logits)
        with pytest.raises(EngineError, match="other shapes"):
            other = helpers.save(helpers.random_mixtral(0, num_local_experts=2), tmp_path / "other")
            engine.update(helpers.build_round_robin(tmp_path / "others", {"x": other}))


def test_a_tenant_with_requests_cannot_leave(family: Family, tmp_path: Path) -> None:
    three = helpers.build_round_robin(tmp_path / "three", dict(family.paths))
    two = helpers.build_round_robin(
        tmp_path / "two", {n: family.paths[n] for n in family.names[:2]}
    )
    with load_engine(three) as engine:
        engine.submit(family.names[2], [1, 2], new(3))
        with pytest.raises(EngineError, match="has requests; retire it"):
            engine.update(two)
