"""Experts on the card: grouped products against the loop, and fetching those that are missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.common import Report, Spread, ratios
from benchmarks.gpu.clock import Clock, pinned
from common import Engine, Store, load_engine
from common.serving.backend import Row
from torch_engine.experts.grouped_pool import GroupedPool
from torch_engine.experts.loop_pool import LoopPool
from torch_engine.experts.token_tenants import TokenTenants


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
