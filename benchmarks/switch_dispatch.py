"""Ways to send the tokens of one Switch layer through its experts on a CPU, in jax: what
`jax_engine.experts.dispatch` chooses from.

Each call uses the next of several layers' weights, so that they do not stay in a cache. Routing is
balanced. Every way is checked against float64 numpy on a few tokens before it is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.common import Report, Spread, add_output, machine, memory_bandwidth, write_output
from jax_engine import native
from jax_engine.experts.dispatch import (
    DenseDispatch,
    FeedForward,
    LoopDispatch,
    NativeDispatch,
    _ragged,
    block_rows,
    over_blocks,
)

Way = Callable[[Any, Any, Any], Any]


def loop_of(size: int, ff: FeedForward) -> Way:
    """LoopDispatch with a fixed block."""

    def run(x: Any, slots: Any, copies: Any) -> Any:
        branches = [lambda rows, copy=copy: ff(rows, copy) for copy in copies]
        return over_blocks(
            x, slots, len(copies), lambda rows, slot: lax.switch(slot, branches, rows), size
        )

    return run


def unrolled(ff: FeedForward) -> Way:
    """One `lax.switch` a slot, over the number of its tokens rounded up: no loop, one product a
    slot."""

    def run(x: Any, slots: Any, copies: Any) -> Any:
        tokens = x.shape[0]
        sizes = [n for n in (1, 2, 4, 16, 64, 256, 1024) if n < tokens] + [tokens]
        order = jnp.argsort(slots)
        counts = jnp.bincount(slots, length=len(copies))
        firsts = jnp.cumsum(counts) - counts
        rows = jnp.concatenate([x[order], jnp.zeros_like(x)])
        out = jnp.zeros_like(rows)
        for slot, copy in enumerate(copies):

            def of(size: int, copy: Any = copy) -> Any:
                def body(grown: Any, start: Any, count: Any) -> Any:
                    found = ff(lax.dynamic_slice_in_dim(rows, start, size), copy)
                    found = jnp.where((jnp.arange(size) < count)[:, None], found, 0)
                    old = lax.dynamic_slice_in_dim(grown, start, size)
                    return lax.dynamic_update_slice_in_dim(grown, old + found, start, 0)

                return body

            branch = jnp.where(
                counts[slot] == 0, 0, 1 + jnp.searchsorted(jnp.asarray(sizes), counts[slot])
            )
            branches = [lambda out, *_: out, *map(of, sizes)]
            out = lax.switch(branch, branches, out, firsts[slot], counts[slot])
        return jnp.zeros_like(x).at[order].set(out[:tokens])

    return run


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--d-ff", type=int, default=3072)
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--layers", type=int, default=4, help="weight sets to go through in turn")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument(
        "--limit", type=float, default=2.0, help="no more repeats of a way after so many seconds"
    )
    parser.add_argument("--bandwidth-bytes", type=int, default=1 << 30)
    args = parser.parse_args(argv)
    report = Report(
        "Expert dispatch of one layer, float32, ms",
        ("slots", "tokens", "way", "ms", "GB/s", "of floor"),
    )
    report.note(machine() + f", jax {jax.__version__}")
    bandwidth = memory_bandwidth(args.bandwidth_bytes)
    report.note(
        f"memory read {bandwidth / 1e9:.1f} GB/s; the floor is the weights of the slots that are "
        "hit, read once"
    )
    ff = FeedForward("relu", False, args.d_ff)
    kernels = native.load()
    for slots in args.slots:
        measure(args, slots, ff, kernels, bandwidth, report)
    write_output(args, [report], "Expert dispatch in jax on a CPU")
    return report.rows


def measure(
    args: argparse.Namespace,
    slots: int,
    ff: FeedForward,
    kernels: Any,
    bandwidth: float,
    report: Report,
) -> None:
    rng = np.random.default_rng(0)
    shapes = ((args.d_ff, args.d_model), (args.d_model, args.d_ff))
    layers = [
        [
            [rng.standard_normal(s, dtype=np.float32) * s[1] ** -0.5 for s in shapes]
            for _ in range(slots)
        ]
        for _ in range(args.layers if slots <= 8 else 2)
    ]
    split = [tuple(tuple(jnp.asarray(w) for w in copy) for copy in layer) for layer in layers]
    packed = [
        tuple(tuple(jnp.asarray(native.pack(w)) for w in copy) for copy in layer)
        for layer in layers
    ]
    stacked = [
        (tuple(jnp.stack([copy[i] for copy in layer]) for i in range(2)),) if slots <= 8 else None
        for layer in split
    ]
    ways: dict[str, tuple[Way, Any]] = {}
    if kernels:
        ways["native: own kernels"] = (lambda x, i, c: NativeDispatch(kernels)(x, i, c, ff), packed)
    ways["loop: blocks, a switch each"] = (lambda x, i, c: LoopDispatch()(x, i, c, ff), split)
    for size in (1, 4, 16, 64):
        ways[f"loop with blocks of {size}"] = (loop_of(size, ff), split)
    if slots <= 8:
        ways["unrolled: a switch on size each"] = (unrolled(ff), split)
        ways["dense: every expert, then select"] = (
            lambda x, i, c: DenseDispatch()(x, i, c, ff),
            stacked,
        )
        ways["ragged_dot"] = (lambda x, i, c: _ragged(x, i, c[0], ff), stacked)
    for tokens in args.tokens:
        x = rng.standard_normal((tokens, args.d_model), dtype=np.float32)
        chosen = rng.permutation(np.arange(tokens) % slots).astype(np.int32)
        floor = len(np.unique(chosen)) * 2 * args.d_model * args.d_ff * 4 / bandwidth
        wi, wo = layers[0][int(chosen[0])]
        expected = wo.astype(np.float64) @ np.maximum(wi.astype(np.float64) @ x[0], 0)
        for name, (way, weights) in ways.items():
            size = int(name.rsplit(" ", 1)[1]) if name.startswith("loop with") else 0
            if size and (size > tokens or size == block_rows(tokens, slots) or tokens > 64 * size):
                continue
            run = jax.jit(way)
            found = np.asarray(run(x, chosen, weights[0]))
            assert np.abs(found[0] - expected).max() < 1e-3, name
            times: list[float] = []
            begun = time.perf_counter()
            for i in range(args.repeats + 1):
                start = time.perf_counter()
                run(x, chosen, weights[i % len(weights)]).block_until_ready()
                times.append(time.perf_counter() - start)
                if time.perf_counter() - begun > args.limit and i > 1:
                    break
            spread = Spread.of(times[1:])
            report.add(
                slots=slots,
                tokens=tokens,
                way=name
                + (f" (of {block_rows(tokens, slots)})" if name.startswith("loop: ") else ""),
                **{
                    "ms": spread.scaled(1e3),
                    "GB/s": f"{floor * bandwidth / spread.median / 1e9:.1f}",
                    "of floor": f"{spread.median / floor:.2f}",
                },
            )


if __name__ == "__main__":
    main()
