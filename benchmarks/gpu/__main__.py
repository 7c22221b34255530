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
5. mixed tenants: a decode step of 4 tenants with 4 rows each beside one tenant with 16;
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
import asyncio
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Report, Shape, Spread, machine, ratios, write_random
from benchmarks.mixed_tenants import Side, step_bytes
from common import Store, build_store, load_engine
from common.planning.round_robin import plan_round_robin
from common.serving.backend import Backend, Row
from common.serving.engine import Engine
from common.store.objects import Objects
from scripts import qos_report
from scripts.load_test import System
from scripts.qos import Experiment, compare
from scripts.qos_systems import EngineSystem, Paper, Setup
from scripts.traffic import Load
from torch_engine.experts.grouped import GroupedPool
from torch_engine.experts.loop import LoopPool
from torch_engine.experts.routing import TokenTenants
from torch_engine.non_expert import TenantsByCopy

MIXTRAL_8X7B = Shape(4096, 14336, 32, 8, 2, 32, 8, 32000)
TINY = Shape(64, 128, 4, 8, 2, 4, 2, 512)


class Clock:
    """Seconds of device work, with the device idle before and after."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, call: Callable[[], Any]) -> float:
        self.wait()
        begun = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - begun

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def repeat(self, call: Callable[[], Any], repeats: int = 7) -> list[float]:
        self(call)
        return [self(call) for _ in range(repeats)]


def pinned(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(elements, dtype=dtype, pin_memory=device.type == "cuda")


def reconfiguration(store: Store, device: torch.device, clock: Clock) -> Report:
    """Tenant switches through TenantsByCopy with one place on the device, so that each switch
    copies a whole tenant."""
    report = Report(
        "Tenant switch (reconfiguration)", ("what", "milliseconds", "GB/s", "share of pinned")
    )
    tenants = TenantsByCopy(store, torch.bfloat16, device, capacity=1)
    names = store.tenants[:2]
    before = tenants.copied_bytes
    tenants.acquire([names[0]])
    size = tenants.copied_bytes - before
    host, target = (
        pinned(size // 2, torch.bfloat16, device),
        torch.empty(size // 2, dtype=torch.bfloat16, device=device),
    )
    plain, switch = [], []
    for repeat in range(9):  # in turn, so that a drift of the bus meets both
        copy_s = clock(lambda: target.copy_(host, non_blocking=True))
        switch_s = clock(lambda: tenants.acquire([names[(repeat + 1) % 2]]))  # noqa: B023
        if repeat:
            plain.append(copy_s)
            switch.append(switch_s)
    for name, values in (("one pinned copy", plain), ("tenant switch", switch)):
        rate = Spread.of([size / v / 1e9 for v in values])
        share = ratios(plain, values)
        report.add(
            **{
                "what": name,
                "milliseconds": Spread.of(values).scaled(1e3),
                "GB/s": rate,
                "share of pinned": share,
            }
        )
    report.note(
        f"{size / 1e9:.2f} GB a tenant; goal: 0.8 of the pinned rate; nothing is copied back"
    )
    tenants.close()
    return report


def first_token(store: Store, shape: Shape, device: torch.device, clock: Clock) -> Report:
    """Time until the first token with a switch before it and without, through the engine with one
    ready tenant.

    The switch is copied layer by layer while earlier layers compute, so it may add less than it
    takes. Experts here are small, which leaves little to hide it behind; real ones leave more.
    """
    report = Report(
        "What a switch adds to the first token",
        ("prompt", "same tenant, ms", "after a switch, ms", "added, ms"),
    )
    engine = load_engine(store, device=str(device), dtype="bfloat16", ready_tenants=1)
    backend, names = engine._require_backend(), store.tenants
    rng = np.random.default_rng(0)

    def answer(tenant: str, prompt: tuple[int, ...]) -> Callable[[], Any]:
        return lambda: read_prompts(backend, tenant, [prompt])

    for length in (20, 256):
        stay, switch = [], []
        for repeat in range(8):
            prompt, name = (
                tuple(rng.integers(3, shape.vocab_size, length).tolist()),
                names[repeat % 2],
            )
            if not repeat:
                clock(answer(names[1], prompt))
            before = engine.stats()["reconfigurations"]
            switch_s = clock(answer(name, prompt))
            if engine.stats()["reconfigurations"] != before + 1:
                raise AssertionError("this answer must begin with a switch")
            stay_s = clock(answer(name, prompt))
            if repeat:
                switch.append(switch_s)
                stay.append(stay_s)
        added = Spread.of([a - b for a, b in zip(switch, stay, strict=True)])
        cells = [values.scaled(1e3) for values in (Spread.of(stay), Spread.of(switch), added)]
        report.add(**{"prompt": length, **dict(zip(report.columns[1:], cells, strict=True))})
    engine.close()
    return report


def read_prompts(backend: Backend, tenant: str, prompts: Sequence[tuple[int, ...]]) -> None:
    """Until the first token of each, then forget them; freeing caches takes the device no time."""
    batch = backend.start([Row(tenant, prompt, 1) for prompt in prompts])
    batch.prefill(False)
    batch.close()


def expert_products(store: Store, device: torch.device, clock: Clock) -> Report:
    """One layer's experts for random routing, grouped against the loop."""
    report = Report(
        "Products of one layer's experts",
        ("tokens", "grouped, ms", "loop, ms", "grouped is faster by"),
    )
    spec = store.experts
    pools = [
        GroupedPool(store, torch.bfloat16, device, 1),
        LoopPool(store, torch.bfloat16, device, 1),
    ]
    rng = np.random.default_rng(0)
    for tokens in (1, 4, 16, 64, 256, 1024):
        x = torch.randn(tokens, spec.hidden_size, device=device).to(torch.bfloat16)
        ids = torch.from_numpy(
            np.stack([rng.permutation(spec.num_experts)[: spec.top_k] for _ in range(tokens)])
        ).to(device)
        gates = torch.full((tokens, spec.top_k), 1 / spec.top_k, device=device)
        who, misses = (
            TokenTenants(np.zeros(tokens, dtype=np.int64), 0),
            np.zeros(tokens, dtype=np.int64),
        )
        times = []
        with torch.inference_mode():
            for pool in pools:
                # Layers in turn, so that weights come from memory and not from a cache.
                def all_layers(
                    pool: Any = pool,
                    x: Any = x,
                    ids: Any = ids,
                    gates: Any = gates,
                    who: Any = who,
                    misses: Any = misses,
                ) -> None:
                    for layer in range(spec.num_layers):
                        pool.forward(layer, x, ids, gates, who, misses)

                times.append([t / spec.num_layers for t in clock.repeat(all_layers)])
        report.add(
            **{
                "tokens": tokens,
                "grouped, ms": Spread.of(times[0]).scaled(1e3),
                "loop, ms": Spread.of(times[1]).scaled(1e3),
                "grouped is faster by": ratios(times[1], times[0]),
            }
        )
    for pool in pools:
        pool.close()
    return report


def device_bandwidth(device: torch.device, clock: Clock, size_bytes: int) -> float:
    """Bytes a second that a sum over device memory reads."""
    data = torch.ones(size_bytes // 4, device=device)
    return size_bytes / Spread.of(clock.repeat(data.sum)).median


def decode_and_prefill(
    store: Store, checkpoint: Path, shape: Shape, device: torch.device, clock: Clock, tiny: bool
) -> Report:
    """Our engine beside transformers on the same weights."""
    from transformers import DynamicCache, MixtralForCausalLM

    report = Report(
        "Prefill and decode beside transformers",
        ("what", "ours, ms", "transformers, ms", "its experts", "ratio", "floor, ms"),
    )
    bandwidth = device_bandwidth(device, clock, 10**7 if tiny else 4 << 30)
    report.note(
        f"device memory read {bandwidth / 1e9:.0f} GB/s; {shape.num_hidden_layers} layers; "
        "floor: weights of the experts hit, read once"
    )
    engine = load_engine(store, device=str(device), dtype="bfloat16", experts="grouped")
    backend = engine._require_backend()
    model = MixtralForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(device).eval()
    rng = np.random.default_rng(0)
    steps = 3 if tiny else 16

    def ours(prompts: np.ndarray, forced: np.ndarray) -> tuple[float, float]:
        batch = backend.start(
            [Row(store.tenants[0], tuple(p.tolist()), len(forced) + 1) for p in prompts]
        )
        first = clock(lambda: batch.prefill(False))
        rest = clock(lambda: [batch.decode(ids, False) for ids in forced])
        batch.close()
        return first, rest / len(forced)

    @torch.inference_mode()
    def theirs(prompts: np.ndarray, forced: np.ndarray) -> tuple[float, float]:
        cache = DynamicCache(config=model.config)

        def forward(ids: np.ndarray) -> None:
            tokens = torch.from_numpy(ids).to(device)
            model(
                input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits.argmax(-1).cpu()

        first = clock(lambda: forward(prompts))
        rest = clock(lambda: [forward(ids[:, None]) for ids in forced])
        return first, rest / len(forced)

    vocab = shape.vocab_size
    for batch_size, prompt in ((1, 20), (4, 20), (16, 20), (1, 256)):
        times: dict[str, list[tuple[float, float]]] = {"ours": [], "eager": [], "grouped_mm": []}
        for repeat in range(4):
            prompts = rng.integers(3, vocab, size=(batch_size, prompt))
            forced = rng.integers(3, vocab, size=(steps, batch_size))
            for side, found in times.items():
                if side != "ours":
                    model.set_experts_implementation(side)
                measured = ours(prompts, forced) if side == "ours" else theirs(prompts, forced)
                if repeat:
                    found.append(measured)
        for part, what in ((0, "prefill"), (1, "decode step")):
            if (part == 0) != (prompt == 256):
                continue
            values = {side: [t[part] for t in found] for side, found in times.items()}
            best = min(("eager", "grouped_mm"), key=lambda side: Spread.of(values[side]).median)
            # Expected number of different experts for random routing of so many tokens.
            tokens = batch_size if part else prompt
            hit = shape.num_local_experts * (
                1 - (1 - shape.num_experts_per_tok / shape.num_local_experts) ** tokens
            )
            report.add(
                **{
                    "what": f"{what}, batch {batch_size}, prompt {prompt}",
                    "ours, ms": Spread.of(values["ours"]).scaled(1e3),
                    "transformers, ms": Spread.of(values[best]).scaled(1e3),
                    "its experts": best,
                    "ratio": ratios(values[best], values["ours"]),
                    "floor, ms": f"{shape.step_weights(hit) * 2 / bandwidth * 1e3:.3g}",
                }
            )
    engine.close()
    return report


def misses(build: Callable[..., Store], device: torch.device, clock: Clock) -> Report:
    """A store with no resident experts, so every look-up misses: with spare slots for all of them,
    and with one."""
    report = Report("Misses", ("what", "milliseconds", "GB/s", "share of pinned"))
    store = build(slots=0)
    size = store.copy_bytes
    host, target = (
        pinned(size // 2, torch.bfloat16, device),
        torch.empty(size // 2, dtype=torch.bfloat16, device=device),
    )
    plain = clock.repeat(lambda: target.copy_(host, non_blocking=True))
    rate = Spread.of([size / t / 1e9 for t in plain])
    report.add(
        **{
            "what": "one expert, pinned copy",
            "milliseconds": Spread.of(plain).scaled(1e3),
            "GB/s": rate,
            "share of pinned": 1,
        }
    )
    for what, spare in (
        ("decode step, all misses in spare slots", store.experts.num_positions),
        ("decode step, every miss fetched", 1),
    ):
        engine: Engine = load_engine(
            store, device=str(device), dtype="bfloat16", experts="grouped", spare_slots=spare
        )
        batch = engine._require_backend().start([Row(store.tenants[0], (5, 6, 7), 16)])
        batch.prefill(False)
        ids = np.array([9])
        before = engine.stats()["fetches"]
        values = clock.repeat(lambda: batch.decode(ids, False), 5)  # noqa: B023
        fetched = (engine.stats()["fetches"] - before) / 6
        moved = Spread.of([fetched * size / t / 1e9 for t in values])
        share = Spread.of([moved.median / rate.median])
        report.add(
            **{
                "what": f"{what} ({fetched:.1f} fetches a step)",
                "milliseconds": Spread.of(values).scaled(1e3),
                "GB/s": moved,
                "share of pinned": share,
            }
        )
        batch.close()
        engine.close()
    return report


def several(store: Store, num_layers: int, num_tenants: int) -> Store:
    """The store's first tenant with another number of layers, beside others with the same experts.

    Every layer has the weights of layer 0, and one copy of each expert serves all tenants. What is
    not an expert is other for each of them, as what tenants have equal is neither read nor copied
    for each: the first one's, turned by some places and written beside it.
    """
    first, family = store.manifest.tenants[0], store.family
    config = family.parse_config({**first.config.raw, "num_hidden_layers": num_layers}, "several")
    source = {
        name: re.sub(r"^model\.layers\.\d+", "model.layers.0", name)
        for name in family.all_shapes(config)
    }
    own = {source[name] for name in family.non_expert_shapes(config)}
    objects, known = Objects(store.path / "objects"), dict(store.manifest.objects)
    tenants = []
    for number in range(num_tenants):
        ids = {name: first.tensors[name] for name in source.values()}
        for name in own if number else ():
            array = store.ref(first.name, name).read()
            ids[name] = objects.put(np.roll(array.reshape(-1), number).reshape(array.shape))
            known[ids[name]] = known[first.tensors[name]]
        tensors = {name: ids[of] for name, of in source.items()}
        tenants.append(replace(first, name=f"tenant{number}", config=config, tensors=tensors))
    plan = plan_round_robin(
        np.zeros((num_layers, config.experts.num_experts)), tuple(t.name for t in tenants)
    )
    changed = {
        "objects": known,
        "tenants": tuple(tenants),
        "plan": plan,
        "merged": {},
        "residuals": (),
    }
    return Store(store.path, replace(store.manifest, **changed))


def mixed(store: Store, shape: Shape, device: torch.device, clock: Clock, tiny: bool) -> Report:
    """Rows of all tenants in one batch beside as many rows of one, step by step in turn."""
    report = Report(
        "Decoding for several tenants in one batch",
        (
            "tenants",
            "rows",
            "step, ms",
            "of one tenant's rate",
            "experts hit",
            "floor, ms",
            "floor of one tenant / floor",
        ),
    )
    bandwidth = device_bandwidth(device, clock, 10**7 if tiny else 4 << 30)
    rng = np.random.default_rng(0)
    rows, warm_up, steps = 4 * len(store.tenants), 5, 5 if tiny else 60
    with load_engine(
        store, device=str(device), dtype="bfloat16", ready_tenants=len(store.tenants)
    ) as engine:
        backend = engine._require_backend()
        prompts = rng.integers(3, shape.vocab_size, size=(rows, 20))
        sides = [
            Side(backend, names, prompts, warm_up + steps + 4)
            for names in (store.tenants[:1], store.tenants)
        ]
        for number in range(warm_up + steps):
            forced = rng.integers(3, shape.vocab_size, size=rows)
            for side in sides if number % 2 else sides[::-1]:
                took = side.step(forced)
                if number >= warm_up:
                    side.times.append(took)
        counted = rng.integers(3, shape.vocab_size, size=(4, rows))
        hits = [side.experts_hit(counted) for side in sides]
        read = [
            step_bytes(shape, hit, side.num_tenants, 2)
            for hit, side in zip(hits, sides, strict=True)
        ]
        for side, hit, size in zip(sides, hits, read, strict=True):
            report.add(
                **{
                    "tenants": side.num_tenants,
                    "rows": rows,
                    "step, ms": Spread.of(side.times).scaled(1e3),
                    "of one tenant's rate": ratios(sides[0].times, side.times),
                    "experts hit": f"{hit:.2f}",
                    "floor, ms": f"{size / bandwidth * 1e3:.3g}",
                    "floor of one tenant / floor": f"{read[0] / size:.3f}",
                }
            )
            side.batch.close()
    report.note(f"{shape.num_hidden_layers} layers; device memory read {bandwidth / 1e9:.0f} GB/s")
    return report


KV_BYTES = 2 << 30


def layers_that_fit(shape: Shape, device: torch.device, ready_tenants: int) -> int:
    """How many layers' experts the card holds beside so many tenants, caches and room to compute;
    all on a CPU."""
    if device.type != "cuda":
        return shape.num_hidden_layers
    free, _ = torch.cuda.mem_get_info(device)
    vocabulary = 2 * shape.vocab_size * shape.hidden_size * 2  # embedding and head
    rest = (shape.step_weights(0) - shape.vocab_size * shape.hidden_size) / shape.num_hidden_layers
    layer = 2 * (shape.num_local_experts * shape.expert_weights + ready_tenants * rest)
    room = 0.9 * free - KV_BYTES - (4 << 30) - ready_tenants * vocabulary
    return max(1, min(shape.num_hidden_layers, int(room / layer)))


def hidden_switch(store: Store, device: torch.device, clock: Clock, tiny: bool) -> Report:
    """A tenant's first token after another tenant's long prompt: in place already, not there,
    brought meanwhile."""
    report = Report(
        "A switch hidden behind the prompt before it",
        (
            "next tenant",
            "its first token, ms",
            "the prompt before it, ms",
            "both beside in place, ms",
        ),
    )
    rng = np.random.default_rng(0)
    vocab = store.config(store.tenants[0]).vocab_size

    def prompts(count: int, length: int) -> list[tuple[int, ...]]:
        return [tuple(p) for p in rng.integers(3, vocab, size=(count, length)).tolist()]

    options: dict[str, Any] = {"ready_tenants": 2, "kv_cache_bytes": 1 << 24 if tiny else KV_BYTES}
    with load_engine(store, device=str(device), dtype="bfloat16", **options) as engine:
        backend, (now, coming, other) = engine._require_backend(), store.tenants[:3]
        ways = ("in place", "not there", "brought meanwhile")
        long, first = ({way: [] for way in ways} for _ in range(2))  # type: dict[str, list[float]]
        for repeat in range(4 if tiny else 8):
            busy, short = prompts(2, 8) if tiny else prompts(8, 512), prompts(1, 20)
            for way in ways:
                for name in (coming if way == "in place" else other, now):
                    read_prompts(backend, name, short)

                def prompt_before(way: str = way, busy: Any = busy) -> None:
                    if way == "brought meanwhile":
                        backend.prefetch([coming])
                    read_prompts(backend, now, busy)

                long_s = clock(prompt_before)
                first_s = clock(lambda: read_prompts(backend, coming, short))  # noqa: B023
                if repeat:
                    long[way].append(long_s)
                    first[way].append(first_s)
        for way in ways:
            both = [a + b for a, b in zip(long[way], first[way], strict=True)]
            beside = [a + b for a, b in zip(long["in place"], first["in place"], strict=True)]
            report.add(
                **{
                    "next tenant": way,
                    "its first token, ms": Spread.of(first[way]).scaled(1e3),
                    "the prompt before it, ms": Spread.of(long[way]).scaled(1e3),
                    "both beside in place, ms": Spread.of(
                        [a - b for a, b in zip(both, beside, strict=True)]
                    ).scaled(1e3),
                }
            )
        report.note(
            f"{store.experts.num_layers} layers, {len(busy)} x {len(busy[0])} tokens before it"
        )
    return report


def qos(store: Store, device: torch.device, seconds: float, tiny: bool) -> Report:
    """Open-loop arrivals over all tenants, two of them ready at once: this engine, then the paper's
    way."""
    report = Report("QoS of several tenants", qos_report.COLUMNS)
    kv_bytes = 1 << 24 if tiny else KV_BYTES
    setup = Setup(
        store.path, 4 if tiny else 32, options={"device": str(device), "kv_cache_bytes": kv_bytes}
    )

    async def ours() -> System:
        return await EngineSystem.load("moetel", store, setup, ready_tenants=2)

    async def theirs() -> System:
        one = replace(setup, max_num_seqs=1)
        return Paper(await EngineSystem.load("paper", store, one, ready_tenants=1))

    experiment = Experiment(
        dict.fromkeys(store.tenants, store.config(store.tenants[0]).vocab_size),
        Load(input_len=8 if tiny else 128, output_len=25, range_ratio=0.5),
        loads=(0.1, 0.3),
        duration_s=seconds,
        drain_s=seconds / 2,
        capacity_s=seconds / 2,
        concurrency=setup.max_num_seqs,
    )
    found = asyncio.run(compare({"moetel": ours, "paper": theirs}, experiment))
    for cell in found.cells:
        report.add(**dict(zip(report.columns, qos_report.row(cell), strict=True)))
    for line in qos_report.remarks(found):
        report.note(line)
    report.note(
        f"{store.experts.num_layers} layers, {len(store.tenants)} tenants of which 2 (paper: 1) "
        "are ready at once; "
        "load: share of moetel's own saturation rate; a replacement streams layer by layer here, "
        "the paper's too"
    )
    return report


def write_tenant(path: Path, shape: Shape, seed: int, same_layers: bool) -> Path:
    """A random checkpoint whose layers are one shard, linked under every layer's names if
    `same_layers`."""
    if not same_layers:
        return write_random(path, shape, torch.bfloat16, seed)
    from safetensors.torch import load_file, save_file

    one = write_random(path / "one", replace(shape, num_hidden_layers=1), torch.bfloat16, seed)
    layer = load_file(one / "layer-0.safetensors")
    weight_map: dict[str, str] = {}
    for number in range(shape.num_hidden_layers):
        # Experts of every layer equal: the store keeps them once. Everything else too, which costs
        # what it would anyway.
        tensors = {
            name.replace("layers.0.", f"layers.{number}."): tensor for name, tensor in layer.items()
        }
        save_file(tensors, path / f"layer-{number}.safetensors", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, f"layer-{number}.safetensors"))
    rest = load_file(one / "rest.safetensors")
    save_file(rest, path / "rest.safetensors", metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(rest, "rest.safetensors"))
    import json
    import shutil

    shutil.rmtree(one)
    (path / "config.json").write_text(json.dumps(shape.config | {"dtype": "bfloat16"}))
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )
    return path


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
    cut = replace(full, num_hidden_layers=min(args.layers, full.num_hidden_layers))
    begun = time.perf_counter()
    heading = f"GPU suite on {name}, {date.today()}"
    print(f"{heading}\n{machine()}")
    reports = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        root = Path(scratch)
        checkpoint = write_tenant(root / "cut", cut, 0, same_layers=True)

        def build(**options: Any) -> Store:
            return build_store(
                root / "store", {"tenant": checkpoint}, policy="round_robin", **options
            )

        store = build(slots="all")
        reports.append(expert_products(store, device, clock))
        reports.append(decode_and_prefill(store, checkpoint, cut, device, clock, args.tiny))
        reports.append(
            mixed(several(store, cut.num_hidden_layers, 4), cut, device, clock, args.tiny)
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()
        reports.append(misses(build, device, clock))
        thin = non_expert_store(root, full)
        reports[:0] = [reconfiguration(thin, device, clock), first_token(thin, full, device, clock)]
        if device.type == "cuda":
            torch.cuda.empty_cache()
        deep = several(store, layers_that_fit(full, device, 2), 4)

        def left_s() -> float:
            return args.minutes * 60 - (time.perf_counter() - begun)

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


def non_expert_store(root: Path, full: Shape) -> Store:
    """Two tenants with all layers' real non-expert weights and small experts: only the former are
    switched."""
    thin = replace(full, intermediate_size=64)
    paths = {
        f"tenant{seed}": write_random(root / f"thin{seed}", thin, torch.bfloat16, seed)
        for seed in (1, 2)
    }
    return build_store(root / "thin", paths, policy="round_robin")


if __name__ == "__main__":
    sys.exit(main())
