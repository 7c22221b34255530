"""Real sizes end to end: random fine-tunes of a Switch Transformer are built into a store,
consolidated and served.

Reports the build's time, the store's bytes, how long loading takes, first-token latency, what a
tenant switch adds to it, compilations, and peak memory (of a fresh process that only serves, and of
the build).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Report, Spread, add_output, machine, peak_rss_gib, write_output
from benchmarks.switch_shape import (
    SwitchShape,
    add_switch_shape,
    switch_shape_of,
    write_random_switch,
)
from common import SamplingParams, build_store, load_engine

COLUMNS = ("dtype", "what", "value")


def serve(store: str, dtype: str, prompt: int, rounds: int) -> dict[str, Any]:
    """Load, warm up, then visit the tenants in turn; times in seconds, memory in GiB."""
    begun = time.perf_counter()
    with load_engine(store, dtype=dtype) as engine:
        loaded = time.perf_counter() - begun
        rng, config = np.random.default_rng(0), engine.store.config(engine.tenants[0])
        params = SamplingParams(max_new_tokens=4, ignore_eos=True)

        def ids() -> list[int]:
            return [int(i) for i in rng.integers(3, config.vocab_size, prompt)]

        begun = time.perf_counter()
        engine.generate(engine.tenants[0], ids(), params)
        first_call = time.perf_counter() - begun
        for tenant in engine.tenants:  # whatever else happens once
            engine.generate(tenant, ids(), params)
        compiled = engine.stats()["compilations"]
        stay, switch, reconfiguration = [], [], []
        for i in range(rounds):
            tenant = engine.tenants[i % len(engine.tenants)]
            timings = engine.generate(tenant, ids(), params).timings
            switch.append(timings.ttft)
            reconfiguration.append(timings.reconfiguration)
            stay.append(engine.generate(tenant, ids(), params).timings.ttft)
        stats = engine.stats()
    return {
        "loaded": loaded,
        "first call": first_call,
        "stay": stay,
        "switch": switch,
        "reconfiguration": reconfiguration,
        "compilations": stats["compilations"] - compiled,
        "stats": {
            k: stats[k] for k in ("pool_bytes", "non_expert_bytes", "experts", "products", "dtype")
        },
        "peak": peak_rss_gib(),
    }


def in_fresh_process(function: str, *args: Any) -> Any:
    """Run `serve` or `build` alone, so that its peak memory is its own."""
    code = (
        "import json, sys; from benchmarks import switch_tenants as module; "
        f"print(json.dumps(module.{function}(*json.loads(sys.argv[1]))))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, json.dumps(args)], capture_output=True, text=True, check=False
    )
    if out.returncode:
        raise RuntimeError(out.stderr[-2000:])
    return json.loads(out.stdout.splitlines()[-1])


def build(store: str, tenants: dict[str, str]) -> dict[str, Any]:
    begun = time.perf_counter()
    about = build_store(store, tenants, policy="round_robin").describe()
    return {"seconds": time.perf_counter() - begun, "peak": peak_rss_gib(), "about": about}


def measure(args: argparse.Namespace, shape: SwitchShape, dtype: str, report: Report) -> None:
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        tenants = {}
        for i in range(args.variants + 1):
            path = Path(scratch) / f"tenant{i}"
            write_random_switch(path, shape, dtype, seed=i, moved=0.1 * (i > 0))
            tenants[path.name] = str(path)
        store = str(Path(scratch) / "store")
        built = in_fresh_process("build", store, tenants)
        served = in_fresh_process("serve", store, "auto", args.prompt, args.rounds)

    def add(what: str, value: Any) -> None:
        report.add(dtype=dtype, what=what, value=value)

    about, stats = built["about"], served["stats"]
    gib = 2.0**30
    add(
        "tenants, positions, resident copies",
        f"{args.variants + 1}, {about['positions']}, {about['resident_copies']}",
    )
    add(
        "as separate models -> shared, GiB",
        f"{about['bytes_before'] / gib:.2f} -> {about['bytes_after'] / gib:.2f}",
    )
    add("build, s; its peak memory, GiB", f"{built['seconds']:.1f}; {built['peak']:.2f}")
    add(
        "products; pool and tenants on the device, GiB",
        f"{stats['products']}; {stats['pool_bytes'] / gib:.2f}, "
        f"{stats['non_expert_bytes'] / gib:.2f}",
    )
    add("load, s; first call (compiles), s", f"{served['loaded']:.1f}; {served['first call']:.1f}")
    add("peak memory of serving (mapped files' pages counted), GiB", f"{served['peak']:.2f}")
    stay, switch = Spread.of(served["stay"]), Spread.of(served["switch"])
    add(f"first token, prompt {args.prompt}, same tenant again, ms", stay.scaled(1e3))
    add(f"first token, prompt {args.prompt}, another tenant than before, ms", switch.scaled(1e3))
    part = Spread.of(
        [r / t for r, t in zip(served["reconfiguration"], served["switch"], strict=True)]
    )
    add("reconfiguration, microseconds", Spread.of(served["reconfiguration"]).scaled(1e6))
    add("reconfiguration, % of the first token's latency", part.scaled(100))
    add("compilations during the switches", served["compilations"])


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_switch_shape(parser)
    add_output(parser)
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--variants", type=int, default=4, help="fine-tunes beside the base")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--scratch", help="folder for checkpoints and store (four times a model for each tenant)"
    )
    args = parser.parse_args(argv)
    report = Report("Switch Transformer: a base and its fine-tunes from one store", COLUMNS)
    report.note(machine())
    report.note(str(switch_shape_of(args)))
    for dtype in args.dtypes:
        measure(args, switch_shape_of(args), dtype, report)
    write_output(args, [report], "Switch Transformer tenants")
    return report.rows


if __name__ == "__main__":
    main()
