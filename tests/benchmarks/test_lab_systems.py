"""Each way to serve a store answers, in its own order and within its own memory, and leaves nothing
behind."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lab.half_memory import SPARE_SLOTS, half_budget, within
from benchmarks.lab.partition import Partition, divide_cores
from benchmarks.lab.systems import Paper, Single, open_system, redirected
from benchmarks.lab.time_sharing import TimeSharing
from benchmarks.material import random_models
from common import EngineError, Store, load_engine
from scripts.load.engine_system import Setup
from scripts.load.run import Piece, Record, run_trace
from scripts.load.traffic import Call, Load, Trace, make_trace
from scripts.store_views import alone_store
from tests import helpers
from tests.conftest import Family


@pytest.fixture(scope="module")
def store(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return helpers.build_round_robin(tmp_path_factory.mktemp("bench") / "store", family.paths)


@pytest.fixture
def setup(store: Store) -> Setup:
    return Setup(store.path, 4, options={"device": "cpu"})


def trace(store: Store, rate: float = 40.0, count: int = 9) -> Trace:
    sizes = dict.fromkeys(store.tenants, 96)
    return make_trace(
        sizes, Load(input_len=6, output_len=4, range_ratio=0.5), rate, num_requests=count
    )


@pytest.mark.parametrize("name", ["single", "moetel", "paper", "time_sharing", "partition"])
def test_every_system_answers_everything(name: str, store: Store, setup: Setup) -> None:
    asked = trace(store)

    async def run() -> tuple[list[Record], dict[str, Any]]:
        system = await open_system(name, setup)
        try:
            return await run_trace(system, asked, 60.0), await system.about()
        finally:
            await system.close()

    records, about = asyncio.run(run())
    assert [r.error for r in records] == [None] * 9
    assert [r.num_tokens for r in records] == [r.call.max_new_tokens for r in records]
    assert about["load_s"] > 0 and about["resident_bytes"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moetel", "partition"])
def test_the_other_engine(name: str, tmp_path: Path) -> None:
    pytest.importorskip("jax")
    store = random_models.random_store(tmp_path, "tiny-switch", 2, "float32")
    asked = make_trace(
        dict.fromkeys(store.tenants, 96), Load(input_len=6, output_len=4), 5.0, num_requests=4
    )

    async def run() -> tuple[list[Record], dict[str, Any]]:
        system = await open_system(name, Setup(store.path, 2, options={"device": "cpu"}))
        try:
            return await run_trace(system, asked, 120.0), await system.about()
        finally:
            await system.close()

    records, about = asyncio.run(run())
    assert [(r.error, r.num_tokens) for r in records] == [(None, 4)] * 4
    assert about["compilations"] > 0


def test_views_of_a_store(store: Store, family: Family) -> None:
    one = alone_store(store, ["ana"])
    assert one.tenants == ("ana",) and one.plan.num_misses == 0
    with load_engine(one, device="cpu", products="plain") as engine:
        found = engine.logits("ana", [[5, 6, 7]])
        assert set(engine.stats()["ready_tenants"]) == {"ana"}
    helpers.assert_close(found, helpers.hf_logits(family.models[1], [[5, 6, 7]]))
    whole = store.experts.num_positions * store.copy_bytes + store.non_expert_bytes("ana")
    assert half_budget(store) == whole // 2
    fixed = SPARE_SLOTS * store.copy_bytes + store.non_expert_bytes("bob")
    half = within(store, ["base", "bob"], fixed + 4 * store.copy_bytes + 100)
    assert (
        half.plan.num_slots == 4
        and half.plan.num_misses == 2 * 4
        and half.tenants == ("base", "bob")
    )
    # The most similar positions of the two are those that stay.
    score = store.distances.matrix[1]
    kept = [score[c.layer, c.expert] for c in half.plan.copies]
    assert max(kept) <= sorted(score.flat)[len(kept) - 1]
    assert within(store, ["base"], 10**9).plan.num_misses == 0
    with pytest.raises(EngineError, match="leave the system 'partition' out"):
        within(store, ["base"], 1000)


def test_single_gives_one_tenant_all_requests(store: Store, setup: Setup) -> None:
    async def run() -> dict[str, Any]:
        system = await open_system("single", setup)
        try:
            await run_trace(system, trace(store), 60.0)
            assert isinstance(system, Single)
            return (await system.inner.engine.stats())["tenants"]
        finally:
            await system.close()

    tenants = asyncio.run(run())
    assert list(tenants) == ["base"] and tenants["base"]["requests"]["length"] == 9


def test_paper_takes_one_request_after_another(store: Store, setup: Setup) -> None:
    """In the order of arrival, none begun before the one before it is done, with a replacement at
    each change."""
    asked = trace(store, rate=10_000.0)
    order: list[int] = []
    events: list[str] = []

    async def run() -> int:
        system = await open_system("paper", setup)
        assert isinstance(system, Paper)
        inner = system.inner.generate

        async def watched(call: Call) -> AsyncGenerator[Piece]:
            order.append(call.number)
            events.append("begin")
            async with aclosing(inner(call)) as pieces:
                async for piece in pieces:
                    yield piece
            events.append("end")

        system.inner.generate = watched  # type: ignore[method-assign]
        try:
            before = (await system.about())["reconfigurations"]
            await run_trace(system, asked, 60.0)
            return int((await system.about())["reconfigurations"] - before)
        finally:
            await system.close()

    replaced = asyncio.run(run())
    assert order == list(range(9)) and events == ["begin", "end"] * 9
    tenants = [c.tenant for c in asked.calls]
    assert replaced == 1 + sum(a != b for a, b in itertools.pairwise(tenants))


def test_time_sharing_answers_all_that_waits_for_a_tenant(store: Store, setup: Setup) -> None:
    """The first is alone when it comes; then all b's together, the c's that fail, all a's: one
    model at a time."""
    loads: list[str] = []
    alive: set[str] = set()

    class Watched:
        load_s = 0.5

        def __init__(self, tenant: str):
            assert not alive, "two models at once"
            alive.add(tenant)
            loads.append(tenant)
            self.tenant = tenant

        async def generate(self, call: Call) -> AsyncGenerator[Piece]:
            assert call.tenant == self.tenant
            await asyncio.sleep(0.01)
            yield Piece(1)

        async def about(self) -> dict[str, Any]:
            return {"resident_bytes": 1}

        async def close(self) -> None:
            alive.remove(self.tenant)

    async def run() -> tuple[list[Record], dict[str, Any]]:
        async def load(tenant: str) -> Any:
            if tenant == "c":
                raise EngineError("no such model")
            return Watched(tenant)

        system = TimeSharing(load)
        calls = tuple(Call(n, t, 0.0, (1,), 1) for n, t in enumerate("abcabbac"))
        records = await run_trace(system, Trace(calls, 0.0), 10.0)
        late = await run_trace(system, Trace((Call(0, "b", 0.0, (1,), 1),), 0.0), 10.0)
        about = await system.about()
        await system.close()
        return records + late, about

    records, about = asyncio.run(run())
    assert loads == ["a", "b", "a", "b"] and not alive
    assert about["loads"] == 4 and about["load_s"] == 0.5
    for r in records:
        assert (r.error is None) == (r.call.tenant != "c")
        assert r.call.tenant != "c" or "no such model" in str(r.error)


@pytest.mark.slow
def test_partition_ends_its_processes(store: Store, setup: Setup) -> None:
    async def run() -> None:
        system = await Partition.start(store, setup)
        processes = [p.process for p in system.processes]
        assert (
            all(p.is_alive() for p in processes)
            and len({p.pid for p in processes} | {os.getpid()}) == 3
        )
        calls = [Call(n, t, 0.0, (5, 6, 7), 2000) for n, t in enumerate(store.tenants)]
        # Closing an answer early cancels it there; the process goes on with others.
        async with aclosing(system.generate(Call(9, "base", 0.0, (5, 6, 7), 100))) as pieces:
            async for _ in pieces:
                break
        (answered,) = await run_trace(system, Trace((Call(0, "bob", 0.0, (5, 6), 3),), 0.0), 30.0)
        assert answered.error is None and answered.num_tokens == 3
        # The second process serves one tenant of three, and nothing was asked of it.
        first, second = (await system.about())["partitions"]
        assert first["misses"] > 0 and second["misses"] == 0
        processes[1].kill()  # a partition that dies takes its own requests with it, no others'
        processes[1].join()
        records = await run_trace(system, Trace((calls[1],), 0.0), 10.0)
        assert "the partition's process ended" in str(records[0].error)
        (answered,) = await run_trace(system, Trace((Call(0, "bob", 0.0, (5, 6), 3),), 0.0), 30.0)
        assert answered.error is None
        await system.close()
        assert processes[0].exitcode == 0 and not any(p.is_alive() for p in processes)

    asyncio.run(run())


@pytest.mark.slow
def test_partition_that_cannot_load_leaves_no_process(store: Store, setup: Setup) -> None:
    async def run(options: dict[str, Any]) -> None:
        await Partition.start(store, Setup(store.path, 4, options=options))

    with pytest.raises(EngineError, match="TorchOptions has no option 'nonsense'"):
        asyncio.run(run({"nonsense": 1}))
    with pytest.raises(EngineError, match="divides tenants among 2 processes"):
        asyncio.run(Partition.start(alone_store(store, ["ana"]), setup))


def test_cores_are_divided() -> None:
    cores = sorted(os.sched_getaffinity(0))
    first, second = divide_cores(2)
    if len(cores) >= 2:
        assert not set(first) & set(second) and len(first) == len(second) == len(cores) // 2
    assert divide_cores(10**6)[0] == tuple(cores)


def test_unknown_system(setup: Setup) -> None:
    with pytest.raises(EngineError, match="no system 'x'; there is: single"):
        asyncio.run(open_system("x", setup))


def test_requests_can_be_sent_to_another_tenant() -> None:
    call = Call(4, "a", 1.5, (3, 60, 95), 7)
    assert redirected(call, "c", 50) == Call(4, "c", 1.5, (3, 10, 45), 7)
