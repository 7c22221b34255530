"""An engine's backend driven row by row, without sampling or text: what times are taken of."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.common import Clock
from common.serving.backend import Backend, Row

NEW_TOKENS = 64  # what caches are told to expect


class Driven(Protocol):
    """One side of a comparison."""

    def start(self) -> None:
        """Read the prompts, until the first token of each."""

    def step(self, ids: np.ndarray) -> None:
        """A decode step in which these tokens, int64 [rows], follow."""

    def stop(self) -> None: ...


class Ours:
    """Rows of some tenants, those of a tenant adjacent. prompts: int64 [rows, tokens]."""

    def __init__(
        self,
        backend: Backend,
        tenants: Sequence[str],
        prompts: np.ndarray,
        new_tokens: int = NEW_TOKENS,
    ):
        self.backend, self.num_tenants = backend, len(tenants)
        names = [tenants[i * len(tenants) // len(prompts)] for i in range(len(prompts))]
        self._rows = [
            Row(name, tuple(p.tolist()), new_tokens) for name, p in zip(names, prompts, strict=True)
        ]

    def start(self) -> None:
        self._batch = self.backend.start(self._rows)
        self._batch.prefill(want_logits=False)

    def step(self, ids: np.ndarray) -> None:
        self._batch.decode(ids, want_logits=False)

    def stop(self) -> None:
        self._batch.close()

    def experts_hit(self, steps: np.ndarray) -> tuple[float, float, float]:
        """Means over layers and steps, not timed. steps: int64 [steps, rows].

        Returns different experts, different pairs of tenant and expert, and different experts of
        the prompts.
        """
        seen: dict[int, list[tuple[str, np.ndarray]]] = defaultdict(list)
        calls: list[list[tuple[str, np.ndarray]]] = []

        def look(
            tenant: str, layer: int, x: np.ndarray, expert_ids: np.ndarray, gates: np.ndarray
        ) -> None:
            seen[layer].append((tenant, expert_ids.reshape(-1)))

        self.backend.observe(look)
        self.start()
        prompt = [len(np.unique(np.concatenate([i for _, i in c]))) for c in seen.values()]
        for ids in steps:
            seen.clear()
            self.step(ids)
            calls += seen.values()
        self.backend.observe(None)
        self.stop()
        experts = [len(np.unique(np.concatenate([ids for _, ids in call]))) for call in calls]
        pairs = [len({(t, int(i)) for t, ids in call for i in ids}) for call in calls]
        if not calls:
            return 0.0, 0.0, float(np.mean(prompt))
        return float(np.mean(experts)), float(np.mean(pairs)), float(np.mean(prompt))


def timed(side: Driven, steps: np.ndarray, clock: Clock = time.perf_counter) -> tuple[float, float]:
    """Seconds until the first token, and of a later step (mean). steps: int64 [steps, rows].

    The clock is read when the device is idle.
    """
    begun = idle(clock)
    side.start()
    first = idle(clock)
    for ids in steps:
        side.step(ids)
    last = idle(clock)
    side.stop()
    return first - begun, (last - first) / max(1, len(steps))


def idle(clock: Clock) -> float:
    """The time when CUDA devices, if there are any, have done all that they were given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()


def in_turn(
    sides: dict[str, Any], repeats: int, measure: Callable[[Any], float]
) -> dict[str, list[float]]:
    """Seconds of each side, one after the other; a first round warms up, and compiles."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        # Neither always follows the other.
        for name in list(sides) if repeat % 2 else list(sides)[::-1]:
            took = measure(sides[name])
            if repeat:
                times[name].append(took)
    return times
