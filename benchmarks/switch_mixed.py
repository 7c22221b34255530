"""Decoding for several tenants in one batch beside one tenant with all its rows: one store, in
turn, in one process.

A base and its fine-tunes share one copy a position (their experts are equal, so that the store is
built soon). What is not an expert each tenant has of its own, and a step reads it for every tenant
that is in it; so the bytes that a step must read, over the memory's rate, are the floor of each
side, and bound how near the mixed batch can come. Next tokens are random ids, the same for both
sides.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    Report,
    Spread,
    add_output,
    machine,
    memory_bandwidth,
    peak_rss_gib,
    ratios,
    write_output,
)
from benchmarks.switch_shape import (
    SwitchShape,
    add_switch_shape,
    switch_shape_of,
    write_random_switch,
)
from common import build_store
from common.dtypes import BY_NAME
from common.serving.backend import Backend, Row
from jax_engine import load_backend


class Side:
    """Rows of some tenants that answer together. They begin anew for each measurement: a backend
    keeps rows of one tenant in the same arrays, so those of the other side must be gone."""

    def __init__(self, backend: Backend, names: Sequence[str], prompts: np.ndarray):
        self.backend, self.tenants = backend, len(set(names))
        self.rows = [
            Row(n, tuple(p.tolist()), 1 << 20) for n, p in zip(names, prompts, strict=True)
        ]

    def steps(self, forced: np.ndarray) -> float:
        """Seconds of a step, the mean over int64 [steps, rows]; reading the prompts, and one step
        more, come before."""
        batch = self.backend.start(self.rows)
        batch.prefill(want_logits=False)
        batch.decode(forced[0], want_logits=False)
        begun = time.perf_counter()
        for ids in forced:
            batch.decode(ids, want_logits=False)
        seconds = (time.perf_counter() - begun) / len(forced)
        batch.close()
        return seconds

    def experts_hit(self, forced: np.ndarray) -> float:
        """Different experts a layer and step, all tenants together; not timed."""
        counts: list[int] = []
        seen: dict[int, set[int]] = defaultdict(set)

        def look(
            tenant: str, layer: int, x: np.ndarray, expert_ids: np.ndarray, gates: np.ndarray
        ) -> None:
            seen[layer] |= set(expert_ids[:, 0].tolist())

        batch = self.backend.start(self.rows)
        batch.prefill(want_logits=False)
        self.backend.observe(look)
        for ids in forced:
            seen.clear()
            batch.decode(ids, want_logits=False)
            counts += map(len, seen.values())
        self.backend.observe(None)
        batch.close()
        return float(np.mean(counts))


def measure(args: argparse.Namespace, shape: SwitchShape, report: Report) -> None:
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        paths = {}
        for i in range(args.tenants):
            path = Path(scratch) / f"tenant{i}"
            paths[path.name] = write_random_switch(
                path, shape, args.dtype, seed=i, moved=0.1 * (i > 0), frozen_experts=True
            )
        store = build_store(Path(scratch) / "store", paths, policy="round_robin")
        backend = load_backend(store, device="cpu", products=args.products)
        compare(args, shape, report, backend, store.tenants)
        backend.close()


def compare(
    args: argparse.Namespace,
    shape: SwitchShape,
    report: Report,
    backend: Backend,
    names: Sequence[str],
) -> None:
    import jax

    rng = np.random.default_rng(0)

    def ids(*size: int) -> np.ndarray:
        return rng.integers(3, shape.vocab_size, size=size)

    stats = backend.stats()
    report.note(machine() + f", jax {jax.__version__}")
    report.note(
        f"{shape}, {args.dtype}; experts {stats['experts']}, products {stats['products']}; "
        f"{args.rows} rows"
    )
    bandwidth = memory_bandwidth(args.bandwidth_bytes)
    report.note(f"memory read {bandwidth / 1e9:.1f} GB/s, of torch in this run")
    prompts = ids(args.rows, args.prompt)
    each = [names[i * len(names) // args.rows] for i in range(args.rows)]
    sides = {
        f"1 tenant x {args.rows}": Side(backend, [names[0]] * args.rows, prompts),
        f"{len(names)} tenants": Side(backend, each, prompts),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(args.repeats + 1):
        forced = ids(args.steps, args.rows)
        for name, side in sides.items():
            seconds = side.steps(forced)
            if repeat:  # the first round compiles and warms up
                times[name].append(seconds)
    floors, hits = {}, {}
    forced = ids(args.steps, args.rows)
    for name, side in sides.items():
        hits[name] = side.experts_hit(forced)
        weights = (
            side.tenants * shape.step_weights(0)
            + shape.step_weights(hits[name])
            - shape.step_weights(0)
        )
        floors[name] = weights * BY_NAME[args.dtype].itemsize / bandwidth
    (one, several) = sides
    for name in sides:
        report.add(
            **{
                "what": name,
                "tokens/s": Spread.of([args.rows / t for t in times[name]]),
                "step, ms": Spread.of(times[name]).scaled(1e3),
                "floor, ms": f"{floors[name] * 1e3:.3g}",
                "step / floor": f"{Spread.of(times[name]).median / floors[name]:.2f}",
                "experts hit": f"{hits[name]:.2f}",
                "throughput beside one tenant": ratios(times[one], times[name]),
                "of the floors": f"{floors[one] / floors[name]:.2f}",
            }
        )
    report.note(
        f"{several}: {ratios(times[one], times[several]).median:.2f} of one tenant's throughput; "
        "the bytes allow "
        f"{floors[one] / floors[several]:.2f}"
    )
    report.note(f"peak memory of the process: {peak_rss_gib():.2f} GiB")


COLUMNS = (
    "what",
    "tokens/s",
    "step, ms",
    "floor, ms",
    "step / floor",
    "experts hit",
    "throughput beside one tenant",
    "of the floors",
)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_switch_shape(parser)
    add_output(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--products", choices=("auto", "native", "plain"), default="auto")
    parser.add_argument("--tenants", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16, help="of a batch, shared among the tenants")
    parser.add_argument("--prompt", type=int, default=32, help="tokens before decoding")
    parser.add_argument("--steps", type=int, default=6, help="of a measurement")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--scratch", help="folder for checkpoints and store (two models for each tenant)"
    )
    parser.add_argument("--bandwidth-bytes", type=int, default=1 << 30)
    args = parser.parse_args(argv)
    report = Report("Switch Transformer: several tenants in a batch beside one", COLUMNS)
    measure(args, switch_shape_of(args), report)
    write_output(args, [report], "Switch Transformer, mixed batches")
    return report.rows


if __name__ == "__main__":
    main()
