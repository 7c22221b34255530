"""Every CUDA figure in one command, under ten minutes, for any machine with a card: `python -m
benchmarks.gpu --out docs/results`.

Real Mixtral-8x7B widths (hidden 4096, intermediate 14336, 8 experts, 32 and 8 heads, vocabulary
32000, bfloat16), random weights, no download:

1. reconfiguration: a tenant's 3.2 GB of non-expert weights, all 32 layers, against a plain pinned
   copy of that size, and what a switch adds to the time until the first token;
2. expert products: the grouped product against the loop, one layer, by number of tokens;
3. prefill and decode beside transformers on the first layers of the model, with the floor from its
own bandwidth;
4. misses: fetching one expert against pinned bandwidth, and what a missing layer costs a decode
    step;
5. decode steps of OLMoE-1B-7B's and Qwen3-30B-A3B's shapes whole, and of as many layers of
   Mixtral-8x7B as the card holds: 1 and 16 rows, of one tenant and of four;
6. a switch hidden behind the prompt before it, on as many layers as the card holds;
7. QoS in the time that is left: several tenants under open-loop arrivals, this engine beside the
   paper's way (first come, first served, batch 1, replacement before the request), on the same
   layers.

The experts of all layers are written as the same few tensors: the store keeps them once, so it fits
on a small disk, while on the card every slot is memory of its own, so all reads are real. Tenants
in 5 to 7 have these experts in common and non-expert weights of their own. `--device cpu --tiny`
runs the same code on any machine, for tests.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralForCausalLM

from benchmarks import decode
from benchmarks.common import Report, machine
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.decode_steps import TENANTS, decode_steps
from benchmarks.gpu.experts import expert_products, misses
from benchmarks.gpu.qos import qos
from benchmarks.gpu.stores import MIXTRAL_8X7B, TINY, layers_that_fit, non_expert_store, several
from benchmarks.gpu.switches import first_token, hidden_switch, reconfiguration
from benchmarks.material.random_models import MODELS, write_random
from benchmarks.material.shape import Shape
from common import Store, build_store, load_engine


def decode_and_prefill(
    store: Store, checkpoint: Path, shape: Shape, device: str, tiny: bool
) -> Report:
    """Our engine beside transformers on the same weights."""
    report = Report("Prefill and decode beside transformers", decode.COLUMNS)
    size = ["--bandwidth-bytes", str(10**7 if tiny else 4 << 30), "--repeats", "3"]
    args = decode.options(["--device", device, "--prefill", "256", "--new-tokens", "17", *size])
    model = MixtralForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(device).eval()
    with load_engine(store, device=device, dtype="bfloat16", experts="grouped") as engine:
        decode.compare(args, shape, report, engine, model)
    return report


def steps_of_models(
    root: Path, device: str, tiny: bool, left_s: Callable[[], float]
) -> list[Report]:
    """Part 5, as far as the time goes."""
    if tiny:
        return [decode_steps("tiny", root, TINY, device, tiny, True)]
    mixtral = Shape(
        MIXTRAL_8X7B.config
        | {"num_hidden_layers": layers_that_fit(MIXTRAL_8X7B, torch.device(device), TENANTS)}
    )
    found = []
    for name, shape, beside in (
        ("olmoe", Shape(MODELS["olmoe"]), True),
        ("mixtral-8x7b", mixtral, False),
        ("qwen3-30b-a3b", Shape(MODELS["qwen3-30b-a3b"]), False),
    ):
        if left_s() < 2 * LOAD_S:
            print(f"left out for lack of time: decode steps of {name}; give --minutes more")
            continue
        found.append(decode_steps(name, root, shape, device, tiny, beside))
        print(found[-1].markdown())
        gc.collect()
        torch.cuda.empty_cache()
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the suite itself")
    parser.add_argument(
        "--layers", type=int, default=4, help="layers for parts 2 to 4 (2.8 GB each, twice)"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="most that the suite may take")
    parser.add_argument("--out", type=Path, help="folder for DATE-DEVICE.md")
    parser.add_argument(
        "--scratch", help="folder for the random stores, about 30 GB with the defaults"
    )
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            "error: torch sees no CUDA device here; use --device cpu --tiny to try the suite "
            "itself\n"
        )
        return 1
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    clock = Clock(device)
    full = TINY if args.tiny else MIXTRAL_8X7B
    layers = min(args.layers, full.config["num_hidden_layers"])
    cut = Shape(full.config | {"num_hidden_layers": layers})
    begun = time.perf_counter()
    heading = f"GPU suite on {name}, {date.today()}"
    print(f"{heading}\n{machine()}")
    reports: list[Report] = []

    def left_s() -> float:
        return float(args.minutes * 60) - (time.perf_counter() - begun)

    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        root = Path(scratch)
        reports += steps_of_models(root, args.device, args.tiny, left_s)
        checkpoint = write_random(root / "cut", cut.config, "bfloat16", same_layers=True)

        def build(**options: Any) -> Store:
            return build_store(
                root / "store", {"tenant": checkpoint}, policy="round_robin", **options
            )

        store = build(slots="all")
        reports.append(expert_products(store, device, clock))
        reports.append(decode_and_prefill(store, checkpoint, cut, args.device, args.tiny))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        reports.append(misses(build, device, clock))
        thin = non_expert_store(root, full)
        reports[:0] = [reconfiguration(thin, device, clock), first_token(thin, full, device, clock)]
        if device.type == "cuda":
            torch.cuda.empty_cache()
        deep = several(store, layers_that_fit(full, device, 2), 4)

        reports += last_parts(deep, device, clock, args.tiny, left_s)
    reports[0].note(f"{machine()}; whole suite {time.perf_counter() - begun:.0f} s")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"{date.today()}-{name.lower().replace(' ', '-')}.md"
        path.write_text("\n".join([f"# {heading}", "", *(r.markdown() for r in reports)]))
        print(f"written: {path}")
    return 0


LOAD_S = 40.0
"""What loading an engine of all layers that fit is supposed to take at most, in seconds."""

QOS_TESTS = 12
"""A run of `qos` takes about so many times its `seconds`, loading apart."""


def last_parts(
    store: Store, device: torch.device, clock: Clock, tiny: bool, left_s: Callable[[], float]
) -> list[Report]:
    """Parts 6 and 7, as far as the time goes."""
    found = []
    if tiny or left_s() > 2 * LOAD_S:
        found.append(hidden_switch(store, device, clock, tiny))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    seconds = 0.5 if tiny else min(15.0, (left_s() - 3 * LOAD_S) / QOS_TESTS)
    if seconds >= 0.5:
        found.append(qos(store, device, seconds, tiny))
    if len(found) < 2:
        print(
            f"left out for lack of time: {', '.join(('hidden switch', 'QoS')[len(found) :])}; give "
            "--minutes more"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
