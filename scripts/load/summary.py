"""What the records of a load test come to.

Definitions and names are those of `vllm bench serve`, for all requests and for each tenant: TTFT
until the first token; E2EL until the last; TPOT is (E2EL - TTFT) / (tokens - 1), of answers with
several tokens; ITL are all gaps between pieces of answers, pooled.

Beside them: `jain_index` over tenants of 1 / (mean E2EL for a token of the answer), 1 if all are
served equally well, 1 / tenants if one has everything; `worst_tenant`, the one with the smallest of
these; `saturated`, see `report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scripts.load.run import UNFINISHED, Record
from scripts.load.traffic import TrafficError

METRICS = ("ttft", "tpot", "itl", "e2el")
GOALS = ("ttft", "tpot", "e2el")
KEPT_UP = 0.95
"""A system that answers a smaller share of what arrives, in the time in which it arrives, is
saturated."""


@dataclass(frozen=True)
class Goodput:
    """The most that a good request may take, in milliseconds: ttft, tpot, e2el; those not named do
    not count."""

    most_ms: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, pairs: Sequence[str]) -> Goodput:
        """`ttft:200`, `tpot:50`, ... Raises TrafficError."""
        found = {}
        for pair in pairs:
            name, _, value = pair.partition(":")
            try:
                found[name] = float(value)
            except ValueError:
                found[name] = -1.0
            if name not in GOALS or not found[name] >= 0:
                raise TrafficError(
                    f"goodput {pair!r}; write {', '.join(f'{g}:MILLISECONDS' for g in GOALS)}"
                )
        return cls(found)

    def met(self, record: Record) -> bool:
        # An answer of one token has no time between tokens, which vLLM takes for 0.
        took_s = {"ttft": record.ttft_s, "tpot": record.tpot_s or 0.0, "e2el": record.e2el_s}
        return all(took_s[name] * 1e3 <= most for name, most in self.most_ms.items())


def summarise(
    records: Sequence[Record],
    duration_s: float,
    percentiles: Sequence[float] = (50, 90, 95, 99),
    goodput: Goodput | None = None,
) -> dict[str, Any]:
    """vLLM's result keys for these records. Times of no request at all are 0, as there."""
    done = [r for r in records if r.error is None]
    output = sum(r.num_tokens for r in done)
    total_input = sum(len(r.call.prompt) for r in done)
    found: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": total_input,
        "total_output_tokens": output,
        "request_throughput": len(done) / duration_s,
        "request_goodput": sum(goodput.met(r) for r in done) / duration_s
        if goodput and goodput.most_ms
        else None,
        "output_throughput": output / duration_s,
        "total_token_throughput": (total_input + output) / duration_s,
        "max_concurrent_requests": _most_at_once(done),
    }
    values: dict[str, list[float]] = {
        "ttft": [r.ttft_s for r in done],
        "tpot": [t for r in done if (t := r.tpot_s) is not None],
        "itl": [gap for r in done for gap in r.gaps_s],
        "e2el": [r.e2el_s for r in done],
    }
    for name in METRICS:
        ms = np.array(values[name] or [0.0]) * 1e3
        found |= {
            f"mean_{name}_ms": float(ms.mean()),
            f"median_{name}_ms": float(np.median(ms)),
            f"std_{name}_ms": float(ms.std()),
        }
        found |= {f"p{p:g}_{name}_ms": float(np.percentile(ms, p)) for p in percentiles}
    return found


def _most_at_once(done: Sequence[Record]) -> int:
    """Most requests between arrival and last token at one time; one that ends as another comes
    counts before it."""
    events = [(r.call.at_s, 1) for r in done] + [(r.call.at_s + r.e2el_s, -1) for r in done]
    now = most = 0
    for _, change in sorted(events):
        now += change
        most = max(most, now)
    return most


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 if all values are equal, 1 / number if all but one are 0; 0 if all are, or
    there are none."""
    squares = sum(v * v for v in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 0.0


def service(records: Sequence[Record]) -> float:
    """How well these requests were served: 1 over their mean E2EL in seconds for a token of the
    answer.

    Those that were given up count with the time that they had waited. Times the share that did not
    fail.
    """
    counted = [r for r in records if r.error in (None, UNFINISHED)]
    each = [
        r.e2el_s / r.num_tokens
        if r.error is None
        else (r.ended_s - r.call.at_s) / r.call.max_new_tokens
        for r in counted
    ]
    return len(counted) ** 2 / len(records) / sum(each) if any(each) else 0.0


def answered_share(records: Sequence[Record], horizon_s: float) -> float:
    """Rate at which answers were completed, over the rate of arrivals.

    After the last arrival a system that keeps up needs about as long as an answer takes it; what it
    needs beyond the median of the first half's answers is a backlog, and lengthens the time in
    which all was answered.
    """
    done = [r for r in records if r.error is None]
    if not records:
        return 1.0
    if not done:
        return 0.0
    early = [r.e2el_s for r in done if r.call.at_s <= horizon_s / 2] or [r.e2el_s for r in done]
    last = max(r.call.at_s + r.e2el_s for r in done)
    backlog_s = max(0.0, last - horizon_s - float(np.median(early)))
    return len(done) / len(records) * (horizon_s / (horizon_s + backlog_s) if horizon_s else 1.0)


def report(
    records: Sequence[Record],
    horizon_s: float,
    percentiles: Sequence[float] = (50, 90, 95, 99),
    goodput: Goodput | None = None,
) -> dict[str, Any]:
    """Everything about one test: vLLM's keys, the same for each tenant, fairness, saturation,
    reconfigurations.

    duration: from the start to the last token, as vLLM's. drain_s: what of it is after the last
        possible arrival.
    answered_share: see there; saturated: it is below `KEPT_UP`. mean_e2el_at_least_ms: over all
        requests, those that
    were given up counting with the time they had waited: comparable where a system could not
    finish.
    reconfiguration_share_of_ttft: of all time until first tokens, the share that reconfigurations
        took.
    """
    percentiles = sorted({*percentiles, 95})
    duration_s = max(
        [r.ended_s if r.error else r.call.at_s + r.e2el_s for r in records] + [horizon_s, 1e-9]
    )
    found = summarise(records, duration_s, percentiles, goodput)
    names = sorted({r.call.tenant for r in records})
    mine = {name: [r for r in records if r.call.tenant == name] for name in names}
    done = [r for r in records if r.error is None]
    waited = [r.e2el_s if r.error is None else r.ended_s - r.call.at_s for r in records]
    served = {name: service(each) for name, each in mine.items()}
    share = answered_share(records, horizon_s)
    ttft_s = sum(r.ttft_s for r in done)
    errors: dict[str, int] = {}
    for record in records:
        if record.error is not None:
            errors[record.error] = errors.get(record.error, 0) + 1
    return found | {
        "drain_s": duration_s - horizon_s,
        "answered_share": share,
        "saturated": share < KEPT_UP,
        "mean_e2el_at_least_ms": sum(waited) / len(waited) * 1e3 if waited else 0.0,
        "reconfiguration_share_of_ttft": sum(r.reconfiguration_s for r in done) / ttft_s
        if ttft_s
        else 0.0,
        "max_send_delay_ms": max((r.sent_s - r.call.at_s for r in records), default=0.0) * 1e3,
        "jain_index": jain(list(served.values())),
        "worst_tenant": min(served, key=lambda n: served[n], default=None),
        "tenants": {
            name: summarise(each, duration_s, percentiles, goodput) for name, each in mine.items()
        },
        "errors": errors,
    }
