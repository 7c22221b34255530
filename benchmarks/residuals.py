"""What residuals cost: layers of experts and whole decode steps with and without them, in turn, in
one process.

Tenants share one copy of every position; each adds a residual of its own to every expert: one sign
bit a weight with a scale a row; low rank in 4-bit codes, of about 3 % of an expert's bytes; or
both. The weights are one and the same on
every side, only the residuals are exchanged. `layer`: the experts of one layer, the mean over all
layers, with random
routing. `step`: a whole decode step with forced tokens. `prompt`: until the first token.

The floor is the bytes that must be read (experts hit, residuals hit; for steps and prompts also
attention and head) over the rate of a plain read in the same run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import (
    Report,
    Shape,
    Spread,
    add_output,
    add_shape,
    machine,
    memory_bandwidth,
    ratios,
    seconds,
    shape_of,
    write_output,
    write_random,
)
from common import build_store, load_engine
from common.plan.residual import (
    LOW_RANK,
    SIGN,
    Part,
    Residual,
    join_parts,
    pack_low_rank,
    pack_sign,
)
from common.serving.backend import Row
from common.store import Store
from common.store.change import set_plan
from torch_engine.backend import TorchBackend
from torch_engine.experts.pool import PoolPlan
from torch_engine.experts.residuals import HeldResiduals
from torch_engine.experts.routing import TokenTenants

KINDS = ("sign", "low rank", "both")
COLUMNS = (
    "what",
    "tenants",
    "residuals",
    "without, ms",
    "with, ms",
    "with / without",
    "floor without, ms",
    "floor with, ms",
    "without / floor",
    "with / floor",
)


def parts_of(
    kind: str, shapes: dict[str, tuple[int, ...]], itemsize: int, share: float
) -> tuple[Part, ...]:
    """A residual's parts. share: of an expert's bytes, for low rank in 4 bits."""
    parts = []
    for projection, (outputs, inputs) in shapes.items():
        if kind in ("sign", "both"):
            parts.append(Part(projection, SIGN, 1, 1))
        if kind in ("low rank", "both"):
            rank = round(share * outputs * inputs * itemsize / ((outputs + inputs) / 2))
            parts.append(Part(projection, LOW_RANK, 4, max(1, rank)))
    return tuple(parts)


def random_record(parts: tuple[Part, ...], shapes: dict[str, tuple[int, ...]]) -> np.ndarray:
    """uint8 [bytes]. Entries are small beside the weights', whose standard deviation is 0.02."""
    rng = np.random.default_rng(0)
    packed = []
    for part in parts:
        outputs, inputs = shapes[part.projection]
        if part.kind == SIGN:
            scale = np.full(-(-outputs // part.size), 1e-4, dtype=np.float32)
            packed.append(pack_sign(scale, rng.random((outputs, inputs)) < 0.5, part.size))
        else:
            v, u = (rng.integers(0, 16, size=(part.size, n)) for n in (inputs, outputs))
            packed.append(
                pack_low_rank(np.full(part.size, 1e-6, dtype=np.float32), v, u, part.bits)
            )
    return join_parts(packed)


def with_kind(store: Store, kind: str, share: float) -> Store:
    """The store with residuals of one kind for every tenant at every position. One record on disk
    serves all."""
    shapes = dict(store.experts.projections)
    parts = parts_of(kind, shapes, store.copy_bytes // store.experts.copy_elements, share)
    residuals = tuple(Residual(*place, parts) for place in np.ndindex(store.plan.serving.shape))
    record = random_record(parts, shapes)
    return set_plan(
        store.path, replace(store.plan, residuals=residuals), records=[record] * len(residuals)
    )


@dataclass(frozen=True)
class Hits:
    """Different experts, and different pairs of tenant and expert, that a layer's call hits:
    means."""

    experts: float
    pairs: float

    @classmethod
    def of(cls, calls: list[list[tuple[str, np.ndarray]]]) -> Hits:
        """calls: of each layer's call, the tenants and their tokens' experts."""
        experts = [
            len(np.unique(np.concatenate([ids.reshape(-1) for _, ids in call]))) for call in calls
        ]
        pairs = [sum(len(np.unique(ids)) for _, ids in call) for call in calls]
        return cls(float(np.mean(experts)), float(np.mean(pairs)))


class Counter:
    """An observer that counts hits, in a run that is not timed."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, np.ndarray]]] = []
        self._layer = -1

    def __call__(
        self, tenant: str, layer: int, x: np.ndarray, expert_ids: np.ndarray, gates: np.ndarray
    ) -> np.ndarray | None:
        if layer != self._layer or any(name == tenant for name, _ in self.calls[-1]):
            self.calls.append([])
            self._layer = layer
        self.calls[-1].append((tenant, expert_ids))
        return None


class Bench:
    """One engine whose residuals are exchanged between measurements."""

    def __init__(
        self,
        backend: TorchBackend,
        shape: Shape,
        residuals: dict[str, HeldResiduals],
        repeats: int,
    ):
        self.backend, self.shape, self.residuals, self.repeats = backend, shape, residuals, repeats
        self.rng = np.random.default_rng(0)

    def ids(self, *size: int) -> np.ndarray:
        return self.rng.integers(3, self.shape.vocab_size, size=size)

    def in_turn(self, call: Callable[[], float]) -> dict[str, list[float]]:
        """Seconds that `call` gives on each side; the first round warms up."""
        times: dict[str, list[float]] = {kind: [] for kind in self.residuals}
        for repeat in range(self.repeats + 1):
            for kind, found in self.residuals.items():
                self.backend.pool.residuals = found
                took = call()
                if repeat:
                    times[kind].append(took)
        return times

    def layer(self, tokens: int, num_tenants: int) -> tuple[dict[str, list[float]], Hits]:
        """A layer's experts, the mean over all layers."""
        layers, top_k = self.shape.num_hidden_layers, self.shape.num_experts_per_tok
        tenant_ids = np.sort(np.arange(tokens, dtype=np.int64) % num_tenants)
        tenants = TokenTenants(tenant_ids, 0 if num_tenants == 1 else None)
        x = torch.randn(tokens, self.shape.hidden_size).to(self.backend.dtype)
        gates = torch.full((tokens, top_k), 1 / top_k)
        picks = (
            self.rng.random((layers, tokens, self.shape.num_local_experts))
            .argsort(axis=-1)[..., :top_k]
            .copy()
        )
        misses = np.zeros(tokens, dtype=np.int64)

        @torch.inference_mode()
        def call() -> float:
            routed = [torch.from_numpy(p) for p in picks]
            return (
                seconds(
                    lambda: [
                        self.backend.pool.forward(i, x, r, gates, tenants, misses)
                        for i, r in enumerate(routed)
                    ]
                )
                / layers
            )

        calls = [[(str(t), p[tenant_ids == t]) for t in range(num_tenants)] for p in picks]
        return self.in_turn(call), Hits.of(calls)

    def step(
        self, batch: int, num_tenants: int, prompt: int, steps: int
    ) -> tuple[dict[str, list[float]], Hits]:
        """A decode step, the mean over some; with no steps, a prompt until its first token."""
        names = [
            self.backend.store.tenants[i] for i in sorted(i % num_tenants for i in range(batch))
        ]
        prompts, forced = self.ids(batch, prompt), self.ids(max(steps, 1), batch)

        def call() -> float:
            begun = time.perf_counter()
            made = self.backend.start(
                [Row(n, tuple(p.tolist()), 1) for n, p in zip(names, prompts, strict=True)]
            )
            made.prefill(want_logits=False)
            if steps:
                begun = time.perf_counter()
                for ids in forced:
                    made.decode(ids, want_logits=False)
            took = time.perf_counter() - begun
            made.close()
            return took / max(steps, 1)

        counter = Counter()
        self.backend.observe(counter)
        call()
        self.backend.observe(None)
        return self.in_turn(call), Hits.of(
            counter.calls[self.shape.num_hidden_layers if steps else 0 :]
        )


def measure(args: argparse.Namespace, shape: Shape, report: Report) -> None:
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        checkpoint = write_random(Path(scratch) / "checkpoint", shape, dtype)
        tenants = {f"tenant{i}": checkpoint for i in range(args.tenants)}
        store = build_store(Path(scratch) / "store", tenants, policy="round_robin")
        with load_engine(store, device="cpu", products=args.products) as engine:
            backend = engine._require_backend()
            assert isinstance(backend, TorchBackend)
            sides = {"none": backend.pool.residuals}
            report.note(machine())
            report.note(
                f"{shape}, {args.dtype}, products {backend.products}, {args.tenants} tenants"
            )
            for kind in KINDS:
                changed = with_kind(store, kind, args.low_rank_share)
                sides[kind] = backend.pool.make_residuals(PoolPlan(changed))
                (parts,) = {r.parts for r in changed.plan.residuals}
                each = changed.plan.residuals[0].nbytes(dict(store.experts.projections))
                report.note(
                    f"{kind}: {each / store.copy_bytes:.2%} of an expert's bytes; "
                    f"{sides[kind].nbytes / 1e6:.0f} MB "
                    "for all tenants; "
                    f"{', '.join(f'{p.projection} {p.kind} {p.bits} bits {p.size}' for p in parts)}"
                )
            bandwidth = memory_bandwidth(args.bandwidth_bytes)
            report.note(f"memory read {bandwidth / 1e9:.1f} GB/s, torch's best in this run")
            cells(args, shape, report, Bench(backend, shape, sides, args.repeats), store, bandwidth)


def cells(
    args: argparse.Namespace,
    shape: Shape,
    report: Report,
    bench: Bench,
    store: Store,
    bandwidth: float,
) -> None:
    shapes = dict(store.experts.projections)
    itemsize = store.copy_bytes // store.experts.copy_elements
    plans = [
        (batch, tenants)
        for batch in args.batch
        for tenants in sorted({1, min(batch, args.tenants)})
    ]
    runs: list[tuple[str, int, bool, Callable[[], tuple[dict[str, list[float]], Hits]]]] = []
    runs += [(f"layer, {b} rows", t, False, partial(bench.layer, b, t)) for b, t in plans]
    runs += [(f"layer, {n} rows", 1, False, partial(bench.layer, n, 1)) for n in args.prompts]
    runs += [
        (f"step, batch {b}", t, True, partial(bench.step, b, t, 8, args.steps)) for b, t in plans
    ]
    runs += [
        (f"prompt, {n} tokens", 1, True, partial(bench.step, 1, 1, n, 0)) for n in args.prompts
    ]
    for what, tenants, whole, run in runs:
        times, hits = run()
        layers = shape.num_hidden_layers if whole else 1
        weights = shape.step_weights(hits.experts) if whole else hits.experts * shape.expert_weights
        read = weights * itemsize
        without = Spread.of(times["none"]).scaled(1e3)
        for kind in KINDS:
            each = Residual(0, 0, 0, parts_of(kind, shapes, itemsize, args.low_rank_share)).nbytes(
                shapes
            )
            more = layers * hits.pairs * each
            found = Spread.of(times[kind]).scaled(1e3)
            floor, floor_with = read / bandwidth * 1e3, (read + more) / bandwidth * 1e3
            report.add(
                **{
                    "what": what,
                    "tenants": tenants,
                    "residuals": kind,
                    "without, ms": without,
                    "with, ms": found,
                    "with / without": ratios(times[kind], times["none"]),
                    "floor without, ms": f"{floor:.3g}",
                    "floor with, ms": f"{floor_with:.3g}",
                    "without / floor": f"{without.median / floor:.2f}",
                    "with / floor": f"{found.median / floor_with:.2f}",
                }
            )


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    # Six layers of the 'mini': far more than the caches hold, in a minute's writing.
    add_shape(parser, Shape(num_hidden_layers=6))
    add_output(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--products", choices=("auto", "native", "plain"), default="auto")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--tenants", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--prompts", type=int, nargs="*", default=[128])
    parser.add_argument("--steps", type=int, default=10, help="decode steps a measurement")
    parser.add_argument("--low-rank-share", type=float, default=0.03, help="of an expert's bytes")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--scratch", help="folder for the random checkpoint and its store (two times its size)"
    )
    parser.add_argument("--bandwidth-bytes", type=int, default=1 << 30)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    report = Report("Residuals on a CPU: with and without", COLUMNS)
    measure(args, shape_of(args), report)
    write_output(args, [report], "Residuals on a CPU")
    return report.rows


if __name__ == "__main__":
    main()
