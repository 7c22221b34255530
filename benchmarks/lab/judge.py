"""What is asked of Moetel beside the other systems, and whether it was met."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scripts.load.experiment import Comparison

OURS = "moetel"


@dataclass(frozen=True)
class Judgement:
    """One question. value: None where it was not measured. at_most, at_least: the aim."""

    what: str
    value: float | None
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )

    def __str__(self) -> str:
        aim = (
            f"at most {self.at_most:g}"
            if self.at_most is not None
            else f"at least {self.at_least:g}"
        )
        shown = "not measured" if self.value is None else f"{self.value:.3g}"
        verdict = {None: "", True: ", met", False: ", MISSED"}[self.met]
        return f"{self.what}: {shown} (aim {aim}{verdict}){'; ' + self.note if self.note else ''}"


def judge(found: Comparison) -> list[Judgement]:
    """The aims of the comparison, at the judged rate."""
    cells = {name: found.judged(name) for name in ("single", OURS, "partition")}
    mine = cells[OURS]

    def latency(name: str) -> float | None:
        cell = cells[name]
        return None if cell is None else cell.result["mean_e2el_at_least_ms"]

    def ratio(a: float | None, b: float | None) -> float | None:
        return None if a is None or not b else a / b

    at = "" if mine is None else f" at {mine.request_rate:.3g} requests/s"
    if mine is not None and mine.load is not None:
        at += f" ({mine.load:.0%} load of one model)"
    beside = ratio(latency(OURS), latency("single"))
    how = "one test each, one after the other"
    each = [
        pair[OURS]["mean_e2el_at_least_ms"] / pair["single"]["mean_e2el_at_least_ms"]
        for pair in found.pairs
    ]
    if each:
        beside = float(np.median(each))
        how = f"median of {len(each)} pairs tested in turn, {min(each):.3g} to {max(each):.3g}"
    cut = cells["partition"] is not None and cells["partition"].result["failed"] > 0
    return [
        Judgement(
            f"mean E2EL, {OURS} / single{at}", beside, at_most=1.1, note=how if beside else ""
        ),
        Judgement(
            f"mean E2EL, {OURS} / partition{at}",
            ratio(latency(OURS), latency("partition")),
            at_most=0.15,
            note="partition did not finish in time, so the true ratio is smaller" if cut else "",
        ),
        Judgement(
            f"saturation rate, {OURS} / paper",
            ratio(found.capacity.get(OURS), found.capacity.get("paper")),
            at_least=3.0,
        ),
        Judgement(
            f"share of TTFT that reconfiguration takes{at}",
            None if mine is None else mine.result["reconfiguration_share_of_ttft"],
            at_most=0.05,
        ),
    ]
