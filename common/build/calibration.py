"""What a tenant's experts see and what changing them does, measured on a few of its prompts.

A tenant runs alone, with all its own experts, on its calibration examples. From the routing of
every layer come
- how often each expert is picked, and the sum of its squared gates;
- a sample of the inputs of each expert, with their gates: on these, other experts are compared with
  the tenant's own;
- sensitivity: how much a squared error in a layer's output, of the kind that other tenants' experts
  make there, moves the tenant's next-token distribution (Kullback-Leibler divergence a unit of
  squared error).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from common.build.examples import CalibrationSet
from common.build.scoring import ScoredRow, divergence, iter_logits, rows_of
from common.errors import RequestError
from common.families import ExpertSpec
from common.plan.expert_math import forward
from common.plan.plan import MISS, Plan
from common.plan.profile import Profile
from common.progress import Progress, silent
from common.serving.engine import Engine
from common.serving.loading import load_engine
from common.store.store import Store
from common.units import is_whole

# Inputs kept for each expert of a tenant, unless that takes more than so many bytes: then fewer,
# down to the least.
MOST_SAMPLES, LEAST_SAMPLES = 1024, 256


SAMPLE_BYTES = 1 << 30


# Scored tokens that sensitivities are measured on.
SENSITIVITY_TOKENS = 2048


# Bytes of experts that a tenant running alone keeps in memory; what does not fit is read again when
# it is needed.
SPARE_BYTES = 4 << 30


class _Recorder:
    """Collects a profile from what an engine's layers show."""

    def __init__(self, num_layers: int, num_experts: int, hidden: int, samples: int, seed: int):
        self.tokens = np.zeros(num_layers, dtype=np.int64)
        self.counts = np.zeros((num_layers, num_experts), dtype=np.int64)
        self.gate_squares = np.zeros((num_layers, num_experts))
        self._samples, self._rng = samples, np.random.default_rng(seed)
        self._kept: dict[tuple[int, int], list[tuple[float, np.ndarray, float]]] = {}
        self._hidden = hidden

    def __call__(
        self, tenant: str, layer: int, x: np.ndarray, ids: np.ndarray, gates: np.ndarray
    ) -> None:
        self.tokens[layer] += len(x)
        for expert in np.unique(ids):
            rows, choices = np.nonzero(ids == expert)
            g = gates[rows, choices].astype(np.float64)
            self.counts[layer, expert] += len(rows)
            self.gate_squares[layer, expert] += float((g * g).sum())
            # A uniform sample: the rows with the smallest of random keys.
            kept = self._kept.setdefault((layer, int(expert)), [])
            kept += [
                (float(k), x[r].copy(), float(w))
                for k, r, w in zip(self._rng.random(len(rows)), rows, g, strict=True)
            ]
            if len(kept) > 2 * self._samples:
                kept.sort(key=lambda row: row[0])
                del kept[self._samples :]

    def arrays(self) -> dict[str, np.ndarray]:
        starts, inputs, gates = [0], [], []
        for layer in range(self.counts.shape[0]):
            for expert in range(self.counts.shape[1]):
                kept = sorted(self._kept.get((layer, expert), []), key=lambda row: row[0])[
                    : self._samples
                ]
                inputs += [row[1] for row in kept]
                gates += [row[2] for row in kept]
                starts.append(len(inputs))
        return {
            "inputs": np.array(inputs, dtype=np.float32).reshape(-1, self._hidden),
            "gates": np.array(gates, dtype=np.float32),
            "starts": np.array(starts, dtype=np.int64),
        }


def alone(store: Store) -> Store:
    """The store with no resident copy: every tenant computes with its own experts, read when they
    are needed."""
    spec = store.experts
    serving = np.full((len(store.tenants), spec.num_layers, spec.num_experts), MISS, dtype=np.int32)
    plan = Plan("alone", store.tenants, spec.num_layers, spec.num_experts, (), serving)
    return store.with_plan(plan)


def usual_samples(spec: ExpertSpec) -> int:
    """Inputs kept for each expert of a tenant: as many as are of use to fits, or as `SAMPLE_BYTES`
    hold."""
    fitting = SAMPLE_BYTES // (4 * spec.hidden_size * spec.num_positions)
    return max(LEAST_SAMPLES, min(MOST_SAMPLES, fitting))


def calibrate(
    store: Store,
    sets: Mapping[str, CalibrationSet],
    *,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Profile]:
    """Measure the tenants that have examples. Needs the engine of the store's family.

    samples: inputs kept for each expert; None: `usual_samples`. Raises RequestError, EngineError,
        UnknownTenantError.
    """
    samples = usual_samples(store.experts) if samples is None else samples
    if not is_whole(samples) or samples < 1:
        raise RequestError(f"samples is {samples!r}; give a whole number from 1")
    for tenant, examples in sets.items():
        if not examples.examples:
            raise RequestError(f"calibration of {tenant!r} holds no example; give at least one")
    found: dict[str, Profile] = {}
    spec = store.experts
    spare = max(spec.top_k, min(spec.num_positions, SPARE_BYTES // (spec.copy_elements * 4)))
    with (
        load_engine(alone(store), dtype="float32", spare_slots=spare) as engine,
        progress("calibrating", len(sets)) as advance,
    ):
        for tenant, examples in sets.items():
            rows = rows_of(engine, tenant, examples)
            recorder = _Recorder(spec.num_layers, spec.num_experts, spec.hidden_size, samples, seed)
            with observing(engine, recorder):
                for _ in iter_logits(engine, tenant, rows):
                    pass
            sensitivity = _sensitivity(engine, store, tenant, rows)
            found[tenant] = Profile(
                recorder.tokens,
                recorder.counts,
                recorder.gate_squares,
                **recorder.arrays(),
                sensitivity=sensitivity,
            )
            advance()
    return found


@contextmanager
def observing(engine: Engine, observer: Any) -> Iterator[None]:
    """Show routing to `observer` inside the block."""
    engine.observe(observer)
    try:
        yield
    finally:
        engine.observe(None)


class _Swap:
    """Adds to one layer's output what the experts of other tenants, in turn, would change."""

    def __init__(self, store: Store, tenant: str, layer: int):
        self._store, self._layer = store, layer
        others = [name for name in store.tenants if name != tenant]
        self._owner = {
            e: others[(layer + e) % len(others)] for e in range(store.experts.num_experts)
        }
        self._tenant = tenant
        self._weights: dict[tuple[str, int], dict[str, np.ndarray]] = {}
        self.squares, self.tokens = 0.0, 0

    def _expert(self, tenant: str, expert: int) -> dict[str, np.ndarray]:
        if (tenant, expert) not in self._weights:
            self._weights[tenant, expert] = self._store.own_expert(tenant, self._layer, expert)
        return self._weights[tenant, expert]

    def __call__(
        self, tenant: str, layer: int, x: np.ndarray, ids: np.ndarray, gates: np.ndarray
    ) -> np.ndarray | None:
        if layer != self._layer:
            return None
        change = np.zeros(x.shape, dtype=np.float32)
        for expert in np.unique(ids):
            rows, choices = np.nonzero(ids == expert)
            mine, theirs = (
                self._expert(t, int(expert)) for t in (self._tenant, self._owner[int(expert)])
            )
            spec = self._store.experts
            difference = forward(spec, x[rows], theirs) - forward(spec, x[rows], mine)
            np.add.at(change, rows, gates[rows, choices][:, None] * difference)
        self.squares += float((change.astype(np.float64) ** 2).sum())
        self.tokens += len(x)
        return change


def _sensitivity(
    engine: Engine, store: Store, tenant: str, rows: Sequence[ScoredRow]
) -> np.ndarray:
    """float64 [layers]. 0 where other tenants' experts change nothing."""
    found = np.zeros(store.experts.num_layers)
    if len(store.tenants) < 2:
        return found
    chosen, count = [], 0
    for row in rows:
        chosen.append(row)
        count += len(row.prompt) + len(row.answer)
        if count >= SENSITIVITY_TOKENS:
            break
    own = list(iter_logits(engine, tenant, chosen))
    for layer in range(len(found)):
        swap = _Swap(store, tenant, layer)
        with observing(engine, swap):
            served = iter_logits(engine, tenant, chosen)
            total = [divergence(a, b) for a, b in zip(own, served, strict=True)]
        if swap.squares > 0:
            found[layer] = float(np.concatenate(total).mean()) / (
                swap.squares / max(1, swap.tokens)
            )
    return found
