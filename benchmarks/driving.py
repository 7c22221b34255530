"""An engine's backend driven row by row, without sampling or text: what times are taken of."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.common import Clock, Report, matmul_rate, memory_bandwidth
from common import Engine, Store, load_engine
from common.serving.backend import Backend, Row

NEW_TOKENS = 64  # what caches are told to expect


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Where and how the engine runs, and from what its floors are measured."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--products", choices=("auto", "native", "plain"), default="auto")
    parser.add_argument("--threads", type=int, help="torch's; default: its own choice")
    parser.add_argument("--scratch", help="folder for random checkpoints and their stores")
    parser.add_argument("--bandwidth-bytes", type=int, default=1 << 30, help="of the plain read")
    parser.add_argument("--product-size", type=int, default=2048, help="of the square product")


def open_engine(store: Store, args: argparse.Namespace, **options: Any) -> Engine:
    """The engine that is asked for."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return load_engine(store, device=args.device, products=args.products, **options)


def rates(args: argparse.Namespace, report: Report, clock: Clock = time.perf_counter) -> Rates:
    """What the device can do, measured now."""
    # Sums of the encoder-decoder are float32 whatever its weights are.
    dtype = torch.float32 if args.family == "switch" else getattr(torch, args.dtype)
    found = Rates(
        memory_bandwidth(args.bandwidth_bytes, clock=clock, device=args.device),
        matmul_rate(dtype, args.product_size, clock, args.device),
    )
    report.note(
        f"memory read {found.bandwidth / 1e9:.1f} GB/s, {dtype} matrix product "
        f"{found.peak / 1e9:.0f} GFLOP/s, both of torch in this run"
    )
    return found


@dataclass(frozen=True)
class Rates:
    """bandwidth: bytes a second of a plain read. peak: operations a second of a large product."""

    bandwidth: float
    peak: float


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
        self.batch = self.backend.start(self._rows)
        self.batch.prefill(want_logits=False)

    def step(self, ids: np.ndarray) -> None:
        self.batch.decode(ids, want_logits=False)

    def stop(self) -> None:
        self.batch.close()

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
