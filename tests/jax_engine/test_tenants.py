"""Ready tenants: what a switch compiles and copies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import pytest

from common import SamplingParams, SchedulerOptions, load_engine
from tests.helpers import build_round_robin, prompts
from tests.jax_engine.conftest import SwitchFamily, backend_for
from tests.schedules import Asked, advance, alone


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
