"""Each way to serve a store answers, in its own order and within its own memory, and leaves nothing
behind."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.material import random_models
from common import EngineError, Store, load_engine
from scripts.load.http_system import HttpSystem
from scripts.load.load_test import Piece, Record, run_trace
from scripts.load.qos_systems import (
    SPARE_SLOTS,
    EngineSystem,
    Paper,
    Partition,
    Setup,
    TimeSharing,
    alone,
    divide_cores,
    half_budget,
    open_system,
    within,
)
from scripts.load.traffic import Call, Load, Trace, make_trace
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
    one = alone(store, "ana")
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
            assert isinstance(system, EngineSystem)
            return (await system._engine.stats())["tenants"]
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
        inner = system._inner.generate

        async def watched(call: Call) -> AsyncGenerator[Piece]:
            order.append(call.number)
            events.append("begin")
            async with aclosing(inner(call)) as pieces:
                async for piece in pieces:
                    yield piece
            events.append("end")

        system._inner.generate = watched  # type: ignore[method-assign]
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

    with pytest.raises(EngineError, match="torch engine has no option 'nonsense'"):
        asyncio.run(run({"nonsense": 1}))
    with pytest.raises(EngineError, match="divides tenants among 2 processes"):
        asyncio.run(Partition.start(alone(store, "ana"), setup))


def test_cores_are_divided() -> None:
    cores = sorted(os.sched_getaffinity(0))
    first, second = divide_cores(2)
    if len(cores) >= 2:
        assert not set(first) & set(second) and len(first) == len(second) == len(cores) // 2
    assert divide_cores(10**6)[0] == tuple(cores)


def test_unknown_system(setup: Setup) -> None:
    with pytest.raises(EngineError, match="no system 'x'; there is: single"):
        asyncio.run(open_system("x", setup))


# A server that streams.


class Server:
    """As much of OpenAI's completions as the client reads."""

    def __init__(self, chunked: bool = True):
        self.chunked = chunked
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        self.heads.append(head)
        self.bodies.append(body)
        if body["model"] == "nobody":
            text = b'{"error": {"message": "no model nobody"}}'
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: %d\r\n\r\n" % len(text) + text)
        else:
            kind = b"transfer-encoding: chunked\r\n" if self.chunked else b""
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + kind + b"\r\n")
            # Two chunks with text, of which the second has two tokens; cut at odd places on the
            # way.
            events = ['{"choices":[{"text":"a"}]}', '{"choices":[{"text":"bc"}]}']
            if body["model"] == "broken":
                events.append('{"error":{"message":"it broke"}}')
            usage = '{"choices":[],"usage":{"completion_tokens":3},"metrics":{"reconfiguration_ms":250}}'  # noqa: E501
            end = [] if body["model"] == "cut" else [usage, "[DONE]"]
            stream = "".join(f"data: {e}\n\n" for e in [*events, *end]).encode()
            for i in range(0, len(stream), 7):
                part = stream[i : i + 7]
                writer.write(b"%x\r\n%s\r\n" % (len(part), part) if self.chunked else part)
                await writer.drain()
            if self.chunked:
                writer.write(b"0\r\n\r\n")
        writer.close()


@pytest.mark.parametrize("chunked", [True, False])
def test_a_server_is_tested_over_http(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> tuple[Server, list[Record]]:
        async with Server(chunked) as server:
            system = HttpSystem(server.url + "/v1/", "secret")
            calls = tuple(
                Call(n, t, 0.01 * n, (3, 4), 3)
                for n, t in enumerate(["fr", "nobody", "broken", "cut"])
            )
            records = await run_trace(system, Trace(calls, 0.05), 10.0)
            await system.close()
            return server, records

    server, records = asyncio.run(run())
    assert server.heads[0].startswith("POST /v1/completions HTTP/1.1\r\n")
    assert "Authorization: Bearer secret\r\n" in server.heads[0]
    body = server.bodies[0]
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("fr", [3, 4], 3)
    assert (
        body["stream"] and body["ignore_eos"] and body["stream_options"] == {"include_usage": True}
    )
    good, unknown, broken, cut = records
    assert good.error is None and good.num_tokens == 3 and len(good.pieces) == 2
    assert good.reconfiguration_s == 0.25
    assert "the server answers 404: no model nobody" in str(unknown.error)
    assert "it broke" in str(broken.error)
    assert "ends before [DONE]" in str(cut.error)


def test_urls_that_lead_nowhere() -> None:
    with pytest.raises(EngineError, match="give one like http://"):
        HttpSystem("127.0.0.1:8000")
    calls = (Call(0, "a", 0.0, (3,), 1),)
    (record,) = asyncio.run(run_trace(HttpSystem("http://127.0.0.1:9"), Trace(calls, 0.0), 10.0))
    assert "does the server run?" in str(record.error)


# Random stores.


def test_random_stores_are_made_once(tmp_path: Path) -> None:
    store = random_models.random_store(tmp_path, "tiny-mixtral", 2, "bfloat16")
    assert store.tenants == ("tenant0", "tenant1") and store.dtype == "bfloat16"
    assert store.plan.num_slots == store.experts.num_positions
    assert store.distances.matrix.min() > 0  # no expert is shared by chance
    (kept,) = tmp_path.iterdir()  # the checkpoints are gone
    before = kept.stat().st_mtime_ns
    assert random_models.random_store(tmp_path, "tiny-mixtral", 2, "bfloat16").path == store.path
    assert kept.stat().st_mtime_ns == before
    other = random_models.random_store(tmp_path, "tiny-mixtral", 2, "float32")
    assert other.path != store.path
    with load_engine(other, device="cpu", products="plain") as engine:
        picked: set[int] = set()

        def look(tenant: str, layer: int, x: Any, ids: Any, gates: Any) -> None:
            picked.update(ids.reshape(-1).tolist())

        engine.observe(look)
        engine.logits("tenant1", [list(range(3, 60))])
    assert picked == {0, 1, 2, 3}
