"""What does a batch of several tenants cost beside as many rows of one?

All tenants of one store share one copy of each expert. What is not an expert each has of its own,
and a step reads it for every tenant that is in it. So the bytes that a step must read, over the
memory's rate, are each side's floor, and the ratio of the floors bounds how near the mixed batch
can come. Next tokens are random ids, the same for both sides, which take turns.

    python -m benchmarks.mixed_tenants --equal lm_head embed_tokens

Tenants then have those tensors equal, as adapters of attention leave them, and a step reads them
once for all.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import (
    Report,
    Spread,
    add_output,
    machine,
    peak_rss_gib,
    ratios,
    write_output,
)
from benchmarks.driving import Ours, add_engine, in_turn, open_engine, rates, timed
from benchmarks.material.random_models import write_random
from benchmarks.material.shape import Shape, add_model, shape_of
from common import build_store
from common.serving.backend import Backend

COLUMNS = (
    "batch",
    "tenants",
    "tokens/s",
    "step, ms",
    "of one tenant's rate",
    "experts hit",
    "read a step, MB",
    "floor, ms",
    "step / floor",
    "floor of one tenant / floor",
)


def step_bytes(
    shape: Shape, experts_hit: float, num_tenants: int, itemsize: int, equal: Sequence[str] = ()
) -> float:
    """What a step must read: the experts that are hit once, everything else once a tenant, but for
    tensors whose names hold one of `equal`; embeddings aside."""
    own = shape.step_weights(0) - shape.step_weights_of(equal)
    return (shape.step_weights(experts_hit) + (num_tenants - 1) * own) * itemsize


def compare(
    report: Report,
    shape: Shape,
    backend: Backend,
    tenants: Sequence[str],
    rows: int,
    bandwidth: float,
    *,
    steps: int,
    repeats: int,
    prompt: int,
    itemsize: int,
    equal: Sequence[str] = (),
) -> None:
    """A row of the report for one tenant, and one for all of them."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, shape.vocab_size, size=(rows, prompt))
    forced = rng.integers(3, shape.vocab_size, size=(steps, rows))
    sides = {
        "one": Ours(backend, tenants[:1], prompts, steps + 1),
        "all": Ours(backend, tenants, prompts, steps + 1),
    }
    measure = partial(timed, steps=forced)
    times = in_turn(sides, repeats, lambda side: measure(side)[1])
    floors: list[float] = []
    for name, side in sides.items():
        hit, _, _ = side.experts_hit(forced[:4])
        read = step_bytes(shape, hit, side.num_tenants, itemsize, equal)
        floors.append(read / bandwidth)
        spread = Spread.of(times[name])
        report.add(
            **{
                "batch": rows,
                "tenants": side.num_tenants,
                "tokens/s": Spread.of([rows / t for t in times[name]]),
                "step, ms": spread.scaled(1e3),
                "of one tenant's rate": ratios(times["one"], times[name]),
                "experts hit": f"{hit:.2f}",
                "read a step, MB": f"{read / 1e6:.0f}",
                "floor, ms": f"{floors[-1] * 1e3:.3g}",
                "step / floor": f"{spread.median / floors[-1]:.2f}",
                "floor of one tenant / floor": f"{floors[0] / floors[-1]:.3f}",
            }
        )


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model(parser)
    add_output(parser)
    add_engine(parser)
    parser.add_argument("--tenants", type=int, default=4, help="at least 2")
    parser.add_argument(
        "--equal", nargs="*", default=[], metavar="PART", help="tensors that all tenants have equal"
    )
    parser.add_argument(
        "--batch", type=int, nargs="*", default=[16], help="rows; multiples of --tenants"
    )
    parser.add_argument("--steps", type=int, default=6, help="of a measurement")
    parser.add_argument("--repeats", type=int, default=9, help="measurements of each side")
    parser.add_argument("--prompt", type=int, default=20, help="tokens before decoding")
    args = parser.parse_args(argv)
    if args.tenants < 2 or any(rows % args.tenants for rows in args.batch):
        parser.error("give at least 2 tenants, and batches that are multiples of their number")
    shape = shape_of(args)
    report = Report("Several tenants in one batch beside one tenant", COLUMNS)
    report.note(machine())
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        paths = {
            f"tenant{i}": write_random(
                # Experts are equal, so that the store is built soon.
                Path(scratch) / f"tenant{i}",
                shape.config,
                args.dtype,
                i,
                equal=(".experts.", *args.equal),
            )
            for i in range(args.tenants)
        }
        store = build_store(Path(scratch) / "store", paths, policy="round_robin")
        with open_engine(store, args) as engine:
            stats = engine.stats()
            report.note(f"{shape}; {args.dtype}; {stats['experts']}, {stats['products']}")
            if args.equal:
                size = f"{stats['non_expert_bytes'] / 2**20:.0f} MiB"
                report.note(
                    f"equal: {', '.join(args.equal)}; non-expert weights of all tenants {size}"
                )
            bandwidth = rates(args, report).bandwidth
            for rows in args.batch:
                compare(
                    report,
                    shape,
                    engine._require_backend(),
                    store.tenants,
                    rows,
                    bandwidth,
                    steps=args.steps,
                    repeats=args.repeats,
                    prompt=args.prompt,
                    itemsize=getattr(torch, args.dtype).itemsize,
                    equal=args.equal,
                )
            report.note(f"peak memory of the process: {peak_rss_gib():.2f} GiB")
    write_output(args, [report], f"Several tenants in one batch, {args.family}")
    return report.rows


if __name__ == "__main__":
    main()
