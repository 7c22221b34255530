"""What do residuals cost a decode step and a prompt?

Residuals of noise beside every copy, of three kinds: sign bits for every weight, low rank in 4 bits
of a given share of the copies' bytes, and both. Each kind is a tenant of one store, all of the same
weights; the side without is an engine over a plan that has none. Sides take turns in one process.
Next tokens are random ids, the same for every side.

The floor is the bytes of the weights and residuals that are hit over the rate of a plain read; for
prompts, the arithmetic of the products without residuals, if that takes longer.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

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
from common import Store, build_store
from common.dtypes import BFLOAT16, BY_NAME
from common.plan.residual import LOW_RANK, SIGN, Part, Residual, row_bytes
from common.store.change import set_plan

NONE = "none"
CASES = (NONE, "sign", "low-rank", "both")
COLUMNS = (
    "what",
    "residuals",
    "ms",
    "of none's time",
    "bytes beside a copy",
    "floor, ms",
    "of floor",
)


def parts_of(
    case: str, shapes: dict[str, tuple[int, ...]], share: float, itemsize: int
) -> tuple[Part, ...]:
    """share: of a matrix's bytes, for the low-rank part."""
    found = []
    for name, (outputs, inputs) in shapes.items():
        if case in ("sign", "both"):
            found.append(Part(name, SIGN, 1, 1))
        if case in ("low-rank", "both"):
            component = 4 + row_bytes(inputs, 4) + row_bytes(outputs, 4)
            rank = max(1, round(share * outputs * inputs * itemsize / component))
            found.append(Part(name, LOW_RANK, 4, rank))
    return tuple(found)


def noise_record(
    rng: np.random.Generator, residual: Residual, shapes: dict[str, tuple[int, ...]]
) -> np.ndarray:
    """A record of random codes, its scales small: uint8 [bytes]."""
    offsets = residual.offsets(shapes)
    record = np.frombuffer(rng.bytes(offsets[-1]), dtype=np.uint8).copy()
    for part, start in zip(residual.parts, offsets, strict=False):
        outputs, inputs = shapes[part.projection]
        if part.kind == SIGN:
            scales: np.ndarray = np.full(
                -(-outputs // part.size), 0.1 * inputs**-0.5, dtype=BFLOAT16
            )
        else:  # codes have a standard deviation of about 4.6
            scales = np.full(
                part.size, 0.1 * (inputs * part.size) ** -0.5 / 4.6**2, dtype=np.float32
            )
        record[start : start + scales.nbytes] = scales.view(np.uint8)
    return record


def build(folder: Path, shape: Shape, args: argparse.Namespace) -> tuple[Store, Store]:
    """Of the same weights: a store without residuals, and one with a tenant for each of the other
    cases."""
    checkpoint = write_random(folder / "checkpoint", shape.config, args.dtype)
    plain = build_store(folder / "plain", {NONE: checkpoint}, policy="round_robin")
    store = build_store(
        folder / "residuals", dict.fromkeys(CASES[1:], checkpoint), policy="round_robin"
    )
    shutil.rmtree(checkpoint)
    shapes, rng = dict(plain.experts.projections), np.random.default_rng(0)
    itemsize = BY_NAME[args.dtype].itemsize
    residuals = [
        Residual(tenant, layer, expert, parts_of(case, shapes, args.share, itemsize))
        for tenant, case in enumerate(store.tenants)
        for layer, expert in np.ndindex(plain.plan.num_layers, plain.plan.num_experts)
    ]
    records = [noise_record(rng, r, shapes) for r in residuals]
    return plain, set_plan(
        store.path, replace(store.plan, residuals=tuple(residuals)), records=records
    )


def compare(args: argparse.Namespace, shape: Shape, stores: tuple[Store, ...], out: Report) -> None:
    limits = rates(args, out)
    plain, with_them = (open_engine(store, args) for store in stores)
    stats = with_them.stats()
    out.note(
        f"{stats['experts']}, {stats['products']}; pool {stats['pool_bytes'] / 1e6:.0f} MB, "
        f"residuals of all {len(CASES) - 1} tenants {stats['residual_bytes'] / 1e6:.0f} MB"
    )
    shapes, itemsize = dict(plain.store.experts.projections), BY_NAME[args.dtype].itemsize
    rng = np.random.default_rng(0)
    cells = [(f"decode step, batch {b}, ms", b, args.prompt, args.new_tokens) for b in args.batch]
    cells += [(f"first token, prompt {n}, ms", 1, n, 0) for n in args.prefill]
    for what, batch, prompt, steps in cells:
        prompts = rng.integers(3, shape.vocab_size, (batch, prompt))
        forced = rng.integers(3, shape.vocab_size, (steps, batch))
        sides = {
            case: Ours((plain if case == NONE else with_them)._require_backend(), [case], prompts)
            for case in CASES
        }
        hits = {case: side.experts_hit(forced[:3]) for case, side in sides.items()}
        part, measure = 1 if steps else 0, partial(timed, steps=forced)
        times = in_turn(sides, args.repeats, lambda side: measure(side)[part])  # noqa: B023
        for case in CASES:
            parts = parts_of(case, shapes, args.share, itemsize)
            extra = Residual(0, 0, 0, parts).nbytes(shapes)
            hit = hits[case][0 if steps else 2]
            read = shape.step_weights(hit) * itemsize + shape.sparse_layers * hit * extra
            floor = read / limits.bandwidth
            if not steps:
                floor = max(floor, shape.prompt_flops(prompt) / limits.peak)
            spread = Spread.of(times[case])
            share = extra / (shape.expert_weights * itemsize)
            out.add(
                **{
                    "what": what,
                    "residuals": case,
                    "ms": spread.scaled(1e3),
                    "of none's time": ratios(times[case], times[NONE]),
                    "bytes beside a copy": f"{share:.1%}",
                    "floor, ms": f"{floor * 1e3:.3g}",
                    "of floor": f"{spread.median / floor:.2f}",
                }
            )
    plain.close()
    with_them.close()


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    # Six layers: far more than the caches hold, in a minute's writing.
    add_model(parser, mixtral={"num_hidden_layers": 6})
    add_output(parser)
    add_engine(parser)
    parser.add_argument("--share", type=float, default=0.03, help="low rank's bytes, of a copy's")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--prefill", type=int, nargs="*", default=[128])
    parser.add_argument("--prompt", type=int, default=32, help="tokens before decoding")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args(argv)
    shape = shape_of(args)
    report = Report("Residuals: with and without", COLUMNS)
    report.note(machine())
    report.note(f"{shape}; {args.dtype}")
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        compare(args, shape, build(Path(scratch), shape, args), report)
    report.note(f"peak memory of the process: {peak_rss_gib():.2f} GiB")
    write_output(args, [report], f"Residuals, {args.family}")
    return report.rows


if __name__ == "__main__":
    main()
