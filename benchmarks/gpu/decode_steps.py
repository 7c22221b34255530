"""Decode steps of whole models on a card, beside their floor and beside the eager way.

Steps of the captured graphs and of eager launches are timed in turn, in one engine. The floor is
the bytes that a step must read, over the bandwidth of a plain read in the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import decode
from benchmarks.common import Report, Spread, memory_bandwidth, ratios
from benchmarks.driving import Driven, Ours, in_turn, timed
from benchmarks.gpu.stores import KV_BYTES, several
from benchmarks.material.random_models import write_random
from benchmarks.material.shape import Shape
from benchmarks.mixed_tenants import step_bytes
from common import SamplingParams, build_store, load_engine
from common.serving.backend import Backend, Part, Row
from common.serving.sampling import Choice, sample

COLUMNS = (
    "rows",
    "tenants",
    "step, ms",
    "floor, ms",
    "step / floor",
    "experts hit",
    "eager / graph",
    "drawn / most probable",
    "drawn on the host / drawn",
    "transformers, ms",
    "transformers / ours",
    "of one tenant's rate",
)
TENANTS = 4
DRAW = Choice(SamplingParams(temperature=0.7, top_k=40, top_p=0.95), uniform=0.4)


class Eager:
    """Another side's steps without captured graphs."""

    def __init__(self, side: Ours):
        self._side = side

    def start(self) -> None:
        with _eager(self._side.backend):
            self._side.start()

    def step(self, ids: np.ndarray) -> None:
        with _eager(self._side.backend):
            self._side.step(ids)

    def stop(self) -> None:
        self._side.stop()


class Drawn:
    """Another side's steps whose tokens are drawn, on the device or of logits on the host."""

    def __init__(self, side: Ours, on_host: bool):
        self._side, self._on_host = side, on_host

    def start(self) -> None:
        self._side.start()

    def step(self, ids: np.ndarray) -> None:
        if not self._on_host:
            self._side.batch.decode(ids, want_logits=False, choice=DRAW)
            return
        for logits in self._side.batch.decode(ids, want_logits=True).logits:
            assert logits is not None
            sample(logits, DRAW)

    def stop(self) -> None:
        self._side.stop()


@contextmanager
def _eager(backend: Any) -> Iterator[None]:
    kept, backend._decode = backend._decode, None
    try:
        yield
    finally:
        backend._decode = kept


def decode_steps(
    name: str, root: Path, shape: Shape, device: str, tiny: bool, beside: bool
) -> Report:
    """Rows of one tenant and of four. beside: transformers has room on the card as well."""
    report = Report(f"Decode steps, {name}", COLUMNS)
    bandwidth = memory_bandwidth(10**7 if tiny else 4 << 30, device=device)
    one = Shape(shape.config | {"num_hidden_layers": 1})
    checkpoint = write_random(root / name, one.config, "bfloat16")
    store = build_store(root / f"{name}-store", {"tenant": checkpoint}, policy="round_robin")
    layers = shape.config["num_hidden_layers"]
    rng = np.random.default_rng(0)
    peer = _peer(shape, device) if beside else None
    with load_engine(
        several(store, layers, TENANTS),
        device=device,
        dtype="bfloat16",
        experts="grouped",
        ready_tenants=TENANTS,
        kv_cache_bytes=10**8 if tiny else KV_BYTES,
    ) as engine:
        backend = engine._require_backend()
        report.note(f"{shape}, bfloat16; device memory read {bandwidth / 1e9:.0f} GB/s")
        _difference(report, backend, engine.tenants[0], rng, shape.vocab_size)
        alone: list[float] = []
        for rows, tenants in ((1, 1), (16, 1), (16, TENANTS)):
            prompts = rng.integers(3, shape.vocab_size, size=(rows, 20))
            steps = rng.integers(3, shape.vocab_size, size=(2 if tiny else 24, rows))
            side = Ours(backend, engine.tenants[:tenants], prompts)
            sides: dict[str, Driven] = {
                "graph": side,
                "eager": Eager(side),
                "drawn": Drawn(side, on_host=False),
                "on host": Drawn(side, on_host=True),
            }
            if peer is not None and tenants == 1:
                sides["transformers"] = decode.Decoder(peer, prompts, "grouped_mm")
            measure = partial(timed, steps=steps)
            times = in_turn(sides, 2 if tiny else 5, lambda s: measure(s)[1])  # noqa: B023
            hit, _, _ = side.experts_hit(steps[:3])
            floor = step_bytes(shape, hit, tenants, 2) / bandwidth
            spread = Spread.of(times["graph"])
            theirs = times.get("transformers")
            alone = times["graph"] if tenants == 1 else alone
            report.add(
                **{
                    "rows": rows,
                    "tenants": tenants,
                    "step, ms": spread.scaled(1e3),
                    "floor, ms": f"{floor * 1e3:.3g}",
                    "step / floor": f"{spread.median / floor:.2f}",
                    "experts hit": f"{hit:.1f}",
                    "eager / graph": ratios(times["eager"], times["graph"]),
                    "drawn / most probable": ratios(times["drawn"], times["graph"]),
                    "drawn on the host / drawn": ratios(times["on host"], times["drawn"]),
                    "transformers, ms": Spread.of(theirs).scaled(1e3) if theirs else "-",
                    "transformers / ours": ratios(theirs, times["graph"]) if theirs else "-",
                    "of one tenant's rate": ratios(alone, times["graph"]) if tenants > 1 else "-",
                }
            )
        stats = engine.stats()
        report.note(f"steps by graphs: {stats['decode_graph_steps']}; {stats['experts']}")
    return report


def _peer(shape: Shape, device: str) -> Any:
    """transformers' model of the shape, with random weights made on the device."""
    config = AutoConfig.for_model(**shape.config)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def _difference(
    report: Report, backend: Backend, tenant: str, rng: np.random.Generator, vocabulary: int
) -> None:
    """How far the logits of graphs and of eager launches are apart, on the same tokens."""
    prompt = tuple(rng.integers(3, vocabulary, size=20).tolist())
    row = Row(tenant, prompt, 4, cache_prefix=False)

    def last_logits() -> np.ndarray:
        number = backend.begin(row)
        backend.step([Part(number, read=row.unread)])
        found = backend.step([Part(number, token_id=7, want_logits=True)]).logits[0]
        backend.end([number])
        assert found is not None
        return found

    graph = last_logits()
    with _eager(backend):
        eager = last_logits()
    apart = np.abs(graph - eager)
    report.note(
        f"logits of graphs beside eager: largest difference {apart.max():.3g}, mean "
        f"{apart.mean():.3g}, mean size {np.abs(eager).mean():.3g}"
    )
