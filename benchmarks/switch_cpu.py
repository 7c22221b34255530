"""The JAX engine beside transformers on a CPU: the same random Switch Transformer, the same tokens,
in turn, in one process.

Time until the first token (encoder and one decoder step) and decode steps at several batch sizes.
Next tokens are random ids, the same for both sides, so lengths are exact and tokens spread over
experts. transformers is driven through its forward with its cache, without generate()'s overhead;
greedy choice included on both sides.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import SwitchTransformersForConditionalGeneration

from benchmarks.common import (
    Report,
    Spread,
    add_output,
    machine,
    memory_bandwidth,
    peak_rss_gib,
    ratios,
    write_output,
)
from benchmarks.mixtral_cpu import Ours, matmul_rate, timed
from benchmarks.switch_shape import (
    SwitchShape,
    add_switch_shape,
    switch_shape_of,
    write_random_switch,
)
from common import build_store, load_engine
from common.serving.engine import Engine

Model = SwitchTransformersForConditionalGeneration


class Theirs:
    """transformers' Switch Transformer, whatever the prompt's start."""

    def __init__(self, model: Model):
        self.model = model

    @torch.inference_mode()
    def start(self, prompts: np.ndarray) -> None:
        self.encoded, self.cache = self.model.encoder(input_ids=torch.from_numpy(prompts)), None
        self.step(np.zeros(len(prompts), dtype=np.int64))

    @torch.inference_mode()
    def step(self, ids: np.ndarray) -> None:
        out = self.model(
            encoder_outputs=self.encoded,
            decoder_input_ids=torch.from_numpy(ids[:, None]),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = out.past_key_values
        out.logits[:, -1].argmax(-1)

    def stop(self) -> None:
        del self.encoded, self.cache


class HitCounter:
    """Different experts hit a decoder layer and step, counted on transformers' routers in a run
    that is not timed."""

    def __init__(self, model: Model):
        self.hits: list[int] = []
        routers = [block.layer[-1].mlp.router for block in model.decoder.block if block.is_sparse]
        self.handles = [
            router.register_forward_hook(
                lambda _m, _a, out: self.hits.append(int((out[0].sum((0, 1)) > 0).sum()))
            )
            for router in routers
        ]

    def close(self) -> float:
        for handle in self.handles:
            handle.remove()
        return float(np.mean(self.hits))


def measure(args: argparse.Namespace, shape: SwitchShape, report: Report) -> None:
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        checkpoint = write_random_switch(Path(scratch) / "checkpoint", shape, args.dtype)
        build_store(Path(scratch) / "store", {"tenant": checkpoint}, slots="all")
        engine = load_engine(Path(scratch) / "store", device="cpu", products=args.products)
        model = Model.from_pretrained(checkpoint, dtype=getattr(torch, args.dtype)).eval()
        compare(args, shape, report, engine, model)
        engine.close()


def compare(
    args: argparse.Namespace, shape: SwitchShape, report: Report, engine: Engine, model: Model
) -> None:
    import jax

    rng = np.random.default_rng(0)

    def ids(*size: int) -> np.ndarray:
        return rng.integers(3, shape.vocab_size, size=size)

    stats = engine.stats()
    report.note(machine() + f", jax {jax.__version__}")
    report.note(f"{shape}, {args.dtype}; experts {stats['experts']}, products {stats['products']}")
    probe, answer = ids(1, 16), ids(1, 8)
    with torch.inference_mode():
        out = model(input_ids=torch.from_numpy(probe), decoder_input_ids=torch.from_numpy(answer))
    theirs = out.logits.float().numpy()
    difference = np.abs(engine.logits("tenant", probe, answer) - theirs)
    report.note(
        f"logits of both sides on 8 tokens: largest difference {difference.max():.3g}, mean "
        f"{difference.mean():.3g}, "
        f"mean size {np.abs(theirs).mean():.3g}"
    )
    bandwidth, peak = (
        memory_bandwidth(args.bandwidth_bytes),
        matmul_rate(torch.float32, args.product_size),
    )
    report.note(
        f"memory read {bandwidth / 1e9:.1f} GB/s, float32 matrix product {peak / 1e9:.0f} GFLOP/s, "
        "of torch in this run"
    )
    itemsize = getattr(torch, args.dtype).itemsize
    sides: dict[str, Any] = {"ours": Ours(engine), "transformers": Theirs(model)}
    cells = [(f"first token, prompt {n}, ms", 1, n, 0) for n in args.prefill]
    cells += [
        (f"decode batch {b}, tokens/s", b, args.prompt, args.new_tokens - 1) for b in args.batch
    ]
    for name, batch, prompt, steps in cells:
        times: dict[str, list[float]] = {side: [] for side in sides}
        counter = HitCounter(model)
        timed(sides["transformers"], ids(batch, prompt), ids(min(steps, 4), batch))
        hit = counter.close()
        for repeat in range(args.repeats + 1):
            prompts, forced = ids(batch, prompt), ids(steps, batch)
            for side in sides:
                seconds = timed(sides[side], prompts, forced)[1 if steps else 0]
                if repeat:  # the first round compiles and warms up
                    times[side].append(seconds)
        read = shape.step_weights(hit) * itemsize
        floor = read / bandwidth
        if steps:
            shown = {side: Spread.of([batch / t for t in times[side]]) for side in sides}
            limit = f"{batch / floor:.3g}"
        else:
            floor += shape.encoder_flops(prompt) / peak
            shown = {side: Spread.of(times[side]).scaled(1e3) for side in sides}
            limit = f"{floor * 1e3:.3g}"
        medians = {side: Spread.of(times[side]).median for side in sides}
        report.add(
            what=name,
            **shown,
            ratio=ratios(times["transformers"], times["ours"]),
            floor=limit,
            **{f"{side} / floor": f"{medians[side] / floor:.2f}" for side in sides},
            **{"experts hit": f"{hit:.2f}"},
        )
    report.note(
        f"peak memory of the process, both models and their files' pages: {peak_rss_gib():.2f} GiB"
    )


COLUMNS = (
    "what",
    "ours",
    "transformers",
    "ratio",
    "floor",
    "ours / floor",
    "transformers / floor",
    "experts hit",
)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_switch_shape(parser)
    add_output(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--products", choices=("auto", "native", "plain"), default="auto")
    parser.add_argument("--threads", type=int, help="torch's; default: its own choice")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prefill", type=int, nargs="*", default=[32, 256])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=32, help="tokens before decoding")
    parser.add_argument("--new-tokens", type=int, default=25)
    parser.add_argument(
        "--scratch", help="folder for the random checkpoint and its store (two times its size)"
    )
    parser.add_argument("--bandwidth-bytes", type=int, default=1 << 30)
    parser.add_argument(
        "--product-size",
        type=int,
        default=4096,
        help="of the square product whose rate is the limit",
    )
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    report = Report("Switch Transformer on a CPU: this engine beside transformers", COLUMNS)
    measure(args, switch_shape_of(args), report)
    write_output(args, [report], "Switch Transformer on a CPU")
    return report.rows


if __name__ == "__main__":
    main()
