"""Which way to multiply is fastest on a CPU? Rates of reading weights, by number of rows.

plain: torch's `F.linear`. oneDNN: torch's product with weights reordered once. own: our kernels
with weights packed once. Each way goes through a chain of matrices larger than the caches, in turn. The
floor for few rows is the bandwidth of a plain read, for many rows the rate of arithmetic.

The second table has whole experts, `down(silu(gate x) * (up x))`: own is one call a layer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

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
from torch_engine.products import pack_native

WAYS = ("plain", "oneDNN", "own")
ROWS_OF_LAYOUT = 16  # that oneDNN's layout is chosen for

Chain = dict[str, Callable[[Tensor], list[Tensor]]]


def reordered(weight: Tensor) -> Tensor:
    """[out, in] in oneDNN's layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_OF_LAYOUT)
    return packed


def onednn(x: Tensor, packed: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return out


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies reordered weights of this type here."""
    try:
        found = onednn(torch.ones(2, 32, dtype=dtype), reordered(torch.ones(32, 32, dtype=dtype)))
        return bool((found == 32).all())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def matrices(outputs: int, inputs: int, dtype: torch.dtype, count: int) -> Chain:
    """`count` products, each with a matrix of its own."""
    block = torch.randn(outputs, inputs) * inputs**-0.5
    weights = [block.to(dtype).clone() for _ in range(count)]
    ways: Chain = {"plain": lambda x: [F.linear(x, w) for w in weights]}
    if has_onednn(dtype):
        packed = [reordered(w) for w in weights]
        ways["oneDNN"] = lambda x: [onednn(x, w) for w in packed]
    if native.load(dtype) is not None:
        own = [pack_native(w) for w in weights]
        ways["own"] = lambda x: [w.multiply(x) for w in own]
    return ways


def experts(hidden: int, inner: int, dtype: torch.dtype, count: int) -> Chain:
    """`count` experts, each for all rows."""
    gate, up = (torch.randn(inner, hidden) * hidden**-0.5 for _ in range(2))
    down = torch.randn(hidden, inner) * inner**-0.5
    copies = [[w.to(dtype).clone() for w in (gate, up, down)] for _ in range(count)]

    def chain(multiply: Callable[[Tensor, Any], Tensor], weights: list[list[Any]]) -> Any:
        def run(x: Tensor) -> list[Tensor]:
            return [multiply(F.silu(multiply(x, g)).mul_(multiply(x, u)), d) for g, u, d in weights]

        return run

    ways: Chain = {"plain": chain(F.linear, copies)}
    if has_onednn(dtype):
        ways["oneDNN"] = chain(onednn, [[reordered(w) for w in one] for one in copies])
    kernels = native.load(dtype)
    if kernels is not None:
        packed = [[native.pack(w) for w in one] for one in copies]
        addresses = [native.addresses(one)[None] for one in packed]

        def own(x: Tensor) -> list[Tensor]:
            chosen, ones = np.zeros((len(x), 1), dtype=np.int32), torch.ones(len(x), 1)
            assert len(packed) == len(addresses)  # which point into them
            return [
                native.experts(kernels, x, chosen, ones, one, inner, "silu") for one in addresses
            ]

        ways["own"] = own
    return ways


def measure(
    ways: Chain, x: Tensor, nbytes: int, repeats: int, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Bytes of weights a second, for each way, in turn. Raises AssertionError if one is wrong."""
    tolerance = 0.05 if x.dtype == torch.bfloat16 else 1e-4
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        expected = ways["plain"](x)[0].float()
        for name, way in ways.items():
            found = float((way(x)[0].float() - expected).abs().max() / expected.abs().max())
            if not found < tolerance:
                raise AssertionError(f"{name} differs from plain by {found:.3g} of the largest")
        for _ in range(repeats):
            for name, way in ways.items():
                rates[name].append(nbytes / seconds(partial(way, x), clock))
    return rates


def row_of(rates: dict[str, list[float]]) -> dict[str, Any]:
    cells: dict[str, Any] = {
        name: Spread.of(rates[name]).scaled(1e-9) if name in rates else "-" for name in WAYS
    }
    for other in ("plain", "oneDNN"):
        both = "own" in rates and other in rates
        cells[f"own / {other}"] = ratios(rates["own"], rates[other]) if both else "-"
    return cells


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser)
    parser.add_argument(
        "--shapes", nargs="*", default=["7168x1024", "1024x3584"], help="OUTPUTSxINPUTS"
    )
    parser.add_argument(
        "--experts", nargs="*", default=["1024x3584", "512x1408"], help="HIDDENxINNER"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128, 512])
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"]
    )
    parser.add_argument("--chain-bytes", type=int, default=300_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    take_clock(parser)
    args = parser.parse_args(argv)
    clock = clock_of(args)
    columns = ("dtype", "shape", "rows", *WAYS, "own / plain", "own / oneDNN")
    reports = []
    for (
        title,
        sizes,
        make,
    ) in (
        ("Products", args.shapes, matrices),
        ("Experts", args.experts, experts),
    ):
        report = Report(f"{title} on a CPU, GB/s of weights", columns)
        for dtype in args.dtypes:
            for size in sizes:
                a, b = map(int, size.split("x"))
                kind = getattr(torch, dtype)
                each = a * b * kind.itemsize * (3 if make is experts else 1)
                count = max(2, args.chain_bytes // each)
                ways = make(a, b, kind, count)
                for rows in args.rows:
                    x = torch.randn(rows, a if make is experts else b).to(kind)
                    rates = measure(ways, x, count * each, args.repeats, clock)
                    report.add(dtype=dtype, shape=size, rows=rows, **row_of(rates))
        reports.append(report)
    bandwidth = memory_bandwidth(args.chain_bytes, clock=clock)
    reports[0].note(machine())
    reports[0].note(f"a plain read gives {bandwidth / 1e9:.1f} GB/s")
    kernels = native.load(torch.float32)
    reports[0].note(f"own kernels: {'none' if kernels is None else kernels.target}")
    write_output(args, reports, "Products on a CPU")
    return [row for report in reports for row in report.rows]


if __name__ == "__main__":
    main()
