"""How long does the default policy plan tenants of a large model, by step, and in what memory?

A store of a few positions of the real shapes is written (Mixtral-8x7B's by default; every tenant is
the first one with its expert weights moved a little), calibrated with random inputs as many as a
real calibration keeps, and planned as `moetel build` plans. Planning looks at one position at a
time, so that a model's time is that of one position times their number; reading the checkpoints and
running the calibration prompts come on top. The floor counts only the
products without which nothing could be compared: every tenant's expert on every tenant's sample.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    Report,
    add_output,
    machine,
    peak_rss_gib,
    seconds,
    write_output,
)
from benchmarks.material.random_models import write_random
from benchmarks.material.shape import Shape, add_model, shape_of
from common import Store, build_store
from common.build.calibration import LEAST_SAMPLES
from common.plan.profile import Profile
from common.planning.planner import RIDGE_POSITIONS, Planner
from common.planning.policies import DEFAULT_EXTRA, DEFAULT_POLICY

RIDGE = "choosing how closely copies are fitted"


class Stopwatch:
    """A `Progress` that adds up the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        begun = time.perf_counter()
        yield lambda: None
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - begun


def random_profile(store: Store, samples: int, seed: int) -> Profile:
    """As many inputs of every expert as `samples`, of unit size, spread over a few hundred
    directions most."""
    spec, rng = store.experts, np.random.default_rng(seed)
    rows = spec.num_positions * samples
    falling = (1 + np.arange(spec.hidden_size)) ** -0.5
    inputs = (
        rng.standard_normal((rows, spec.hidden_size))
        * falling
        * np.sqrt(spec.hidden_size / (falling**2).sum())
    )
    gates = rng.uniform(0.3, 0.7, rows).astype(np.float32)
    shape = (spec.num_layers, spec.num_experts)
    return Profile(
        tokens=np.full(spec.num_layers, samples * spec.num_experts // spec.top_k),
        counts=np.full(shape, samples),
        gate_squares=(gates.astype(np.float64) ** 2).reshape(*shape, samples).sum(axis=2),
        inputs=inputs.astype(np.float32),
        gates=gates,
        starts=np.arange(0, rows + 1, samples),
        sensitivity=np.full(spec.num_layers, 1e-3),
    )


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(
        parser,
        mixtral={
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 1,
            "num_local_experts": 2,
            "vocab_size": 1000,
        },
    )
    add_output(parser)
    parser.add_argument("--tenants", type=int, default=4)
    parser.add_argument("--extra", type=float, help="of one model's experts; default: the policy's")
    parser.add_argument(
        "--positions", type=int, default=256, help="of the whole model; default: %(default)s"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=LEAST_SAMPLES,
        help="inputs of an expert; as kept of large models",
    )
    parser.add_argument("--scratch", help="folder for checkpoints and store")
    args = parser.parse_args(argv)
    shape, count = shape_of(args), args.tenants
    samples = args.samples
    extra = DEFAULT_EXTRA * count if args.extra is None else args.extra
    report = Report("Planning large experts", ("step", "s a position", "h for the model"))
    report.note(machine())
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        root = Path(scratch)
        tenants = {
            f"tenant{i}": write_random(
                root / f"tenant{i}", shape.config, "bfloat16", seed=i, moved=0.05 * i
            )
            for i in range(count)
        }
        store = build_store(root / "store", tenants, policy="round_robin")
        profiles = {
            name: random_profile(store, samples, seed) for seed, name in enumerate(store.tenants)
        }
        before, watch = peak_rss_gib(), Stopwatch()
        here = store.experts.num_positions
        begun = time.perf_counter()
        planner = Planner(store, profiles, progress=watch)
        outcome = planner.plan(DEFAULT_POLICY, extra_bytes=int(extra * here * store.copy_bytes))
        whole = time.perf_counter() - begun
    once = watch.seconds.pop(RIDGE, 0.0) / min(here, RIDGE_POSITIONS) * RIDGE_POSITIONS
    rest = whole - sum(watch.seconds.values()) - once / RIDGE_POSITIONS * min(here, RIDGE_POSITIONS)
    report.add(
        **{"step": f"{RIDGE}, once", "s a position": "", "h for the model": f"{once / 3600:.2f}"}
    )
    hours = once / 3600
    for step, spent in {**watch.seconds, "all else": rest}.items():
        each = spent / here
        hours += each * args.positions / 3600
        report.add(
            **{
                "step": step,
                "s a position": f"{each:.1f}",
                "h for the model": f"{each * args.positions / 3600:.2f}",
            }
        )
    report.add(
        **{
            "step": "together",
            "s a position": f"{hours * 3600 / args.positions:.1f}",
            "h for the model": f"{hours:.2f}",
        }
    )
    spec = shape.parsed.experts
    flops = 2 * shape.expert_weights * count * count * samples
    report.note(
        f"experts of {spec.hidden_size} x {spec.intermediate_size}, {count} tenants, {samples} "
        "samples of each, "
        f"{extra:.0%} extra; {len(outcome.plan.residuals)} residuals and {len(outcome.merged)} "
        f"merged copies on {here} "
        f"positions; {args.positions} in the whole model"
    )
    report.note(
        f"every tenant's expert on every sample: {flops / 1e12:.2f} TFLOP a position; numpy's "
        "float32 products run at "
        f"{product_rate(shape) / 1e9:.0f} GFLOP/s here; memory grew by "
        f"{peak_rss_gib() - before:.1f} GiB"
    )
    write_output(args, [report], "Planning large experts")
    return report.rows


def product_rate(shape: Shape) -> float:
    """Operations a second of a product of an expert's size."""
    spec = shape.parsed.experts
    a = np.ones((256, spec.hidden_size), np.float32)
    b = np.ones((spec.hidden_size, spec.intermediate_size), np.float32)
    a @ b
    spent = min(seconds(lambda: a @ b) for _ in range(3))
    return 2 * a.size * spec.intermediate_size / spent


if __name__ == "__main__":
    main()
