"""Decoding for several tenants in one batch beside one tenant with all its rows: one Mixtral store,
on a CPU, the two batches in turn, step by step, in one process.

All tenants share one copy of each expert. What is not an expert each has of its own, and a step
reads it for every tenant that is in it. So the bytes that a step must read, over the memory's rate,
are each side's floor, and the ratio of the floors bounds how near the mixed batch can come. Next
tokens are random ids, the same for both sides.

    python -m benchmarks.mixed_tenants --equal lm_head embed_tokens

Tenants then have those tensors equal, as adapters of attention leave them, and a step reads them
once for all.
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
import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import (
    Report,
    Shape,
    Spread,
    add_output,
    add_shape,
    machine,
    memory_bandwidth,
    peak_rss_gib,
    ratios,
    shape_of,
    write_output,
    write_random,
)
from common import build_store, load_engine
from common.serving.backend import Backend, Row

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


class Side:
    """A batch of rows of some tenants, as many each."""

    def __init__(
        self, backend: Backend, tenants: Sequence[str], prompts: np.ndarray, new_tokens: int
    ):
        """prompts: int64 [rows, tokens]. Rows of a tenant are adjacent."""
        self.backend, self.num_tenants = backend, len(tenants)
        names = [tenants[i * len(tenants) // len(prompts)] for i in range(len(prompts))]
        rows = [
            Row(name, tuple(p.tolist()), new_tokens) for name, p in zip(names, prompts, strict=True)
        ]
        self.batch = backend.start(rows)
        self.batch.prefill(want_logits=False)
        self.times: list[float] = []

    def step(self, ids: np.ndarray) -> float:
        """Seconds of one step."""
        begun = time.perf_counter()
        self.batch.decode(ids, want_logits=False)
        return time.perf_counter() - begun

    def experts_hit(self, steps: np.ndarray) -> float:
        """Different experts a layer and step, all tenants together. Not timed: it slows steps
        down."""
        seen: dict[int, set[int]] = defaultdict(set)
        counts: list[int] = []

        def look(
            tenant: str, layer: int, x: np.ndarray, expert_ids: np.ndarray, gates: np.ndarray
        ) -> None:
            seen[layer].update(expert_ids.reshape(-1).tolist())

        self.backend.observe(look)
        for ids in steps:
            seen.clear()
            self.batch.decode(ids, want_logits=False)
            counts += [len(experts) for experts in seen.values()]
        self.backend.observe(None)
        return float(np.mean(counts))


def step_bytes(
    shape: Shape, experts_hit: float, num_tenants: int, itemsize: int, equal_weights: int = 0
) -> float:
    """What a step must read: the experts that are hit once, everything else once a tenant, but for
    `equal_weights` of it; embeddings aside."""
    own = shape.step_weights(0) - equal_weights
    return (shape.step_weights(experts_hit) + (num_tenants - 1) * own) * itemsize


def make_equal(paths: Sequence[Path], parts: Sequence[str]) -> int:
    """Give all checkpoints the first one's tensors whose names hold one of `parts`, experts aside.
    Returns how many weights that are which a step reads."""
    weights = 0
    for shard in sorted(paths[0].glob("*.safetensors")):
        mine = {
            name: tensor
            for name, tensor in load_file(shard).items()
            if ".experts." not in name and any(part in name for part in parts)
        }
        weights += sum(
            t.numel()
            for name, t in mine.items()
            if "embed_tokens" not in name and "norm" not in name
        )
        for path in paths[1:] if mine else ():
            save_file(
                load_file(path / shard.name) | mine, path / shard.name, metadata={"format": "pt"}
            )
    return weights


def compare(
    args: argparse.Namespace,
    shape: Shape,
    report: Report,
    backend: Backend,
    tenants: Sequence[str],
    equal_weights: int,
) -> None:
    rng = np.random.default_rng(0)

    def ids(*size: int) -> np.ndarray:
        return rng.integers(3, shape.vocab_size, size=size)

    bandwidth = memory_bandwidth(args.bandwidth_bytes)
    report.note(f"memory read {bandwidth / 1e9:.1f} GB/s (torch, this run)")
    new_tokens = args.steps + args.warm_up + args.counted
    for rows in args.batch:
        prompts = ids(rows, args.prompt)
        sides = [
            Side(backend, tenants[:1], prompts, new_tokens),
            Side(backend, tenants, prompts, new_tokens),
        ]
        for number in range(args.warm_up + args.steps):
            forced = ids(rows)
            for side in (
                sides if number % 2 else sides[::-1]
            ):  # in turn: neither always follows the other
                took = side.step(forced)
                if number >= args.warm_up:
                    side.times.append(took)
        counted = ids(args.counted, rows)
        hits = [side.experts_hit(counted) for side in sides]
        read = [
            step_bytes(
                shape, hit, side.num_tenants, getattr(torch, args.dtype).itemsize, equal_weights
            )
            for hit, side in zip(hits, sides, strict=True)
        ]
        for side, hit, size in zip(sides, hits, read, strict=True):
            floor = size / bandwidth
            report.add(
                **{
                    "batch": rows,
                    "tenants": side.num_tenants,
                    "tokens/s": Spread.of([rows / t for t in side.times]),
                    "step, ms": Spread.of(side.times).scaled(1e3),
                    "of one tenant's rate": ratios(sides[0].times, side.times),
                    "experts hit": f"{hit:.2f}",
                    "read a step, MB": f"{size / 1e6:.0f}",
                    "floor, ms": f"{floor * 1e3:.3g}",
                    "step / floor": f"{Spread.of(side.times).median / floor:.2f}",
                    "floor of one tenant / floor": f"{read[0] / size:.3f}",
                }
            )
            side.batch.close()


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_shape(parser, Shape(num_hidden_layers=8))
    add_output(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--products", choices=("auto", "native", "plain"), default="auto")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--tenants", type=int, default=4, help="at least 2")
    parser.add_argument(
        "--equal", nargs="*", default=[], metavar="PART", help="tensors that all tenants have equal"
    )
    parser.add_argument(
        "--batch", type=int, nargs="*", default=[16], help="rows; multiples of --tenants"
    )
    parser.add_argument("--steps", type=int, default=60, help="measured steps of each side")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before them")
    parser.add_argument(
        "--counted", type=int, default=4, help="steps after them, whose experts are counted"
    )
    parser.add_argument("--prompt", type=int, default=20, help="tokens before decoding")
    parser.add_argument(
        "--scratch", help="folder for the random tenants and their store (two times their size)"
    )
    parser.add_argument("--bandwidth-bytes", type=int, default=1 << 30)
    args = parser.parse_args(argv)
    if args.tenants < 2 or any(rows % args.tenants for rows in args.batch):
        parser.error("give at least 2 tenants, and batches that are multiples of their number")
    if args.threads:
        torch.set_num_threads(args.threads)
    shape, dtype = shape_of(args), getattr(torch, args.dtype)
    report = Report("Several tenants in one batch beside one tenant", COLUMNS)
    report.note(machine())
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        paths = {
            f"tenant{i}": write_random(Path(scratch) / f"tenant{i}", shape, dtype, i)
            for i in range(args.tenants)
        }
        equal_weights = make_equal(list(paths.values()), args.equal)
        store = build_store(Path(scratch) / "store", paths, policy="round_robin")
        with load_engine(store, backend="torch", device="cpu", products=args.products) as engine:
            stats = engine.stats()
            report.note(
                f"{shape}, {args.dtype}; experts {stats['experts']}, products {stats['products']}"
            )
            if args.equal:
                size = f"{stats['non_expert_bytes'] / 2**20:.0f} MiB"
                report.note(
                    f"equal: {', '.join(args.equal)}; non-expert weights of all tenants {size}"
                )
            compare(args, shape, report, engine._require_backend(), store.tenants, equal_weights)
            report.note(f"peak memory of the process: {peak_rss_gib():.2f} GiB")
    write_output(args, [report], "Several tenants in one batch")
    return report.rows


if __name__ == "__main__":
    main()
