"""`moetel bench` with the systems of the lab, and what it concludes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lab import in_turn
from benchmarks.lab.judge import judge
from benchmarks.material import random_models
from scripts import cli
from scripts.commands import bench
from scripts.load import experiment as experiments
from scripts.load.experiment import Comparison, Experiment, compare
from scripts.load.run import Record
from scripts.load.traffic import Flood, Trace
from tests.scripts.test_bench import FAST, Steady, cell


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
    for each in cells:
        assert not set(keys) - set(each) and each["completed"] + each["failed"] > 0
        assert set(each["tenants"]) <= {"tenant0", "tenant1"}
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


async def both(openers: dict[str, Any], experiment: Experiment, pairs: int) -> Comparison:
    """One after another, then in turn."""
    found = await compare(openers, experiment)
    await in_turn.test_in_turn(openers, experiment, pairs, found, lambda text: None)
    return found


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

    monkeypatch.setattr(experiments, "run_trace", no_time)
    monkeypatch.setattr(in_turn, "run_trace", no_time)

    def opener(name: str, seconds: float) -> Any:
        async def make() -> Steady:
            return Told(name, seconds, log)

        return make

    openers = {"single": opener("single", 0.01), "moetel": opener("moetel", 0.01)}
    experiment = Experiment(
        {"a": 9}, request_rates=(20.0,), duration_s=1.0, capacity_s=0.0, flood_factor=0
    )
    found = asyncio.run(both(openers, experiment, 2))
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
    two = Experiment({"a": 9, "b": 9}, request_rates=(20.0,), duration_s=1.0, capacity_s=0.0)
    found = asyncio.run(both(openers, two, 1))
    tests = [entry.split()[1] for entry in log if entry.startswith("test")]
    expected = ["moetel"] * (3 if compiles else 2) + ["single"] * (2 if compiles else 1)
    assert tests[-len(expected) :] == expected
    calm, flooded = traces[-len(expected) :][compiles : compiles + 2]
    assert len(flooded) > 2 * len(calm) and calm == traces[-1]
    (moved,) = found.floods
    assert f": {moved:.3g}; median of 1 pairs tested in turn" in str(found.flood())
    # Nothing to compare with: only one of the two there.
    log.clear()
    found = asyncio.run(both({"moetel": openers["moetel"]}, experiment, 2))
    assert not found.pairs and log.count("open moetel") == 1


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
    assert values == pytest.approx([1.05, 0.1, 4.5, 0.1 / (10 * 0.525)])
    assert [j.met for j in lines] == [True] * 4
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
    nothing = judge(Comparison())
    assert all(j.met is None and "not measured" in str(j) for j in nothing)


def test_the_command_names_what_is_there() -> None:
    assert bench.MODELS == tuple(random_models.MODELS)
