"""What residuals cost the JAX engine on a CPU: one layer, decode steps and first tokens, with and
without them.

Residuals of noise beside every copy, of three kinds: sign bits for every weight, low rank in 4 bits
of a given share of the copies' bytes, and both. Sides take turns in one process. Each call of a
layer uses the next of several layers' weights, so that they do not stay in a cache; routing is
balanced there. A whole step runs a random Switch Transformer; next tokens are random ids, the same
for every side. The sides with residuals are tenants of one store, all of the same weights; the side
without is an engine over a plan that has none.

The floor is the bytes of the weights and residuals that are hit over the rate of a plain read; for
prompts, the arithmetic of the products without residuals, if that takes longer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.common import (
    Report,
    Spread,
    add_output,
    machine,
    memory_bandwidth,
    peak_rss_gib,
    ratios,
    seconds,
    write_output,
)
from benchmarks.mixtral_cpu import matmul_rate, timed
from benchmarks.switch_shape import (
    SwitchShape,
    add_switch_shape,
    switch_shape_of,
    write_random_switch,
)
from common import Engine, Store, build_store, load_engine
from common.dtypes import BFLOAT16, BY_NAME
from common.families import EncoderDecoder
from common.families.shape import Sparse
from common.plan.residual import LOW_RANK, SIGN, Part, Residual, row_bytes
from common.serving.backend import Backend, Row
from common.store.change import set_plan
from jax_engine import native
from jax_engine.experts.dispatch import Dispatch, FeedForward, LoopDispatch, NativeDispatch
from jax_engine.experts.pool import slots_of_plan
from jax_engine.experts.products import NativeProducts, PlainProducts, Products
from jax_engine.experts.residuals import LoadedResiduals

NONE = "none"
CASES = (NONE, "sign", "low-rank", "both")


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


def build(folder: Path, shape: SwitchShape, args: argparse.Namespace) -> tuple[Store, Store]:
    """Of the same weights: a store without residuals, and one with a tenant for each of the other
    cases."""
    checkpoint = write_random_switch(folder / "checkpoint", shape, args.dtype)
    plain = build_store(folder / "plain", {NONE: checkpoint}, policy="round_robin")
    store = build_store(
        folder / "residuals", dict.fromkeys(CASES[1:], checkpoint), policy="round_robin"
    )
    shutil.rmtree(checkpoint)
    shapes, rng = dict(plain.experts.projections), np.random.default_rng(0)
    residuals = [
        Residual(
            tenant, layer, expert, parts_of(case, shapes, args.share, BY_NAME[args.dtype].itemsize)
        )
        for tenant, case in enumerate(store.tenants)
        for layer, expert in np.ndindex(plain.plan.num_layers, plain.plan.num_experts)
    ]
    records = [noise_record(rng, r, shapes) for r in residuals]
    return plain, set_plan(
        store.path, replace(store.plan, residuals=tuple(residuals)), records=records
    )


class LayerSide:
    """One layer's experts for one case, over several layers' weights in turn."""

    def __init__(
        self,
        args: argparse.Namespace,
        store: Store,
        products: Products,
        dispatch: Dispatch,
        case: str,
    ):
        slots, slot_of = slots_of_plan(store.plan)
        spec = store.experts
        self.ff = FeedForward(
            spec.activation, "gate" in dict(spec.projections), spec.intermediate_size
        )
        blocked = isinstance(dispatch, NativeDispatch)
        counts = tuple(map(len, slots))
        loaded = LoadedResiduals(store, slot_of, counts, jnp.asarray, blocked).of(
            store.tenants.index(case)
        )
        chosen = list(range(min(args.layers, len(slots))))
        self.residuals = [loaded[layer] if loaded else None for layer in chosen]
        self.copies = [
            tuple(
                tuple(
                    jnp.asarray(products.pack(products.prepare(ref.map())))
                    for ref in store.slot_refs(slot).values()
                )
                for slot in slots[layer]
            )
            for layer in chosen
        ]
        self.run = jax.jit(lambda x, i, c, r: dispatch(x, i, c, self.ff, r))

    def __call__(self, x: jax.Array, slots: jax.Array, turn: int) -> jax.Array:
        layer = turn % len(self.copies)
        found: jax.Array = self.run(x, slots, self.copies[layer], self.residuals[layer])
        return found.block_until_ready()


def measure_layer(
    args: argparse.Namespace,
    stores: tuple[Store, Store],
    bandwidth: float,
    peak: float,
    report: Report,
) -> None:
    plain, with_them = stores
    kernels = None if args.products == "plain" else native.load()
    products: Products = PlainProducts("float32", "float32")
    if kernels:
        products = NativeProducts(args.dtype, "float32", kernels)
    dispatch: Dispatch = NativeDispatch(kernels) if kernels else LoopDispatch()
    sides = {
        c: LayerSide(args, plain if c == NONE else with_them, products, dispatch, c) for c in CASES
    }
    for side in sides.values():
        side.copies = sides[
            NONE
        ].copies  # the same arrays: a side without residuals must not gain a colder cache
    spec, rng = plain.experts, np.random.default_rng(0)
    shapes = dict(spec.projections)
    copy_bytes = sum(w.nbytes for w in sides[NONE].copies[0][0])
    for tokens in args.tokens:
        x = jnp.asarray(rng.standard_normal((tokens, spec.hidden_size), dtype=np.float32))
        ids = jnp.asarray(rng.permutation(np.arange(tokens) % spec.num_experts).astype(np.int32))
        hit = len(np.unique(ids))
        times: dict[str, list[float]] = {case: [] for case in CASES}
        for repeat in range(args.repeats + 1):
            for i, (case, side) in enumerate(sides.items()):
                # One more layer than sides from round to round: no side meets what another has just
                # read.
                spent = seconds(partial(side, x, ids, (len(CASES) + 1) * repeat + i))
                if repeat:  # the first round compiles
                    times[case].append(spent)
        for case in CASES:
            parts = parts_of(case, shapes, args.share, BY_NAME[args.dtype].itemsize)
            extra = Residual(0, 0, 0, parts).nbytes(shapes)
            floor = max(
                hit * (copy_bytes + extra) / bandwidth, 2 * tokens * spec.copy_elements / peak
            )
            add(report, f"layer, {tokens} tokens, ms", case, times, floor, extra / copy_bytes)


class StepSide:
    """Batches of one tenant, driven without sampling or text."""

    def __init__(self, backend: Backend, tenant: str):
        self.backend, self.tenant = backend, tenant

    def start(self, prompts: np.ndarray) -> None:
        self.batch = self.backend.start([Row(self.tenant, tuple(map(int, p)), 64) for p in prompts])
        self.batch.prefill(False)

    def step(self, ids: np.ndarray) -> None:
        self.batch.decode(ids, False)

    def stop(self) -> None:
        self.batch.close()


def experts_hit(
    engine: Engine, side: StepSide, prompts: np.ndarray, steps: np.ndarray
) -> tuple[float, float]:
    """Different experts that a layer's tokens take: of the encoder, and of the decoder in a step.
    Not timed."""
    shape = engine.store.config(side.tenant).shape
    assert isinstance(shape, EncoderDecoder)
    encoder = sum(isinstance(mlp, Sparse) for mlp in shape.encoder)
    counts: tuple[list[int], list[int]] = ([], [])

    def look(
        tenant: str, layer: int, x: np.ndarray, expert_ids: np.ndarray, gates: np.ndarray
    ) -> None:
        counts[layer >= encoder].append(len(np.unique(expert_ids)))

    engine.observe(look)
    side.start(prompts)
    for ids in steps[:3]:
        side.step(ids)
    side.stop()
    engine.observe(None)
    return float(np.mean(counts[0])), float(np.mean(counts[1]))


def measure_steps(
    args: argparse.Namespace,
    shape: SwitchShape,
    stores: tuple[Store, Store],
    bandwidth: float,
    peak: float,
    report: Report,
) -> None:
    plain, with_them = (load_engine(s, device="cpu", products=args.products) for s in stores)
    stats = with_them.stats()
    report.note(
        f"experts {stats['experts']}, products {stats['products']}; pool "
        f"{stats['pool_bytes'] / 1e6:.0f} MB, residuals "
        f"of all {len(CASES) - 1} tenants {stats['residual_bytes'] / 1e6:.0f} MB"
    )
    engines = {case: plain if case == NONE else with_them for case in CASES}
    sides = {case: StepSide(engine._require_backend(), case) for case, engine in engines.items()}
    spec, rng = plain.store.experts, np.random.default_rng(0)
    shapes, itemsize = dict(spec.projections), BY_NAME[args.dtype].itemsize
    kept = (
        itemsize if stats["products"].startswith("own kernels") else 4
    )  # XLA's products want float32 on a CPU
    cells = [(f"decode step, batch {b}, ms", b, args.prompt, args.new_tokens) for b in args.batch]
    cells += [(f"first token, prompt {n}, ms", 1, n, 0) for n in args.prefill]
    for name, batch, prompt, steps in cells:
        times: dict[str, list[float]] = {case: [] for case in CASES}
        prompts = rng.integers(3, shape.vocab_size, (batch, prompt))
        forced = rng.integers(3, shape.vocab_size, (steps, batch))
        hits = {case: experts_hit(engines[case], sides[case], prompts, forced) for case in CASES}
        for repeat in range(args.step_repeats + 1):
            for case, side in sides.items():
                spent = timed(side, prompts, forced)[1 if steps else 0]
                if repeat:  # the first round compiles
                    times[case].append(spent)
        for case in CASES:
            parts = parts_of(case, shapes, args.share, itemsize)
            extra = Residual(0, 0, 0, parts).nbytes(shapes)
            encoder, decoder = hits[case]
            floor = (
                shape.step_weights(decoder) * kept + shape.num_sparse_layers * decoder * extra
            ) / bandwidth
            if not steps:
                read = (
                    shape.step_weights(encoder) * kept + shape.num_sparse_layers * encoder * extra
                ) / bandwidth
                floor += max(read, shape.encoder_flops(prompt) / peak)
            add(report, name, case, times, floor, extra / (spec.copy_elements * kept))
    plain.close()
    with_them.close()


def add(
    report: Report, what: str, case: str, times: dict[str, list[float]], floor: float, share: float
) -> None:
    spread = Spread.of(times[case])
    report.add(
        what=what,
        residuals=case,
        ms=spread.scaled(1e3),
        **{
            "of none's time": ratios(times[case], times[NONE]),
            "bytes beside a copy": f"{share:.1%}",
            "floor, ms": f"{floor * 1e3:.3g}",
            "of floor": f"{spread.median / floor:.2f}",
        },
    )


COLUMNS = (
    "what",
    "residuals",
    "ms",
    "of none's time",
    "bytes beside a copy",
    "floor, ms",
    "of floor",
)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_switch_shape(parser)
    add_output(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--products", choices=("auto", "native", "plain"), default="auto")
    parser.add_argument("--share", type=float, default=0.03, help="low rank's bytes, of a copy's")
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[1, 4, 16, 128], help="of one layer"
    )
    parser.add_argument("--layers", type=int, default=12, help="weight sets to go through in turn")
    parser.add_argument("--repeats", type=int, default=40, help="of a layer")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--prefill", type=int, nargs="*", default=[128])
    parser.add_argument("--prompt", type=int, default=32, help="tokens before decoding")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--step-repeats", type=int, default=7)
    parser.add_argument(
        "--scratch", help="folder for the random checkpoint and its stores (three times its size)"
    )
    parser.add_argument("--bandwidth-bytes", type=int, default=1 << 30)
    parser.add_argument(
        "--product-size",
        type=int,
        default=4096,
        help="of the square product whose rate is the limit",
    )
    args = parser.parse_args(argv)
    shape = switch_shape_of(args)
    report = Report("Residuals in the JAX engine on a CPU", COLUMNS)
    report.note(
        machine() + f", jax {jax.__version__}; load average {os.getloadavg()[0]:.1f} at the start"
    )
    report.note(f"{shape}, {args.dtype}")
    bandwidth, peak = (
        memory_bandwidth(args.bandwidth_bytes),
        matmul_rate(torch.float32, args.product_size),
    )
    report.note(
        f"memory read {bandwidth / 1e9:.1f} GB/s, float32 matrix product {peak / 1e9:.0f} GFLOP/s, "
        "of torch in this run"
    )
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        stores = build(Path(scratch), shape, args)
        measure_layer(args, stores, bandwidth, peak, report)
        if args.batch or args.prefill:
            measure_steps(args, shape, stores, bandwidth, peak, report)
    report.note(
        f"load average {os.getloadavg()[0]:.1f} at the end; peak memory {peak_rss_gib():.2f} GiB"
    )
    write_output(args, [report], "Residuals in the JAX engine on a CPU")
    return report.rows


if __name__ == "__main__":
    main()
