"""This engine beside transformers on a CPU: the same random Mixtral, the same tokens, in turn, in
one process.

Prefill of a prompt (until the first token) and decode steps at several batch sizes. Next tokens are
random ids, the same for both sides, so lengths are exact and tokens spread over experts. For
transformers each cell takes the faster of its experts implementations; batched_mm is left out,
since it copies the weights of every token's experts (survey: 191 ms a step at batch 1).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, MixtralForCausalLM

from benchmarks.common import (
    Clock,
    Report,
    Shape,
    Spread,
    add_output,
    add_shape,
    clock_of,
    machine,
    memory_bandwidth,
    peak_rss_gib,
    ratios,
    seconds,
    shape_of,
    take_clock,
    write_output,
    write_random,
)
from common import build_store, load_engine
from common.serving.backend import Row
from common.serving.engine import Engine

IMPLEMENTATIONS = ("eager", "grouped_mm")
NEW_TOKENS = 64  # what caches are told to expect


class Ours:
    """Prefill and decode through the engine's backend, as `generate_batch` drives it. `stop` frees
    the caches."""

    def __init__(self, engine: Engine):
        self.backend = engine._require_backend()

    def start(self, prompts: np.ndarray) -> None:
        self.batch = self.backend.start(
            [Row("tenant", tuple(p.tolist()), NEW_TOKENS) for p in prompts]
        )
        self.batch.prefill(want_logits=False)

    def step(self, ids: np.ndarray) -> None:
        self.batch.decode(ids, want_logits=False)

    def stop(self) -> None:
        self.batch.close()


class Theirs:
    """Prefill and decode through transformers' forward with its cache; greedy choice included on
    both sides."""

    def __init__(self, model: MixtralForCausalLM, implementation: str):
        self.model, self.implementation = model, implementation

    @torch.inference_mode()
    def start(self, prompts: np.ndarray) -> None:
        self.model.set_experts_implementation(self.implementation)
        self.cache = DynamicCache(config=self.model.config)
        self.forward(prompts)

    @torch.inference_mode()
    def step(self, ids: np.ndarray) -> None:
        self.forward(ids[:, None])

    def stop(self) -> None:
        del self.cache

    def forward(self, ids: np.ndarray) -> None:
        out = self.model(
            input_ids=torch.from_numpy(ids),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        out.logits.argmax(-1)


def timed(
    side: Ours | Theirs, prompts: np.ndarray, steps: np.ndarray, clock: Clock = time.perf_counter
) -> tuple[float, float]:
    """Seconds until the first token, and of a later step (mean). steps: int64 [steps, batch]."""
    begun = clock()
    side.start(prompts)
    first = clock()
    for ids in steps:
        side.step(ids)
    last = clock()
    side.stop()
    return first - begun, (last - first) / max(1, len(steps))


class HitCounter:
    """Different experts hit a layer and step, counted on transformers' routers in a run that is not
    timed."""

    def __init__(self, model: MixtralForCausalLM):
        self.hits: list[int] = []
        self.handles = [
            layer.mlp.gate.register_forward_hook(
                lambda _m, _a, out: self.hits.append(len(out[2].unique()))
            )
            for layer in model.model.layers
        ]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def measure(args: argparse.Namespace, shape: Shape, report: Report) -> None:
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        checkpoint = write_random(Path(scratch) / "checkpoint", shape, dtype)
        build_store(Path(scratch) / "store", {"tenant": checkpoint}, slots="all")
        engine = load_engine(Path(scratch) / "store", device="cpu", products=args.products)
        model = MixtralForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
        compare(args, shape, report, engine, model)
        engine.close()


def compare(
    args: argparse.Namespace,
    shape: Shape,
    report: Report,
    engine: Engine,
    model: MixtralForCausalLM,
) -> None:
    rng = np.random.default_rng(0)
    clock = clock_of(args)

    def ids(*size: int) -> np.ndarray:
        return rng.integers(3, shape.vocab_size, size=size)

    stats = engine.stats()
    report.note(machine())
    report.note(f"{shape}, {args.dtype}; experts {stats['experts']}, products {stats['products']}")
    probe = ids(1, 16)
    with torch.inference_mode():
        theirs = model(input_ids=torch.from_numpy(probe)).logits.float().numpy()
    difference = np.abs(engine.logits("tenant", probe) - theirs)
    report.note(
        f"logits of both sides on 16 tokens: largest difference {difference.max():.3g}, mean "
        f"{difference.mean():.3g}, "
        f"mean size {np.abs(theirs).mean():.3g}"
    )
    bandwidth = memory_bandwidth(args.bandwidth_bytes, clock=clock)
    peak = matmul_rate(getattr(torch, args.dtype), args.product_size, clock)
    report.note(
        f"memory read {bandwidth / 1e9:.1f} GB/s, matrix product {peak / 1e9:.0f} GFLOP/s, both of "
        "torch in this run"
    )
    itemsize = getattr(torch, args.dtype).itemsize
    sides: dict[str, Ours | Theirs] = {"ours": Ours(engine)} | {
        n: Theirs(model, n) for n in IMPLEMENTATIONS
    }
    cells: list[tuple[str, int, int, int]] = [(f"prefill {n}, ms", 1, n, 0) for n in args.prefill]
    cells += [
        (f"decode batch {b}, tokens/s", b, args.prompt, args.new_tokens - 1) for b in args.batch
    ]
    for name, batch, prompt, steps in cells:
        times: dict[str, list[float]] = {side: [] for side in sides}
        counter = HitCounter(model)
        timed(sides["eager"], ids(batch, prompt), ids(min(steps, 4), batch), clock)
        hit = (
            float(np.mean(counter.hits[len(model.model.layers) :]))
            if steps
            else shape.num_local_experts
        )
        counter.close()
        for repeat in range(args.repeats + 1):
            prompts, forced = ids(batch, prompt), ids(steps, batch)
            for side in sides:
                took = timed(sides[side], prompts, forced, clock)[1 if steps else 0]
                if repeat:  # the first round warms up
                    times[side].append(took)
        best = min(IMPLEMENTATIONS, key=lambda side: Spread.of(times[side]).median)
        read = shape.step_weights(hit) * itemsize
        rates = " / ".join(
            f"{read / Spread.of(times[side]).median / 1e9:.3g}" for side in ("ours", best)
        )
        if steps:
            floor = read / bandwidth
            ours, other = (Spread.of([batch / t for t in times[side]]) for side in ("ours", best))
            limit = f"{batch / floor:.3g}"
        else:
            floor = max(shape.prefill_flops(prompt) / peak, read / bandwidth)
            ours, other = (Spread.of(times[side]).scaled(1e3) for side in ("ours", best))
            limit = f"{floor * 1e3:.3g}"
        report.add(
            **{
                "what": name,
                "ours": ours,
                "transformers": other,
                "its experts": best,
                "ratio": ratios(times[best], times["ours"]),
                "floor": limit,
                "ours / floor": f"{Spread.of(times['ours']).median / floor:.2f}",
                "transformers / floor": f"{Spread.of(times[best]).median / floor:.2f}",
                "experts hit": f"{hit:.2f}",
                "weights, GB/s": rates,
            }
        )
    report.note(
        f"peak memory of the process, both models and their files' pages: {peak_rss_gib():.2f} GiB"
    )


def matmul_rate(dtype: torch.dtype, size: int, clock: Clock = time.perf_counter) -> float:
    """Operations a second of a square product of this size, torch's best."""
    a = torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(4):
        # Not torch.mm: in bfloat16 it takes minutes on processors that do not multiply the type.
        best = min(best, seconds(lambda: torch.nn.functional.linear(a, a), clock))
    return 2 * size**3 / best


COLUMNS = (
    "what",
    "ours",
    "transformers",
    "its experts",
    "ratio",
    "floor",
    "ours / floor",
    "transformers / floor",
    "experts hit",
    "weights, GB/s",
)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_shape(parser)
    add_output(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--products", choices=("auto", "native", "plain"), default="auto")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prefill", type=int, nargs="*", default=[256])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=20, help="tokens before decoding")
    parser.add_argument("--new-tokens", type=int, default=25)
    parser.add_argument(
        "--scratch", help="folder for the random checkpoint and its store (two times its size)"
    )
    parser.add_argument("--bandwidth-bytes", type=int, default=1 << 30)
    parser.add_argument(
        "--product-size",
        type=int,
        default=2048,
        help="of the square product whose rate is the limit",
    )
    take_clock(parser)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    report = Report("Mixtral on a CPU: this engine beside transformers", COLUMNS)
    measure(args, shape_of(args), report)
    write_output(args, [report], "Mixtral on a CPU")
    return report.rows


if __name__ == "__main__":
    main()
