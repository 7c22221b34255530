"""Tenant switches: their rate, what they add to a first token, and one hidden behind a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.common import Report, Spread, ratios
from benchmarks.gpu.clock import Clock, pinned
from benchmarks.gpu.stores import KV_BYTES
from benchmarks.material.shape import Shape
from common import Store, load_engine
from common.serving.backend import Backend, Row
from torch_engine.tenants.by_copy import TenantsByCopy


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
        long: dict[str, list[float]] = {way: [] for way in ways}
        first: dict[str, list[float]] = {way: [] for way in ways}
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
