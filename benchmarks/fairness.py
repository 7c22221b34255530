"""What a tenant's flood does to the others, and what keeping it from that costs: the scheduler
itself, in virtual time.

    python -m benchmarks.fairness --steps 0.09 0.011 0.0006 0

A step takes (seconds) so much, so much more for each row, for each token of a prompt that it reads,
and for each tenant
in it, with a normal error of a twentieth: by default those of small Mixtrals on two kinds of CPU,
of a device that waits for weights, and of switch-base-8, where what a tenant has of its own is much
(docs/results). Arrivals are those of `moetel bench`. So only the scheduler makes the difference,
which on a shared machine a busy neighbour makes as well.

For each bound on interference (`SchedulerOptions.max_interference`; inf: work-conserving, every
free place is taken):

- saturates at: requests a second, closed-loop, `max_num_seqs` under way.
- E2EL at 70 %, 90 % of that of inf: mean seconds to the last token, queueing included; then of the
  most popular of tenants whose rates follow a power law, in all 85 %. A bound must not cost this.
- flood: p95 of the others' E2EL while one tenant sends eight times its share of a load of 70 %,
  over that without; and the part of the device's best rate that the flooding tenant is given.
- long prompts: the same with prompts of 16 times the length in the flood.
- batch: the same if it sends, beside its ordinary requests, twice as many at once as come in a
  test; of the others' requests that arrive in the first seven tenths of the time in which the
  device, always at its best, could have answered all of it. After that time it is demand that the
  device can bear, and takes what is free.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Report, Spread, add_output, write_output
from common.sampling_params import SamplingParams
from common.serving.backend import Part, Step
from common.serving.fake import FakeBackend
from common.serving.request import Request
from common.serving.scheduler import Scheduler
from common.serving.scheduler_options import SchedulerOptions
from common.serving.tenant_text import TenantText
from scripts.load.traffic import Call, Flood, Load, make_trace

TENANTS = ("a", "b", "c", "d")
FLOODING = TENANTS[-1]
VOCAB = dict.fromkeys(TENANTS, 1000)
LENGTHS: dict[str, Any] = {"input_len": 32, "output_len": 25, "range_ratio": 0.5}

LOAD = 0.7
"""Under which a flood begins, of the rate at which the device saturates."""

KINDS = {
    "rows cost arithmetic (Ice Lake)": (0.09, 0.011, 0.0006, 0.0),
    "rows cost a little (EPYC)": (0.062, 0.003, 0.0006, 0.0),
    "rows cost next to nothing (a device that waits for weights)": (0.02, 0.00002, 0.00002, 0.0),
    "tenants cost most (switch-base-8, Ice Lake)": (0.004, 0.0015, 0.002, 0.02),
}


@dataclass(frozen=True)
class Steps:
    """Seconds of a step: `empty_s + tenant_s * tenants + row_s * rows + token_s * tokens read`, and
    a normal error relative to that."""

    empty_s: float
    row_s: float
    token_s: float = 0.0
    tenant_s: float = 0.0
    noise: float = 0.05

    def seconds(self, tenants: int, rows: int, read: int, rng: np.random.Generator) -> float:
        error = max(0.5, 1 + self.noise * float(rng.standard_normal()))
        return (
            self.empty_s + self.tenant_s * tenants + self.row_s * rows + self.token_s * read
        ) * error


@dataclass(frozen=True)
class Answer:
    """Seconds after its arrival at which a request had its first token and its last."""

    call: Call
    ttft_s: float
    e2el_s: float

    @property
    def done_at(self) -> float:
        return self.call.at_s + self.e2el_s


class _NoBackend(FakeBackend):
    """Room for any number of sequences, which nothing computes."""

    default_chunk = 64

    def fits(self, parts: Sequence[Part], ahead: int = 0) -> bool:
        return True

    def max_length(self, tenant: str) -> int:
        return 10**9


def simulate(
    calls: Sequence[Call],
    options: SchedulerOptions,
    steps: Steps,
    *,
    seed: int = 0,
    closed: int | None = None,
) -> list[Answer]:
    """Every request's answer, in the order of their ends.

    closed: so many requests are always under way, in the order of their arrival, whenever that was
        to be.
    """
    scheduler, rng = Scheduler(_NoBackend(TENANTS), options), np.random.default_rng(seed)
    texts = {
        name: TenantText(name, Path("/nonexistent")) for name in {call.tenant for call in calls}
    }
    params = SamplingParams()
    clock, taken, under_way = 0.0, 0, 0
    asked: dict[Request, Call] = {}
    answers: list[Answer] = []
    nothing = np.zeros(0, dtype=np.int64)
    step = Step(nothing, [], nothing, nothing, {})
    while len(answers) < len(calls):
        if closed is None and not under_way:
            clock = max(clock, calls[taken].at_s)
        while taken < len(calls) and (under_way < closed if closed else calls[taken].at_s <= clock):
            call = calls[taken]
            request = Request(
                call.tenant, call.prompt, call.max_new_tokens, params, texts[call.tenant], clock
            )
            asked[request] = call
            scheduler.add(request, bounded=False)
            taken, under_way = taken + 1, under_way + 1
        parts = scheduler.next(clock)
        tenants = len({request.tenant for request, _ in parts})
        clock += steps.seconds(tenants, len(parts), sum(part.read for _, part in parts), rng)
        scheduler.done(parts, step, clock)
        for request, _ in parts:
            if request.unread:
                continue
            request.take(1, None, clock)
            if request.done:
                scheduler.remove(request)
                under_way -= 1
                call = asked.pop(request)
                assert request.first_at is not None
                answers.append(Answer(call, request.first_at - call.at_s, clock - call.at_s))
    return answers


def saturation(options: SchedulerOptions, steps: Steps) -> float:
    """Requests a second, after as many as are under way have been answered three times."""
    count = options.max_num_seqs
    calls = make_trace(VOCAB, Load(seed=3, **LENGTHS), 1.0, num_requests=16 * count).calls
    # In a closed loop a call's time says nothing; those of the ends count from 0.
    ends = [a.done_at for a in simulate(calls, options, steps, closed=count)]
    return 9 * count / (ends[12 * count - 1] - ends[3 * count - 1])


def latency(
    options: SchedulerOptions,
    steps: Steps,
    rate: float,
    seconds: float,
    seed: int,
    skew: float = 0.0,
) -> float:
    """Mean E2EL in seconds; with a skew, of the most popular tenant."""
    calls = make_trace(VOCAB, Load(seed=seed, skew=skew, **LENGTHS), rate, duration_s=seconds).calls
    answers = simulate(calls, options, steps, seed=seed)
    return float(np.mean([a.e2el_s for a in answers if not skew or a.call.tenant == TENANTS[0]]))


def flooded(
    options: SchedulerOptions,
    steps: Steps,
    rate: float,
    seconds: float,
    seed: int,
    batch: int = 0,
    longer: int = 1,
) -> tuple[float, float]:
    """p95 of the others' E2EL with one tenant's flood over that without, from its beginning on; and
    the requests a second that it is answered in the second half of the time.

    batch: it sends so many at once, instead of eight times its rate. longer: its prompts, times the
        others'.
    """
    load, begin_s, end_s = Load(seed=seed, **LENGTHS), seconds / 4, seconds
    plain = make_trace(VOCAB, load, rate, duration_s=seconds).calls
    if batch:
        more = make_trace({FLOODING: 1000}, load, math.inf, num_requests=batch).calls
        added = [
            Call(len(plain) + n, c.tenant, begin_s, c.prompt, c.max_new_tokens)
            for n, c in enumerate(more)
        ]
        calls = tuple(sorted([*plain, *added], key=lambda c: c.at_s))
        end_s = min(seconds, begin_s + 0.7 * batch / (rate / LOAD - rate))
    else:
        calls = make_trace(
            VOCAB, load, rate, duration_s=seconds, flood=Flood(FLOODING, 8.0, begin_s)
        ).calls
    calls = tuple(
        replace(c, prompt=c.prompt * longer) if _is_flood(c, begin_s) else c for c in calls
    )
    without, with_it = (simulate(some, options, steps, seed=seed) for some in (plain, calls))

    def others_p95(answers: list[Answer]) -> float:
        some = [
            a.e2el_s for a in answers if a.call.tenant != FLOODING and begin_s < a.call.at_s < end_s
        ]
        return float(np.percentile(some, 95))

    answered = sum(
        a.call.tenant == FLOODING and seconds / 2 < a.done_at <= seconds for a in with_it
    )
    return others_p95(with_it) / others_p95(without), answered / (seconds / 2)


def _is_flood(call: Call, begin_s: float) -> bool:
    return call.tenant == FLOODING and call.at_s >= begin_s


def measure(
    bound: float, steps: Steps, best: float, seeds: int, num_requests: int, max_num_seqs: int
) -> dict[str, Spread | str]:
    """A row of the table. best: requests a second at which the device saturates without a bound."""
    seconds = num_requests / (LOAD * best)
    options = SchedulerOptions(max_num_seqs=max_num_seqs, max_queue=10**9, max_interference=bound)

    def each(rate: float, skew: float = 0.0) -> Spread:
        return Spread.of(
            [latency(options, steps, rate * best, seconds, seed, skew) for seed in range(seeds)]
        )

    floods = [flooded(options, steps, LOAD * best, seconds, seed) for seed in range(seeds)]
    long = [flooded(options, steps, LOAD * best, seconds, seed, longer=16) for seed in range(seeds)]
    batches = [
        flooded(options, steps, LOAD * best, 8 * seconds, seed, 2 * num_requests)
        for seed in range(seeds)
    ]
    return {
        "max_interference": f"{bound:g}",
        "saturates at": f"{saturation(options, steps):.3g}",
        "E2EL at 70 %": each(LOAD),
        "E2EL at 90 %": each(0.9),
        "popular, at 85 %": each(0.85, 1.2),
        "flood": Spread.of([moved for moved, _ in floods]),
        "flood is given": Spread.of([given / best for _, given in floods]),
        "long prompts": Spread.of([moved for moved, _ in long]),
        "batch": Spread.of([moved for moved, _ in batches]),
    }


def main(argv: list[str] | None = None) -> list[list[dict[str, Any]]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_output(parser)
    parser.add_argument(
        "--steps",
        type=float,
        nargs=4,
        metavar=("STEP", "ROW", "TOKEN", "TENANT"),
        help="seconds of a step, of a row, of a prompt's token and of a tenant; default: four "
        "kinds of device",
    )
    parser.add_argument("--bounds", type=float, nargs="+", default=[math.inf, 0.1])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument(
        "--num-requests", type=int, default=200, help="of a test at 70 %% load, without a flood"
    )
    parser.add_argument("--max-num-seqs", type=int, default=32)
    args = parser.parse_args(argv)
    kinds = {f"{args.steps}": tuple(args.steps)} if args.steps else KINDS
    reports = []
    for name, each in kinds.items():
        steps = Steps(*each)
        unbound = SchedulerOptions(
            max_num_seqs=args.max_num_seqs, max_queue=10**9, max_interference=math.inf
        )
        best = saturation(unbound, steps)
        columns = (
            "max_interference",
            "saturates at",
            "E2EL at 70 %",
            "E2EL at 90 %",
            "popular, at 85 %",
            "flood",
        )
        report = Report(f"Steps: {name}", (*columns, "flood is given", "long prompts", "batch"))
        report.note(
            f"{1e3 * steps.empty_s:g} ms and {1e3 * steps.tenant_s:g} ms a tenant, "
            f"{1e3 * steps.row_s:g} ms a row, "
            f"{1e3 * steps.token_s:g} ms a token read; "
            f"{len(TENANTS)} tenants, {args.max_num_seqs} sequences, {args.seeds} traces of "
            f"{args.num_requests} "
            "requests"
        )
        for bound in args.bounds:
            report.add(
                **measure(bound, steps, best, args.seeds, args.num_requests, args.max_num_seqs)
            )
        reports.append(report)
    write_output(args, reports, "Fairness")
    return [r.rows for r in reports]


if __name__ == "__main__":
    main()
