"""The measurement behind the choice of products on a CPU: rates of reading weights, by rows, for each way to multiply.

plain: F.linear. packed: oneDNN on weights reordered once. native: our own kernels on the same packed weights.
grouped: torch's grouped product over 8 matrices, against rows spread evenly over them. Each way goes through a chain
of matrices larger than the caches; the floor is the bandwidth of a plain read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.common import Report, Spread, add_output, machine, memory_bandwidth, seconds, write_output
from torch_engine import native
from torch_engine.pool import find_grouped_mm
from torch_engine.products import can_pack, linear, pack, pack_native


def measure(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, chain_bytes: int, repeats: int
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
                rate = total / seconds(way)
                if repeat:
                    rates[name].append(rate)
    return rates


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser)
    parser.add_argument("--shapes", nargs="+", default=["7168x1024", "1024x3584", "3072x768"], help="OUTPUTSxINPUTS")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256])
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--chain-bytes", type=int, default=300_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    columns = ("dtype", "matrix", "rows", "plain", "packed", "native", "grouped", "best")
    report = Report("Products on a CPU, GB/s of weights", columns)
    report.note(machine())
    report.note(f"a plain read gives {memory_bandwidth(args.chain_bytes) / 1e9:.1f} GB/s")
    for dtype in args.dtypes:
        for shape in args.shapes:
            outputs, inputs = map(int, shape.split("x"))
            for rows in args.rows:
                rates = measure(rows, outputs, inputs, getattr(torch, dtype), args.chain_bytes, args.repeats)
                cells = {name: Spread.of(values).scaled(1e-9) for name, values in rates.items()}
                best = max(cells, key=lambda name: cells[name].median)
                found = {name: cells.get(name, "-") for name in columns[3:7]}
                report.add(**{"dtype": dtype, "matrix": shape, "rows": rows, **found, "best": best})
    write_output(args, [report], "Products on a CPU")
    return report.rows


if __name__ == "__main__":
    main()
