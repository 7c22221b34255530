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

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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

logger = logging.getLogger(__name__)

# Inputs kept for each expert of a tenant, unless that takes more than so many bytes: then fewer,
# down to the least.
MOST_SAMPLES, LEAST_SAMPLES = 1024, 256
SAMPLE_BYTES = 1 << 30
# Share of the experts that have their samples when no more examples are run.
ENOUGH = 0.95


# Scored tokens that sensitivities are measured on, fewer where the experts' products take more than
# so many operations, down to the least.
SENSITIVITY_TOKENS, LEAST_SENSITIVITY_TOKENS = 2048, 256
SENSITIVITY_FLOPS = 1e13


# Bytes of experts that a tenant running alone keeps in memory: all, or those of one layer. They are
# read layer by layer, so that what is between is of no use.
SPARE_BYTES = 4 << 30
# Bytes of logits, and tokens, that are computed at once: every step reads all experts again.
LOGITS_BYTES, STEP_TOKENS = 1 << 30, 4096
# Of a KV cache where no answers are generated: rows that are scored use none.
SCORING_CACHE_BYTES = 1 << 26


class _Recorder:
    """Collects a profile from what an engine's layers show."""

    def __init__(self, spec: ExpertSpec, samples: int, seed: int):
        shape = spec.num_layers, spec.num_experts
        self.tokens = np.zeros(spec.num_layers, dtype=np.int64)
        self.counts = np.zeros(shape, dtype=np.int64)
        self.gate_squares = np.zeros(shape)
        self._samples, self._rng = samples, np.random.default_rng(seed)
        self._hidden = spec.hidden_size
        # Of each expert its rows' random keys, inputs and gates, in the order of the keys.
        self._kept: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

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
            place = layer, int(expert)
            keys, inputs = self._rng.random(len(rows)), x[rows]
            if place in self._kept:
                old_keys, old_inputs, old_gates = self._kept[place]
                keys = np.concatenate([old_keys, keys])
                inputs = np.concatenate([old_inputs, inputs])
                g = np.concatenate([old_gates, g])
            first = np.argsort(keys, kind="stable")[: self._samples]
            self._kept[place] = keys[first], inputs[first], g[first]

    @property
    def filled(self) -> float:
        """Share of the experts that have as many samples as are kept."""
        return float((self.counts >= self._samples).mean())

    def profile(self) -> Profile:
        """What was recorded, which is let go. No sensitivity is known yet."""
        starts = np.cumsum([0, *np.minimum(self.counts, self._samples).reshape(-1)])
        inputs = np.empty((starts[-1], self._hidden), dtype=np.float32)
        gates = np.empty(starts[-1], dtype=np.float32)
        for layer, expert in sorted(self._kept):
            place = layer * self.counts.shape[1] + expert
            rows = slice(starts[place], starts[place + 1])
            _, inputs[rows], gates[rows] = self._kept.pop((layer, expert))
        unknown = np.zeros(len(self.tokens))
        return Profile(self.tokens, self.counts, self.gate_squares, inputs, gates, starts, unknown)


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


def spare_slots(spec: ExpertSpec) -> int:
    """Experts that a tenant running alone keeps in memory."""
    fitting = SPARE_BYTES // (spec.copy_elements * 4)
    if fitting >= spec.num_positions:
        return spec.num_positions
    return max(spec.top_k, min(spec.num_experts, fitting))


def sensitivity_tokens(spec: ExpertSpec) -> int:
    """Tokens that the sensitivity of every layer is measured on."""
    each = 2 * spec.copy_elements * spec.top_k * spec.num_layers**2
    most = max(LEAST_SENSITIVITY_TOKENS, int(SENSITIVITY_FLOPS / each))
    return min(SENSITIVITY_TOKENS, most)


def calibrate(
    store: Store,
    sets: Mapping[str, CalibrationSet],
    *,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    keep: Callable[[str, Profile], Profile] = lambda name, profile: profile,
) -> dict[str, Profile]:
    """Measure the tenants that have examples. Needs the engine of the store's family.

    samples: inputs kept for each expert; None: `usual_samples`. Examples are run until nearly all
        experts have theirs.
    keep: called with each tenant's profile when it is measured; what it gives is returned in its
        place.

    Raises RequestError, EngineError, UnknownTenantError.
    """
    samples = usual_samples(store.experts) if samples is None else samples
    if not is_whole(samples) or samples < 1:
        raise RequestError(f"samples is {samples!r}; give a whole number from 1")
    for tenant, examples in sets.items():
        if not examples.examples:
            raise RequestError(f"calibration of {tenant!r} holds no example; give at least one")
    found: dict[str, Profile] = {}
    spec = store.experts
    options: dict[str, Any] = {"spare_slots": spare_slots(spec), "ready_tenants": 1}
    if all(e.answer is not None for examples in sets.values() for e in examples.examples):
        options["kv_cache_bytes"] = SCORING_CACHE_BYTES
    with (
        load_engine(alone(store), dtype="float32", **options) as engine,
        progress("calibrating", len(sets)) as advance,
    ):
        for tenant, examples in sets.items():
            rows = rows_of(engine, tenant, examples)
            recorder = _Recorder(spec, samples, seed)
            with observing(engine, recorder):
                for _ in iter_logits(engine, tenant, rows, LOGITS_BYTES):
                    if recorder.filled >= ENOUGH:
                        break
            logger.info(
                "tenant %r: %.0f %% of the experts have their %d samples, %.0f %% have none",
                tenant,
                100 * recorder.filled,
                samples,
                100 * (recorder.counts == 0).mean(),
            )
            profile = recorder.profile()
            sensitivity = _sensitivity(engine, store, tenant, rows)
            found[tenant] = keep(tenant, replace(profile, sensitivity=sensitivity))
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
    """Adds to layers' outputs what the experts of other tenants, in turn, would change: to each
    layer's in a run of its own of the same rows, one run behind the other in one batch."""

    def __init__(self, store: Store, tenant: str, layers: Sequence[int], tokens: np.ndarray):
        """tokens: int [layers of the model], that one run has."""
        self._store, self._layers, self._tokens = store, layers, tokens
        self._others = [name for name in store.tenants if name != tenant]
        self._tenant = tenant
        self._passed = np.zeros_like(tokens)
        self.squares = np.zeros(len(tokens))

    def _owner(self, layer: int, expert: int) -> str:
        return self._others[(layer + expert) % len(self._others)]

    def __call__(
        self, tenant: str, layer: int, x: np.ndarray, ids: np.ndarray, gates: np.ndarray
    ) -> np.ndarray | None:
        begun = int(self._passed[layer])
        self._passed[layer] += len(x)
        if layer not in self._layers:
            return None
        run = self._layers.index(layer) * int(self._tokens[layer])
        first, end = max(0, run - begun), min(len(x), run + int(self._tokens[layer]) - begun)
        if first >= end:
            return None
        change = np.zeros(x.shape, dtype=np.float32)
        spec = self._store.experts
        for expert in np.unique(ids[first:end]).tolist():
            rows, choices = np.nonzero(ids[first:end] == expert)
            rows += first
            mine, theirs = (
                forward(spec, x[rows], self._store.own_expert(name, layer, expert))
                for name in (self._tenant, self._owner(layer, expert))
            )
            np.add.at(change, rows, gates[rows, choices][:, None] * (theirs - mine))
        self.squares[layer] += float((change.astype(np.float64) ** 2).sum())
        return change


class _Counter:
    """Counts the tokens of each layer."""

    def __init__(self, num_layers: int):
        self.tokens = np.zeros(num_layers, dtype=np.int64)

    def __call__(
        self, tenant: str, layer: int, x: np.ndarray, ids: np.ndarray, gates: np.ndarray
    ) -> None:
        self.tokens[layer] += len(x)


def _sensitivity(
    engine: Engine, store: Store, tenant: str, rows: Sequence[ScoredRow]
) -> np.ndarray:
    """float64 [layers]. 0 where other tenants' experts change nothing."""
    spec = store.experts
    found = np.zeros(spec.num_layers)
    if len(store.tenants) < 2:
        return found
    chosen, count, enough = [], 0, sensitivity_tokens(spec)
    for row in rows:
        chosen.append(row)
        count += len(row.prompt) + len(row.answer)
        if count >= enough:
            break
    counter = _Counter(spec.num_layers)
    with observing(engine, counter):
        own = list(iter_logits(engine, tenant, chosen, LOGITS_BYTES))
    # As many layers at once as fill a step, as every step reads the tenant's experts again. An
    # encoder-decoder is compiled for a batch's shape, and is small.
    at_once = 1 if store.config(tenant).is_encoder_decoder else max(1, STEP_TOKENS // count)
    for first in range(0, spec.num_layers, at_once):
        layers = list(range(first, min(first + at_once, spec.num_layers)))
        swap = _Swap(store, tenant, layers, counter.tokens)
        total: list[list[np.ndarray]] = [[] for _ in layers]
        with observing(engine, swap):
            served = iter_logits(engine, tenant, chosen * len(layers), LOGITS_BYTES)
            for i, values in enumerate(served):
                run, row_number = divmod(i, len(chosen))
                total[run].append(divergence(own[row_number], values))
        for layer, of_layer in zip(layers, total, strict=True):
            if swap.squares[layer] > 0:
                squares = swap.squares[layer] / max(1, counter.tokens[layer])
                found[layer] = float(np.concatenate(of_layer).mean()) / squares
    return found
