"""How fast are prompts and decoding beside transformers?

The same random model, the same tokens, in turn, in one process: until the first token of a prompt,
and decode steps at several batch sizes. Next tokens are random ids, the same for both sides, so
lengths are exact and tokens spread over experts. transformers is driven through its forward with
its cache; greedy choice is included on both sides. Of its experts implementations each cell takes
the faster; batched_mm is left out, since it copies the weights of every token's experts.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    DynamicCache,
    MixtralForCausalLM,
    SwitchTransformersForConditionalGeneration,
)

from benchmarks.common import (
    Report,
    Spread,
    add_output,
    clock_of,
    machine,
    peak_rss_gib,
    ratios,
    take_clock,
    write_output,
)
from benchmarks.driving import Driven, Ours, add_engine, in_turn, open_engine, rates, timed
from benchmarks.material.random_models import write_random
from benchmarks.material.shape import Shape, add_model, shape_of
from common import Engine, build_store

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


class Decoder:
    """transformers' decoder with its cache."""

    IMPLEMENTATIONS = ("eager", "grouped_mm")

    def __init__(self, model: Any, prompts: np.ndarray, implementation: str):
        self.model, self.prompts, self.implementation = model, prompts, implementation

    @torch.inference_mode()
    def start(self) -> None:
        self.model.set_experts_implementation(self.implementation)
        self.cache = DynamicCache(config=self.model.config)
        self._forward(self.prompts)

    @torch.inference_mode()
    def step(self, ids: np.ndarray) -> None:
        self._forward(ids[:, None])

    def stop(self) -> None:
        del self.cache

    def _forward(self, ids: np.ndarray) -> None:
        tokens = torch.from_numpy(ids).to(self.model.device)
        out = self.model(
            input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        out.logits.argmax(-1).cpu()


class EncoderDecoder:
    """transformers' encoder, then its decoder with its cache, whatever the prompt's start."""

    IMPLEMENTATIONS = ("eager",)

    def __init__(self, model: Any, prompts: np.ndarray, implementation: str):
        self.model, self.prompts = model, prompts

    @torch.inference_mode()
    def start(self) -> None:
        tokens = torch.from_numpy(self.prompts).to(self.model.device)
        self.encoded, self.cache = self.model.encoder(input_ids=tokens), None
        self.step(np.zeros(len(self.prompts), dtype=np.int64))

    @torch.inference_mode()
    def step(self, ids: np.ndarray) -> None:
        out = self.model(
            encoder_outputs=self.encoded,
            decoder_input_ids=torch.from_numpy(ids[:, None]).to(self.model.device),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = out.past_key_values
        out.logits[:, -1].argmax(-1).cpu()

    def stop(self) -> None:
        del self.encoded, self.cache


PEERS: dict[str, tuple[Any, Any]] = {
    "mixtral": (MixtralForCausalLM, Decoder),
    "switch": (SwitchTransformersForConditionalGeneration, EncoderDecoder),
}


def difference_of_logits(engine: Engine, model: Any, ids: np.ndarray) -> str:
    """How far apart both sides are on the same tokens."""
    tokens = torch.from_numpy(ids).to(model.device)
    answer = ids[:, :8] if model.config.is_encoder_decoder else None
    more = {} if answer is None else {"decoder_input_ids": tokens[:, :8]}
    with torch.inference_mode():
        theirs = model(input_ids=tokens, **more).logits.float().cpu().numpy()
    apart = np.abs(engine.logits("tenant", ids, answer) - theirs)
    return (
        f"logits of both sides: largest difference {apart.max():.3g}, mean {apart.mean():.3g}, "
        f"mean size {np.abs(theirs).mean():.3g}"
    )


def compare(
    args: argparse.Namespace, shape: Shape, report: Report, engine: Engine, model: Any
) -> None:
    rng, clock = np.random.default_rng(0), clock_of(args)

    def ids(*size: int) -> np.ndarray:
        return rng.integers(3, shape.vocab_size, size=size)

    stats = engine.stats()
    report.note(f"{shape}; {args.dtype}, {args.device}; {stats['experts']}, {stats['products']}")
    report.note(difference_of_logits(engine, model, ids(1, 16)))
    limits = rates(args, report, clock)
    itemsize = getattr(torch, args.dtype).itemsize
    _, peer = PEERS[args.family]
    cells = [(f"first token, prompt {n}, ms", 1, n, 0) for n in args.prefill]
    cells += [
        (f"decode batch {b}, tokens/s", b, args.prompt, args.new_tokens - 1) for b in args.batch
    ]
    for name, batch, prompt, steps in cells:
        prompts, forced = ids(batch, prompt), ids(steps, batch)
        ours = Ours(engine._require_backend(), ["tenant"], prompts)
        hit, _, of_prompt = ours.experts_hit(ids(min(steps, 4), batch))
        sides: dict[str, Driven] = {"ours": ours}
        sides |= {n: peer(model, prompts, n) for n in peer.IMPLEMENTATIONS}
        part = 1 if steps else 0
        measure = partial(timed, steps=forced, clock=clock)
        times = in_turn(sides, args.repeats, lambda side: measure(side)[part])  # noqa: B023
        best = min(peer.IMPLEMENTATIONS, key=lambda side: Spread.of(times[side]).median)
        read = shape.step_weights(hit if steps else of_prompt) * itemsize
        floor = read / limits.bandwidth
        if not steps:
            floor = max(floor, shape.prompt_flops(prompt) / limits.peak)
        shown = {
            side: Spread.of([batch / t for t in times[side]])
            if steps
            else Spread.of(times[side]).scaled(1e3)
            for side in ("ours", best)
        }
        medians = {side: Spread.of(times[side]).median for side in ("ours", best)}
        report.add(
            **{
                "what": name,
                "ours": shown["ours"],
                "transformers": shown[best],
                "its experts": best,
                "ratio": ratios(times[best], times["ours"]),
                "floor": f"{batch / floor if steps else floor * 1e3:.3g}",
                "ours / floor": f"{medians['ours'] / floor:.2f}",
                "transformers / floor": f"{medians[best] / floor:.2f}",
                "experts hit": f"{hit if steps else of_prompt:.2f}",
                "weights, GB/s": " / ".join(f"{read / m / 1e9:.3g}" for m in medians.values()),
            }
        )
    report.note(
        f"peak memory of the process, both models and their files' pages: {peak_rss_gib():.2f} GiB"
    )


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser, mixtral={"num_hidden_layers": 16})
    add_output(parser)
    add_engine(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prefill", type=int, nargs="*", default=[32, 256])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=20, help="tokens before decoding")
    parser.add_argument("--new-tokens", type=int, default=25)
    take_clock(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = options(argv)
    shape = shape_of(args)
    report = Report("This engine beside transformers", COLUMNS)
    report.note(machine())
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        checkpoint = write_random(Path(scratch) / "checkpoint", shape.config, args.dtype)
        store = build_store(Path(scratch) / "store", {"tenant": checkpoint}, slots="all")
        peer, _ = PEERS[args.family]
        with open_engine(store, args) as engine:
            model = peer.from_pretrained(checkpoint, dtype=getattr(torch, args.dtype))
            compare(args, shape, report, engine, model.to(args.device).eval())
    write_output(args, [report], f"Decoding beside transformers, {args.family}")
    return report.rows


if __name__ == "__main__":
    main()
