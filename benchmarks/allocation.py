"""How long do candidates, residual curves and allocation take for thousands of positions?

No model is read: losses are squared distances of random points, one a tenant, and spectra fall off
at random rates, so that positions and tenants differ. Losses and spectra themselves are not timed:
reading and decomposing weights is `moetel build`'s work and grows with the weights. The gap is the
plan's predicted loss over the bound that no plan of the same candidates can pass.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.common import Report, Spread, add_output, machine, peak_rss_gib, write_output
from common.planning.allocation import Allocator
from common.planning.configurations import Config, merged, owned
from common.planning.losses import gram_of_distances
from common.planning.residual_curves import Curve, Kinds, curves
from common.planning.residual_fit import MAX_RANK, Spectrum

KINDS = Kinds()
ITEMSIZE = 2
CASES = ("32x8x20", "48x128x20")


@dataclass(frozen=True)
class Case:
    """layers, experts, tenants; hidden and intermediate size of an expert of three matrices."""

    layers: int
    experts: int
    tenants: int
    hidden: int
    intermediate: int

    @property
    def positions(self) -> int:
        return self.layers * self.experts

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        wide, narrow = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        return wide, narrow, wide

    @property
    def copy_bytes(self) -> int:
        return 3 * self.hidden * self.intermediate * ITEMSIZE

    def __str__(self) -> str:
        return f"{self.layers} x {self.experts} x {self.tenants}"


def grams(case: Case, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Q_t of every position, float64 [T, T, T]: tenants' distances in 16 dimensions, of very
    different sizes."""
    for _ in range(case.positions):
        points = rng.standard_normal((case.tenants, 16)) * rng.lognormal(0, 0.5, (case.tenants, 1))
        yield gram_of_distances(((points[:, None] - points) ** 2).sum(axis=2)) * rng.lognormal(
            -8, 1.0
        )


def spectra(case: Case, rng: np.random.Generator) -> list[list[Spectrum]]:
    """Of every tenant at one position."""
    found = []
    rank = min(MAX_RANK, case.hidden, case.intermediate)
    for _ in range(case.tenants):
        row = []
        for shape in case.shapes:
            values = np.sort(rng.exponential(size=rank))[::-1] * np.exp(
                -np.arange(rank) * rng.uniform(0.005, 0.1)
            )
            row.append(
                Spectrum(
                    shape,
                    values,
                    float(values.sum() * rng.uniform(1.1, 2)),
                    float(rng.uniform(0.4, 0.7)),
                )
            )
        found.append(row)
    return found


def candidates(case: Case, rng: np.random.Generator) -> list[list[Config]]:
    """As a policy that merges has them: the best mixture, and the best copy of a tenant."""
    traffic = np.full(case.tenants, 1 / case.tenants)
    return [[merged(gram, traffic), owned(gram, traffic)] for gram in grams(case, rng)]


def plans(case: Case, seed: int, shares: list[float], curve_sets: int) -> dict[str, Any]:
    """Seconds of each step, and the gap at each share."""
    rng = np.random.default_rng(seed)
    traffic = np.full(case.tenants, 1 / case.tenants)
    begun = time.perf_counter()
    configs = candidates(case, rng)
    row: dict[str, Any] = {"case": str(case), "candidates, s": f"{time.perf_counter() - begun:.1f}"}
    spent, drawn = 0.0, []
    for _ in range(curve_sets):
        found: list[list[Curve]] = []
        for _ in range(0, case.positions, case.experts):
            made = [one for _ in range(case.experts) for one in spectra(case, rng)]
            begun = time.perf_counter()
            flat = curves(made, KINDS, ITEMSIZE)
            spent += time.perf_counter() - begun
            found += [flat[i : i + case.tenants] for i in range(0, len(flat), case.tenants)]
        drawn.append(found)
    row["curves, s"] = f"{spent:.1f}"
    begun = time.perf_counter()
    allocator = Allocator(configs, drawn, traffic, case.copy_bytes)
    row["set up, s"] = f"{time.perf_counter() - begun:.1f}"
    one_model, taken = case.positions * case.copy_bytes, []
    for share in shares:
        begun = time.perf_counter()
        plan = allocator.allocate(int(one_model * (1 + share)))
        taken.append(time.perf_counter() - begun)
        value = float((plan.losses @ traffic).sum())
        row[f"gap at {share:.0%}"] = f"{value / plan.bound - 1:.2e}" if plan.bound > 0 else "-"
    row["allocation, s"] = Spread.of(taken)
    row["peak memory, GiB"] = f"{peak_rss_gib():.1f}"
    return row


def parse_case(text: str) -> tuple[int, int, int]:
    try:
        layers, experts, tenants = (int(n) for n in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write LAYERSxEXPERTSxTENANTS, as 32x8x20"
        ) from None
    return layers, experts, tenants


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser)
    parser.add_argument(
        "--cases", type=parse_case, nargs="+", default=[parse_case(c) for c in CASES]
    )
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--intermediate-size", type=int, default=768)
    parser.add_argument("--extra", type=float, nargs="+", default=[0.05, 0.15, 0.4])
    parser.add_argument(
        "--curve-sets", type=int, default=2, choices=(2, 3), help="3: as with calibration"
    )
    args = parser.parse_args(argv)
    gaps = [f"gap at {share:.0%}" for share in args.extra]
    steps = ("candidates, s", "curves, s", "set up, s", "allocation, s")
    report = Report("Planning", ("case", *steps, *gaps, "peak memory, GiB"))
    report.note(machine())
    report.note("a case is layers x experts x tenants; gap: predicted loss over the bound, less 1")
    for sizes in args.cases:
        layers, experts, tenants = sizes
        case = Case(layers, experts, tenants, args.hidden_size, args.intermediate_size)
        report.add(**plans(case, 0, args.extra, args.curve_sets))
    write_output(args, [report], "Planning of large models")
    return report.rows


if __name__ == "__main__":
    main()
