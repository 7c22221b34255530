"""The measurement behind the choice of products on a CPU: rates of reading weights, by rows, for
each way to multiply.

plain: F.linear. packed: oneDNN on weights reordered once. native: our own kernels on the same
    packed weights.
grouped: torch's grouped product over 8 matrices, against rows spread evenly over them. Each way
goes through a chain of matrices larger than the caches; the floor is the bandwidth of a plain read.
The last column is the ratio of native
to what runs without our kernels, pair by pair: packed, or plain where nothing packs the type.

A second table compares ways to compute a whole feed-forward, down(silu(gate) * up), in the same
terms: plain; packed for 1, 16, 64 or 256 rows, gate and up in one product; fused: gate and up
apart, silu and multiplication inside oneDNN's products; native: the whole layer in one call of our
own kernels; grouped: two grouped products over 8 experts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch_engine.pool import find_grouped_mm

from benchmarks.common import (
    Clock,
    Report,
    Spread,
    add_output,
    clock_of,
    machine,
    memory_bandwidth,
    ratios,
    seconds,
    take_clock,
    write_output,
)
from torch_engine import native
from torch_engine.products import PackedWeight, can_pack, linear, pack, pack_native

HINTS = (1, 16, 64, 256)
FEED_FORWARDS = ("plain", *(f"packed {h}" for h in HINTS), "fused 16", "native", "grouped")


def measure(
    rows: int,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    chain_bytes: int,
    repeats: int,
    clock: Clock,
) -> dict[str, list[float]]:
    """Bytes of weights a second, for each way that works here."""
    itemsize = dtype.itemsize
    count = max(8, chain_bytes // (outputs * inputs * itemsize) // 8 * 8)
    block = torch.randn(outputs, inputs) * inputs**-0.5
    weights = [block.to(dtype).clone() for _ in range(count)]
    x = torch.randn(rows, inputs).to(dtype)
    ways: dict[str, Callable[[], Any]] = {"plain": lambda: [F.linear(x, w) for w in weights]}
    if can_pack(dtype):
        packed = [pack(w) for w in weights]
        ways["packed"] = lambda: [linear(x, w) for w in packed]
    if native.load(dtype) is not None:
        own = [pack_native(w) for w in weights]
        ways["native"] = lambda: [linear(x, w) for w in own]
    grouped_mm = find_grouped_mm()
    if grouped_mm is not None and rows >= 8:
        stacks = [torch.stack(weights[i : i + 8]).transpose(1, 2) for i in range(0, count, 8)]
        ends = torch.arange(1, 9, dtype=torch.int32) * rows
        many = x.repeat(8, 1)
        ways["grouped"] = lambda: [grouped_mm(many, w, offs=ends) for w in stacks]
    total = count * outputs * inputs * itemsize
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for name, way in ways.items():
                rate = total / seconds(way, clock)
                if repeat:
                    rates[name].append(rate)
    return rates


def gain_of(rates: dict[str, list[float]], packed: str) -> Spread | str:
    """How many times as fast our own kernels are as what is used without them: packed, or plain
    where nothing packs."""
    if "native" not in rates:
        return "-"
    return ratios(rates["native"], rates.get(packed, rates["plain"]))


def pack_for(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Reorder `[out, in]` as oneDNN likes it for so many rows."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return packed


def product(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return out


class FeedForwards:
    """A chain of experts of one shape, prepared for every way that works here."""

    def __init__(self, hidden: int, inter: int, dtype: torch.dtype, chain_bytes: int):
        self.hidden, self.inter, self.dtype = hidden, inter, dtype
        self.count = max(8, chain_bytes // (3 * hidden * inter * dtype.itemsize) // 8 * 8)
        self.nbytes = self.count * 3 * hidden * inter * dtype.itemsize
        up = torch.randn(2 * inter, hidden) * hidden**-0.5
        down = torch.randn(hidden, inter) * inter**-0.5
        self.plain = [(up.to(dtype).clone(), down.to(dtype).clone()) for _ in range(self.count)]
        self.packed: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.apart: list[tuple[torch.Tensor, ...]] = []
        if can_pack(dtype):
            self.packed = {
                h: [(pack_for(a, h), pack_for(b, h)) for a, b in self.plain] for h in HINTS
            }
            self.apart = [
                tuple(pack_for(w, 16) for w in (a[:inter], a[inter:], b)) for a, b in self.plain
            ]
        self.kernels = native.load(dtype)
        self.native: list[tuple[PackedWeight, PackedWeight]] = []
        if self.kernels is not None and inter % native.BLOCK == 0:
            self.native = [(pack_native(a), pack_native(b)) for a, b in self.plain]

    def ways(self, rows: int) -> dict[str, Callable[[], list[torch.Tensor]]]:
        x = torch.randn(rows, self.hidden).to(self.dtype)

        def joined(gate_up: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return F.silu(gate).mul_(up)

        def fused(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
            inner = torch.ops.mkldnn._linear_pointwise(x, gate, None, "swish", [], "")
            return product(
                torch.ops.mkldnn._linear_pointwise.binary(x, inner, up, None, "mul"), down
            )

        def packed(
            weights: list[tuple[torch.Tensor, torch.Tensor]],
        ) -> Callable[[], list[torch.Tensor]]:
            return lambda: [product(joined(product(x, a)), b) for a, b in weights]

        found: dict[str, Callable[[], list[torch.Tensor]]] = {
            "plain": lambda: [F.linear(joined(F.linear(x, a)), b) for a, b in self.plain]
        }
        found |= {f"packed {h}": packed(weights) for h, weights in self.packed.items()}
        if self.apart:
            found["fused 16"] = lambda: [fused(*w) for w in self.apart]
        kernels, places = self.kernels, [(a.place, b.place) for a, b in self.native]
        if (
            kernels is not None
            and places
            and all(a is not None and b is not None for a, b in places)
        ):
            starts, order = np.array([0, rows], dtype=np.int64), np.arange(rows, dtype=np.int64)
            ones = torch.ones(rows, 1)

            def own(a: Any, b: Any) -> torch.Tensor:
                return native.experts(
                    kernels, x, [a], [b], self.inter, starts, order, order, ones, "silu"
                )

            found["native"] = lambda: [own(a, b) for a, b in places]
        grouped_mm = find_grouped_mm()
        if grouped_mm is not None:
            ends = torch.arange(1, 9, dtype=torch.int32) * rows
            many = x.repeat(8, 1)
            stacks = [
                tuple(
                    torch.stack([w[part] for w in self.plain[i : i + 8]]).transpose(1, 2)
                    for part in (0, 1)
                )
                for i in range(0, self.count, 8)
            ]
            found["grouped"] = lambda: [
                grouped_mm(joined(grouped_mm(many, a, offs=ends)), b, offs=ends)[:rows]
                for a, b in stacks
            ]
        return found

    def measure(
        self, rows: int, repeats: int, clock: Clock = time.perf_counter
    ) -> dict[str, list[float]]:
        """Bytes of weights a second, for each way, in turn. Raises AssertionError if one is
        wrong."""
        ways = self.ways(rows)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        with torch.inference_mode():
            expected = ways["plain"]()[0].float()
            for name, way in ways.items():
                difference = float((way()[0].float() - expected).abs().max() / expected.abs().max())
                if not difference < (0.05 if self.dtype == torch.bfloat16 else 1e-4):
                    raise AssertionError(
                        f"{name} differs from plain by {difference:.3g} of its largest value"
                    )
            for _ in range(repeats):
                for name, way in ways.items():
                    rates[name].append(self.nbytes / seconds(way, clock))
        return rates


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser)
    parser.add_argument(
        "--shapes", nargs="+", default=["7168x1024", "1024x3584", "3072x768"], help="OUTPUTSxINPUTS"
    )
    parser.add_argument(
        "--experts", nargs="*", default=["1024x3584", "768x3072"], help="HIDDENxINTERMEDIATE"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256])
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"]
    )
    parser.add_argument("--chain-bytes", type=int, default=300_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    take_clock(parser)
    args = parser.parse_args(argv)
    clock = clock_of(args)
    columns = (
        "dtype",
        "matrix",
        "rows",
        "plain",
        "packed",
        "native",
        "grouped",
        "best",
        "native / before",
    )
    report = Report("Products on a CPU, GB/s of weights", columns)
    report.note(machine())
    report.note(
        f"a plain read gives {memory_bandwidth(args.chain_bytes, clock=clock) / 1e9:.1f} GB/s"
    )
    for dtype in args.dtypes:
        for shape in args.shapes:
            outputs, inputs = map(int, shape.split("x"))
            for rows in args.rows:
                rates = measure(
                    rows,
                    outputs,
                    inputs,
                    getattr(torch, dtype),
                    args.chain_bytes,
                    args.repeats,
                    clock,
                )
                cells = {name: Spread.of(values).scaled(1e-9) for name, values in rates.items()}
                best = max(cells, key=lambda name: cells[name].median)
                found = {name: cells.get(name, "-") for name in columns[3:7]}
                gain = gain_of(rates, "packed")
                report.add(
                    **{
                        "dtype": dtype,
                        "matrix": shape,
                        "rows": rows,
                        **found,
                        "best": best,
                        "native / before": gain,
                    }
                )
    whole = Report(
        "Feed-forwards on a CPU, GB/s of weights",
        ("dtype", "expert", "rows", *FEED_FORWARDS, "best", "native / before"),
    )
    for dtype in args.dtypes:
        for shape in args.experts:
            hidden, inter = map(int, shape.split("x"))
            chain = FeedForwards(hidden, inter, getattr(torch, dtype), args.chain_bytes)
            for rows in args.rows:
                rates = chain.measure(rows, args.repeats, clock)
                cells = {name: Spread.of(values).scaled(1e-9) for name, values in rates.items()}
                best = max(cells, key=lambda name: cells[name].median)
                found = {name: cells.get(name, "-") for name in FEED_FORWARDS}
                gain = gain_of(rates, "packed 16")
                whole.add(
                    **{
                        "dtype": dtype,
                        "expert": shape,
                        "rows": rows,
                        **found,
                        "best": best,
                        "native / before": gain,
                    }
                )
    write_output(args, [report, whole], "Products on a CPU")
    return report.rows


if __name__ == "__main__":
    main()
