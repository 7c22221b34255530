"""`moetel bench` from arguments to files, and what it concludes."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from common import EngineError
from scripts import cli
from scripts.commands import bench
from scripts.load import qos
from scripts.load.load_test import UNFINISHED, Piece, Record, report
from scripts.load.qos import Cell, Comparison, Experiment, compare, judge
from scripts.load.report import markdown, remarks, row
from scripts.load.traffic import Call, Flood, Trace, TrafficError
from tests.scripts.test_bench_systems import Server

FAST = [
    "--device=cpu",
    "--max-num-seqs=4",
    "--input-len=6",
    "--output-len=4",
    "--percentiles=50,99",
]


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(given)


@pytest.mark.slow
def test_all_systems_in_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    given = [
        "--random=tiny-mixtral",
        "--num-tenants=2",
        f"--work={tmp_path / 'work'}",
        f"--out={tmp_path / 'out'}",
    ]
    load = [
        "--duration=0.5",
        "--load",
        "0.2",
        "--pairs=2",
        "--goodput",
        "ttft:1000",
        "e2el:5000",
        "--flood=3",
        "--drain=30",
    ]
    assert cli.main(["bench", *given, *FAST, *load]) == 0
    out = capsys.readouterr().out
    for line in (
        "saturation, requests/s (closed loop): single",
        "mean E2EL, moetel / single at",
        "(70% load of one model)",
        "mean E2EL, moetel / partition at",
        "saturation rate, moetel / paper:",
        "share of TTFT that reconfiguration takes",
        "p95 E2EL of the other tenants, flooded / not, 3 times the rate of tenant1",
    ):
        assert line in out
    value = json.loads((tmp_path / "out" / "qos.json").read_text())
    assert set(value["capacity"]) == {"single", "moetel", "paper", "partition", "time_sharing"}
    assert all(rate > 0 for rate in value["capacity"].values())
    cells = value["results"]
    assert {c["system"] for c in cells if c["judged"]} == set(value["capacity"])
    flooded = [c for c in cells if c["flood"]]
    assert [c["system"] for c in flooded] == ["moetel"] and flooded[0]["flood"][
        "tenant"
    ] == "tenant1"
    keys = [
        "request_throughput",
        "output_throughput",
        "total_token_throughput",
        "request_goodput",
        "completed",
    ]
    keys += ["failed", "max_concurrent_requests", "jain_index", "worst_tenant", "saturated"]
    keys += [
        f"{s}_{m}_ms"
        for s in ("mean", "median", "std", "p50", "p95", "p99")
        for m in ("ttft", "tpot", "itl", "e2el")
    ]
    for cell in cells:
        assert not set(keys) - set(cell) and cell["completed"] + cell["failed"] > 0
        assert set(cell["tenants"]) <= {"tenant0", "tenant1"}
    # Every system was given the same requests.
    judged = [c for c in cells if c["judged"] and not c["flood"]]
    assert len({c["completed"] + c["failed"] for c in judged}) == 1
    assert len({c["request_rate"] for c in judged}) == 1
    text = (tmp_path / "out" / "qos.md").read_text()
    assert [set(pair) for pair in value["pairs"]] == [{"single", "moetel"}] * 2
    assert (
        "; median of 2 pairs tested in turn, " in text and text.count("in turn, mean E2EL: ") == 2
    )
    assert "| moetel, tenant1 x3 |" in text and "Worst tenant of each test" in text
    assert (tmp_path / "out" / "qos.png").stat().st_size > 10_000


def test_a_server_in_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def run(argv: list[str]) -> int:
        async with Server() as server:
            return await asyncio.to_thread(cli.main, ["bench", f"--url={server.url}", *argv])

    argv = [
        "--tenants",
        "fr",
        "de",
        "--request-rate",
        "20",
        "40",
        "--num-prompts=12",
        "--vocab-size=50",
    ]
    argv += ["--flood=2", f"--out={tmp_path}", "--name=http"]
    assert asyncio.run(run([*argv, "--drain=30"])) == 0
    cells = json.loads((tmp_path / "http.json").read_text())["results"]
    assert [(c["request_rate"], bool(c["flood"])) for c in cells] == [
        (20, False),
        (40, False),
        (40, True),
    ]
    assert all(c["failed"] == 0 and c["system"] == "http" for c in cells)
    assert "12 of 12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--url=http://x", "--tenants", "a"], "give --tenants and --request-rate"),
        (["--tenants", "a"], "--tenants names the models of a server"),
        (["--random=tiny-mixtral", "--num-tenants=0"], "0 tenants"),
        (["missing-store"], "missing-store"),
        (["--url=ftp://x", "--tenants", "a", "--request-rate", "1"], "give one like http://"),
    ],
)
def test_wrong_use(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["bench", *argv, f"--work={tmp_path}"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--percentiles=50,x"], "percentiles '50,x'"),
        (["--percentiles=101"], "percentiles '101'"),
        (["--load", "0"], "load: give shares above 0"),
        (["--duration=0"], "a duration above 0"),
        (["--max-num-seqs=0"], "max-num-seqs is 0"),
        (["--pairs=-1"], "pairs is -1"),
        (["--flood-tenant=x"], "'x' is to flood, but there is: a, b"),
        (["--goodput", "speed:3"], "goodput 'speed:3'"),
        (["--skew=-1"], "skew is -1"),
    ],
)
def test_options_out_of_range(argv: list[str], message: str) -> None:
    with pytest.raises(TrafficError, match=message):
        bench._experiment(arguments(*argv), {"a": 9, "b": 9})


class Steady:
    """Answers after a while, however many there are; counts what it is asked for."""

    def __init__(self, name: str, seconds: float, log: list[str]):
        self.name, self.seconds, self.log = name, seconds, log
        self.calls: list[Call] = []
        log.append(f"open {name}")

    async def generate(self, call: Call) -> AsyncGenerator[Piece]:
        self.calls.append(call)
        await asyncio.sleep(self.seconds)
        yield Piece(call.max_new_tokens)

    async def about(self) -> dict[str, Any]:
        return {"load_s": 0.0}

    async def close(self) -> None:
        self.log.append(f"close {self.name}")


def test_systems_are_tested_one_after_another_until_they_saturate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    seconds = {"single": 0.001, "moetel": 0.001, "paper": 0.1}

    async def no_time(system: Steady, trace: Trace, drain_s: float) -> list[Record]:
        """What a system that answers one request after another would have made of the trace."""
        records, free = [], 0.0
        for call in trace.calls:
            free = max(free, call.at_s) + system.seconds
            records.append(Record(call, call.at_s, [(free, call.max_new_tokens)], free, error=None))
        return records

    monkeypatch.setattr(qos, "run_trace", no_time)

    def opener(name: str) -> Any:
        async def make() -> Steady:
            return Steady(name, seconds[name], log)

        return make

    experiment = Experiment(
        {"a": 9, "b": 9},
        request_rates=(20.0, 30.0, 40.0),
        duration_s=4.0,
        capacity_s=0.0,
        concurrency=2,
    )
    found = asyncio.run(compare({n: opener(n) for n in seconds}, experiment))
    assert log == [f"{what} {name}" for name in seconds for what in ("open", "close")]
    assert all(c.result["compilations"] == 0 for c in found.cells)
    tested = {
        n: [(c.request_rate, c.judged, c.flood is not None) for c in found.cells if c.system == n]
        for n in seconds
    }
    rates = [(20.0, False, False), (30.0, False, False), (40.0, True, False)]
    assert tested["single"] == rates and tested["moetel"] == [*rates, (40.0, True, True)]
    # Ten a second are all that it can do: saturated at the first rate, so tested again at the
    # judged rate alone.
    assert tested["paper"] == [rates[0], rates[2]]
    assert [c.result["saturated"] for c in found.cells] == [False] * 7 + [True] * 2
    assert found.systems == {name: {"load_s": 0.0} for name in seconds}


@pytest.mark.parametrize("compiles", [False, True])
def test_pairs_are_tested_in_turn_with_both_loaded(
    monkeypatch: pytest.MonkeyPatch, compiles: bool
) -> None:
    log: list[str] = []
    traces: list[tuple[float, ...]] = []
    # The machine becomes slower and slower; what is tested in turn is hit alike.
    drift = iter(range(1, 100))

    class Told(Steady):
        async def about(self) -> dict[str, Any]:
            return {"load_s": 0.0} | ({"compilations": 3} if compiles else {})

    async def no_time(system: Steady, trace: Trace, drain_s: float) -> list[Record]:
        log.append(f"test {system.name}")
        traces.append(tuple(c.at_s for c in trace.calls))
        took = system.seconds * next(drift)
        return [
            Record(c, c.at_s, [(c.at_s + took, c.max_new_tokens)], c.at_s + took, error=None)
            for c in trace.calls
        ]

    monkeypatch.setattr(qos, "run_trace", no_time)

    def opener(name: str, seconds: float) -> Any:
        async def make() -> Steady:
            return Told(name, seconds, log)

        return make

    openers = {"single": opener("single", 0.01), "moetel": opener("moetel", 0.01)}
    experiment = Experiment(
        {"a": 9}, request_rates=(20.0,), duration_s=1.0, capacity_s=0.0, flood_factor=0, pairs=2
    )
    found = asyncio.run(compare(openers, experiment))
    at = log.index("close moetel") + 1
    assert log[at : at + 2] == ["open single", "open moetel"] and log[-2:] == [
        "close single",
        "close moetel",
    ]
    tests = [entry.split()[1] for entry in log[at + 2 : -2]]
    order = ["moetel", "single", "single", "moetel"]
    assert tests == ([name for name in order for _ in range(2)] if compiles else order)
    measured = traces[-len(tests) :][compiles :: 1 + compiles]
    assert measured[0] == measured[1] != measured[2] == measured[3]
    assert [set(pair) for pair in found.pairs] == [{"single", "moetel"}] * 2
    first = [
        pair["moetel"]["mean_e2el_ms"] / pair["single"]["mean_e2el_ms"] for pair in found.pairs
    ]
    assert first[0] < 1 < first[1]
    assert judge(found)[0].value == pytest.approx(sum(first) / 2)
    assert not found.floods
    # With a second tenant that floods, Moetel is tested once more in each pair, under the same
    # arrivals and the flood.
    del log[:], traces[:]
    two = Experiment(
        {"a": 9, "b": 9}, request_rates=(20.0,), duration_s=1.0, capacity_s=0.0, pairs=1
    )
    found = asyncio.run(compare(openers, two))
    tests = [entry.split()[1] for entry in log if entry.startswith("test")]
    expected = ["moetel"] * (3 if compiles else 2) + ["single"] * (2 if compiles else 1)
    assert tests[-len(expected) :] == expected
    calm, flooded = traces[-len(expected) :][compiles : compiles + 2]
    assert len(flooded) > 2 * len(calm) and calm == traces[-1]
    (moved,) = found.floods
    assert judge(found)[-1].value == pytest.approx(moved) and "median of 1 pairs" in str(
        judge(found)[-1]
    )
    # Nothing to compare with: only one of the two there.
    log.clear()
    found = asyncio.run(compare({"moetel": openers["moetel"]}, experiment))
    assert not found.pairs and log.count("open moetel") == 1


def test_a_system_that_fails_is_passed_over_unless_it_is_the_first() -> None:
    async def good() -> Steady:
        return Steady("single", 0.001, [])

    async def bad() -> Any:
        raise EngineError("no room")

    experiment = Experiment({"a": 9}, request_rates=(20.0,), duration_s=0.2, capacity_s=0.0)
    found = asyncio.run(compare({"single": good, "partition": bad}, experiment))
    assert found.systems == {"single": {"load_s": 0.0}, "partition": {"error": "no room"}}
    assert [c.system for c in found.cells] == ["single"]
    assert "partition failed: no room" in remarks(found)
    with pytest.raises(EngineError, match="no room"):
        asyncio.run(compare({"partition": bad, "single": good}, experiment))


def test_what_compiles_is_warmed_up_until_it_is_done() -> None:
    sizes: list[int] = []

    class Compiling(Steady):
        compiled: ClassVar[set[int]] = set()

        async def generate(self, call: Call) -> AsyncGenerator[Piece]:
            sizes.append(call.number)
            if len(sizes) in (
                1,
                6,
                12,
            ):  # something new comes up in the first round and in the second
                self.compiled.add(len(sizes))
            async for piece in super().generate(call):
                yield piece

        async def about(self) -> dict[str, Any]:
            return {"load_s": 0.0, "compilations": len(self.compiled)}

    async def make() -> Compiling:
        return Compiling("single", 0.001, [])

    experiment = Experiment(
        {"a": 9}, request_rates=(20.0,), duration_s=0.5, capacity_s=0.05, concurrency=4
    )
    found = asyncio.run(compare({"single": make}, experiment))
    assert found.systems["single"]["compilations"] == 3
    (only,) = found.cells
    assert only.result["compilations"] == 0 and only.result["completed"] == 10
    # The same pattern as the test's own requests, but others, half as long.
    prelude = experiment.prelude(experiment.trace(20.0))
    assert len(prelude.calls) == 5 and prelude.request_rate == pytest.approx(20.0)


def test_rates_follow_the_first_systems_saturation() -> None:
    async def make() -> Steady:
        return Steady("single", 0.02, [])

    experiment = Experiment(
        {"a": 9},
        loads=(0.05,),
        duration_s=0.2,
        drain_s=5.0,
        capacity_s=0.2,
        concurrency=2,
        flood_factor=0,
    )
    found = asyncio.run(compare({"single": make}, experiment))
    full = found.capacity["single"]
    assert full > 0
    assert [(c.load, c.judged) for c in found.cells] == [(0.05, False), (0.7, True)]
    assert [c.request_rate for c in found.cells] == pytest.approx([0.05 * full, 0.7 * full])


def cell(system: str, seconds: float, flood: Flood | None = None, failed: int = 0) -> Cell:
    """Ten requests of tenants a and b, a second apart, each of `seconds`, the last ones
    unfinished."""
    records = []
    for n in range(10):
        call = Call(n, "ab"[n % 2], float(n), (1, 2), 3)
        done = n < 10 - failed
        pieces = [(n + seconds / 2, 1), (n + seconds, 2)] if done else []
        records.append(
            Record(call, float(n), pieces, n + seconds, 0.01, error=None if done else UNFINISHED)
        )
    return Cell(system, 1.0, 0.7, True, report(records, 10.0), records, flood)


def test_judgements() -> None:
    found = Comparison(capacity={"single": 10.0, "moetel": 9.0, "paper": 2.0})
    flood = Flood("b", 8.0, 2.0)
    found.cells = [
        cell("single", 1.0),
        cell("moetel", 1.05),
        cell("moetel", 1.4, flood),
        cell("partition", 10.5, failed=2),
    ]
    lines = judge(found)
    values = [j.value for j in lines]
    assert values == pytest.approx([1.05, 0.1, 4.5, 0.1 / (10 * 0.525), 1.4 / 1.05])
    assert [j.met for j in lines] == [True, True, True, True, False]
    assert (
        str(lines[0])
        == "mean E2EL, moetel / single at 1 requests/s (70% load of one model): 1.05 (aim at most "
        "1.1, met); "
        "one test each, one after the other"
    )
    found.pairs = [
        {"single": cell("single", 1.0).result, "moetel": cell("moetel", seconds).result}
        for seconds in (1.3, 1.2, 0.9)
    ]
    assert judge(found)[0].value == pytest.approx(1.2)
    assert str(judge(found)[0]).endswith(
        ": 1.2 (aim at most 1.1, MISSED); median of 3 pairs tested in turn, 0.9 to 1.3"
    )
    found.pairs = []
    assert "the true ratio is smaller" in str(lines[1])
    assert "8 times the rate of b: 1.33 (aim at most 1.2, MISSED); 4 requests of the others" in str(
        lines[4]
    )
    shown = remarks(found)
    assert "saturation, requests/s (closed loop): single 10, moetel 9, paper 2" in shown
    assert "partition at 1 requests/s: 2 requests unfinished" in shown
    assert row(found.cells[2])[0] == "moetel, b x8"
    text = markdown(found, {"date": "d", "machine": "m", "versions": {}, "command": "c"}, {}, "QoS")
    assert "| partition | 1 | 70% | 8 of 10 |" in text
    nothing = judge(Comparison())
    assert all(j.met is None and "not measured" in str(j) for j in nothing)


def test_an_infinite_rate_has_no_flood() -> None:
    experiment = Experiment({"a": 9, "b": 9}, duration_s=None, num_requests=4)
    assert experiment.flood(experiment.trace(math.inf)) is None
    assert experiment.flood(experiment.trace(2.0)) == Flood("b", 8.0, 0.5)
