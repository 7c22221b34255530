"""`moetel bench` from arguments to files, and what it concludes."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from common import EngineError
from scripts import cli
from scripts.commands import bench
from scripts.load import experiment as experiments
from scripts.load.experiment import Cell, Comparison, Experiment, compare
from scripts.load.report import markdown, remarks, row
from scripts.load.run import UNFINISHED, Piece, Record
from scripts.load.summary import report
from scripts.load.traffic import Call, Flood, Trace, TrafficError
from tests import helpers
from tests.conftest import Family
from tests.scripts.test_openai_server import Server

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

    monkeypatch.setattr(experiments, "run_trace", no_time)

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


def test_an_infinite_rate_has_no_flood() -> None:
    experiment = Experiment({"a": 9, "b": 9}, duration_s=None, num_requests=4)
    assert experiment.flood(experiment.trace(math.inf)) is None
    assert experiment.flood(experiment.trace(2.0)) == Flood("b", 8.0, 0.5)


def test_remarks() -> None:
    found = Comparison(capacity={"single": 10.0, "moetel": 9.0, "paper": 2.0})
    found.cells = [
        cell("single", 1.0),
        cell("moetel", 1.05),
        cell("moetel", 1.4, Flood("b", 8.0, 2.0)),
        cell("partition", 10.5, failed=2),
    ]
    assert str(found.flood()).endswith(" 8 times the rate of b: 1.33; 4 requests of the others")
    shown = remarks(found)
    assert "saturation, requests/s (closed loop): single 10, moetel 9, paper 2" in shown
    assert "partition at 1 requests/s: 2 requests unfinished" in shown
    assert row(found.cells[2])[0] == "moetel, b x8"
    text = markdown(found, {"date": "d", "machine": "m", "versions": {}, "command": "c"}, {}, "QoS")
    assert "| partition | 1 | 70% | 8 of 10 |" in text


def test_the_engine_of_this_process(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there without `benchmarks`: no other system, no random tenants."""
    store = helpers.build_round_robin(tmp_path / "store", family.paths)
    load = ["--request-rate", "40", "--num-prompts=6", "--duration=0.5", "--flood=0"]
    assert cli.main(["bench", str(store.path), *FAST, *load, "--drain=60"]) == 0
    out = capsys.readouterr().out
    assert "6 of 6" in out and "saturation, requests/s (closed loop): moetel" in out


@pytest.mark.parametrize("asked", [[], ["STORE", "--systems", "single", "moetel"]])
def test_what_needs_the_lab_says_so(
    asked: list[str],
    family: Family,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("benchmarks", "benchmarks.lab.systems", "benchmarks.material.random_models"):
        monkeypatch.setitem(sys.modules, name, None)
    store = helpers.build_round_robin(tmp_path / "store", family.paths)
    given = [str(store.path) if word == "STORE" else word for word in asked]
    assert cli.main(["bench", *given, f"--work={tmp_path}"]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "needs the folder benchmarks/, which is not in the installed package" in message
