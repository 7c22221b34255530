"""How long does a prompt take whose beginning its tenant has read, beside the same without a cache?

Two engines serve the same store, one with the prefix cache and one without. Each reads a prompt,
then a second one with the same beginning and another end; the second one's time to its first token
counts. The last row's prompts have nothing in common: what looking costs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    Clock,
    Report,
    Spread,
    add_output,
    clock_of,
    machine,
    ratios,
    seconds,
    take_clock,
    write_output,
)
from benchmarks.driving import add_engine, open_engine
from benchmarks.material.random_models import write_random
from benchmarks.material.shape import add_model, shape_of
from common import SamplingParams, build_store
from common.serving.engine import Engine
from common.serving.request import Generation

COLUMNS = (
    "common tokens",
    "tokens found",
    "first token, with the cache, ms",
    "first token, without, ms",
    "with / without, pair by pair",
)
ONE = SamplingParams(max_new_tokens=1, ignore_eos=True)


def first_token(engine: Engine, prompt: list[int], clock: Clock) -> tuple[float, Generation]:
    """Seconds until the first token."""
    found: list[Generation] = []
    took = seconds(lambda: found.append(engine.generate("tenant0", prompt, ONE)), clock)
    return took, found[0]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser, mixtral={"num_hidden_layers": 2})
    add_output(parser)
    add_engine(parser)
    take_clock(parser)
    parser.add_argument("--common", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--more", type=int, default=16, help="tokens behind the common ones")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    shape, clock = shape_of(args), clock_of(args)
    rng = np.random.default_rng(0)
    report = Report("The first token behind a beginning that was read before", COLUMNS)
    report.note(machine())
    report.note(
        f"{shape}, {args.dtype}; {args.more} tokens behind the common ones; {args.repeats} pairs"
        + ("; CPU time of one thread" if args.cpu_time else "")
    )

    def ids(count: int) -> list[int]:
        found: list[int] = rng.integers(3, shape.vocab_size, size=count).tolist()
        return found

    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        root = Path(scratch)
        checkpoint = write_random(root / "tenant0", shape.config, args.dtype, 0)
        store = build_store(root / "store", {"tenant0": checkpoint})
        engines = [
            open_engine(store, args, enable_prefix_caching=enabled) for enabled in (True, False)
        ]
        for common in (*args.common, 0):
            times: list[list[float]] = [[], []]
            found = set()
            for turn in range(args.repeats + 1):
                beginning = ids(common)
                longest = max(args.common) if not common else 0
                before = [*beginning, *ids(args.more + longest)]
                prompt = [*beginning, *ids(args.more + longest)]
                for engine, taken in list(zip(engines, times, strict=True))[:: (-1) ** turn]:
                    engine.generate("tenant0", before, ONE)
                    took, answer = first_token(engine, prompt, clock)
                    if engine is engines[0]:
                        found.add(answer.num_cached_tokens)
                    elif answer.num_cached_tokens:
                        raise AssertionError("the engine without the cache found something in it")
                    if turn:  # the first one warms up
                        taken.append(took)
            report.add(
                **{
                    "common tokens": common or f"0 of {len(prompt)}",
                    "tokens found": ", ".join(map(str, sorted(found))),
                    "first token, with the cache, ms": Spread.of(times[0]).scaled(1e3),
                    "first token, without, ms": Spread.of(times[1]).scaled(1e3),
                    "with / without, pair by pair": ratios(times[0], times[1]),
                }
            )
        for engine in engines:
            engine.close()
    write_output(args, [report], f"Prefix cache, {args.family}")
    return report.rows


if __name__ == "__main__":
    main()
