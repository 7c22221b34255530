"""When requests arrive, of which tenant and how long: made from a seed, so that every system is
given the same ones.

Each tenant has a trace of its own over the same time. As in `vllm bench serve`, gaps between
arrivals are gamma
distributed: burstiness 1 is a Poisson process, below 1 requests come in bursts, above 1 more
regularly, infinite is a constant gap; and gaps are scaled so that the rate is exactly what was
asked for. Here the trace is a circle with as
many gaps as arrivals, turned by a random angle: a Poisson process given its number of arrivals,
without the common last arrival that scaling each tenant's trace to its end would make.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from common.errors import MoetelError
from common.units import is_whole

FIRST_TOKEN = 3
"""Random prompts hold no token id below this: those are mostly padding and ends."""


class TrafficError(MoetelError):
    """A load that cannot be made."""


@dataclass(frozen=True)
class Call:
    """One request. at_s: seconds after the start at which it arrives. number: its place in the
    order of arrival."""

    number: int
    tenant: str
    at_s: float
    prompt: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Flood:
    """One tenant's rate becomes `factor` times as high from `from_s` on. Nothing else of the trace
    changes."""

    tenant: str
    factor: float
    from_s: float


@dataclass(frozen=True)
class Load:
    """What arrives, whatever the rate.

    skew: tenant number i (from 0) has a share of the rate proportional to (i + 1) ** -skew; 0:
        equal shares.
    input_len, output_len: tokens of prompts and answers, on average. range_ratio: r of vLLM's
        `--random-range-ratio`: lengths are uniform between (1 - r) and (1 + r) times the average;
        0: all the same.
    """

    skew: float = 0.0
    burstiness: float = 1.0
    input_len: int = 32
    output_len: int = 25
    range_ratio: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises TrafficError for a value out of range."""
        if not 0 <= self.skew < math.inf:
            raise TrafficError(f"skew is {self.skew!r}; give a number from 0 (equal shares)")
        if not self.burstiness > 0:
            raise TrafficError(
                f"burstiness is {self.burstiness!r}; give a number above 0: 1 is Poisson"
            )
        if not 0 <= self.range_ratio < 1:
            raise TrafficError(
                f"the range ratio is {self.range_ratio!r}; give a number from 0, below 1"
            )
        for name in ("input_len", "output_len"):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise TrafficError(f"{name} is {value!r}; give a whole number from 1")
        if not is_whole(self.seed) or self.seed < 0:
            raise TrafficError(f"seed is {self.seed!r}; give a whole number from 0")


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival. horizon_s: how long they arrive; 0 if all come at
    once."""

    calls: tuple[Call, ...]
    horizon_s: float

    @property
    def request_rate(self) -> float:
        """Requests a second, infinite if all come at once."""
        return len(self.calls) / self.horizon_s if self.horizon_s else math.inf


def shares(num_tenants: int, skew: float) -> np.ndarray:
    """float64 [tenants], summing to 1: the power law."""
    weights: np.ndarray = np.arange(1, num_tenants + 1, dtype=np.float64) ** -skew
    found: np.ndarray = weights / weights.sum()
    return found


def arrivals(
    count: int, horizon_s: float, burstiness: float, rng: np.random.Generator
) -> np.ndarray:
    """float64 [count], ascending, in [0, horizon_s)."""
    gaps = np.ones(count) if math.isinf(burstiness) else rng.gamma(burstiness, size=count)
    turn = rng.random()
    total = gaps.sum()
    if count == 0 or total == 0:  # gaps of extreme burstiness can all underflow
        return np.full(count, turn * horizon_s)
    return np.sort((np.cumsum(gaps) / total + turn) % 1.0) * horizon_s


def make_trace(
    vocab_sizes: Mapping[str, int],
    load: Load,
    request_rate: float,
    *,
    duration_s: float | None = None,
    num_requests: int | None = None,
    flood: Flood | None = None,
) -> Trace:
    """Requests of all tenants at `request_rate` in all, for so long, or so many of them.

    vocab_sizes: tenant -> token ids that its prompts may hold. The same seed gives each tenant the
    same pattern of arrivals at every rate, and with a flood or without. request_rate may be
    infinite: all requests come at once.

    Raises TrafficError.
    """
    if not vocab_sizes:
        raise TrafficError("there are no tenants; name at least one")
    if not request_rate > 0:
        raise TrafficError(f"the request rate is {request_rate!r}; give requests a second, above 0")
    if (duration_s is None) == (num_requests is None):
        raise TrafficError("give either a duration or a number of requests")
    if duration_s is not None:
        if not 0 < duration_s < math.inf or math.isinf(request_rate):
            raise TrafficError(
                "an infinite request rate needs a number of requests, and a duration must be finite"
            )
        horizon_s, total = duration_s, max(1, round(request_rate * duration_s))
    else:
        assert num_requests is not None
        if num_requests < 1:
            raise TrafficError(f"{num_requests} requests; give at least 1")
        horizon_s, total = num_requests / request_rate, num_requests
    if flood is not None:
        _check_flood(flood, vocab_sizes, horizon_s)
    names = list(vocab_sizes)
    counts = _whole_parts(total, shares(len(names), load.skew))
    calls: list[Call] = []
    for i, (name, count) in enumerate(zip(names, counts, strict=True)):
        times = arrivals(
            count, horizon_s, load.burstiness, np.random.default_rng([load.seed, i, 0])
        )
        calls += _calls(
            name, times, vocab_sizes[name], load, np.random.default_rng([load.seed, i, 1])
        )
        if flood is not None and flood.tenant == name:
            left_s = horizon_s - flood.from_s
            more = round((flood.factor - 1) * count / horizon_s * left_s)
            rng = np.random.default_rng([load.seed, i, 2])
            times = flood.from_s + arrivals(more, left_s, load.burstiness, rng)
            calls += _calls(name, times, vocab_sizes[name], load, rng)
    calls.sort(key=lambda c: c.at_s)
    numbered = (Call(n, c.tenant, c.at_s, c.prompt, c.max_new_tokens) for n, c in enumerate(calls))
    return Trace(tuple(numbered), horizon_s)


def _check_flood(flood: Flood, tenants: Mapping[str, int], horizon_s: float) -> None:
    if flood.tenant not in tenants:
        raise TrafficError(
            f"tenant {flood.tenant!r} is to flood, but there is: {', '.join(tenants)}"
        )
    if not 1 <= flood.factor < math.inf:
        raise TrafficError(f"a flood of {flood.factor!r} times the rate; give a number from 1")
    if not 0 <= flood.from_s < horizon_s:
        raise TrafficError(
            f"the flood begins at {flood.from_s} s of {horizon_s} s; give a time within"
        )


def _whole_parts(total: int, parts: np.ndarray) -> list[int]:
    """Whole numbers that sum to `total`, nearest to these shares of it (largest remainders)."""
    wanted = parts * total
    counts = np.floor(wanted).astype(int)
    for i in np.argsort(counts - wanted, kind="stable")[: total - int(counts.sum())]:
        counts[i] += 1
    return [int(n) for n in counts]


def _calls(
    tenant: str, times: np.ndarray, vocab_size: int, load: Load, rng: np.random.Generator
) -> list[Call]:
    found = []
    for at_s in times.tolist():
        prompt_len, output_len = (
            _length(mean, load.range_ratio, rng) for mean in (load.input_len, load.output_len)
        )
        low = min(FIRST_TOKEN, vocab_size - 1)
        prompt = tuple(rng.integers(low, vocab_size, size=prompt_len).tolist())
        found.append(Call(0, tenant, at_s, prompt, output_len))
    return found


def _length(mean: int, ratio: float, rng: np.random.Generator) -> int:
    low, high = max(1, math.floor(mean * (1 - ratio))), math.ceil(mean * (1 + ratio))
    return int(rng.integers(low, high + 1))
