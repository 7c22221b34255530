"""Several tenants under open-loop arrivals, this engine beside the paper's way."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import torch

from benchmarks.common import Report
from benchmarks.gpu.stores import KV_BYTES
from benchmarks.lab.judge import judge
from benchmarks.lab.systems import Paper
from common import Store
from scripts.load import report as load_report
from scripts.load.engine_system import EngineSystem, Setup
from scripts.load.experiment import Experiment, compare
from scripts.load.run import System
from scripts.load.traffic import Load


def qos(store: Store, device: torch.device, seconds: float, tiny: bool) -> Report:
    """Open-loop arrivals over all tenants, two of them ready at once: this engine, then the paper's
    way."""
    report = Report("QoS of several tenants", load_report.COLUMNS)
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
    found.aims = [str(aim) for aim in judge(found) if aim.value is not None]
    for cell in found.cells:
        report.add(**dict(zip(report.columns, load_report.row(cell), strict=True)))
    for line in load_report.remarks(found):
        report.note(line)
    report.note(
        f"{store.experts.num_layers} layers, {len(store.tenants)} tenants of which 2 (paper: 1) "
        "are ready at once; "
        "load: share of moetel's own saturation rate; a replacement streams layer by layer here, "
        "the paper's too"
    )
    return report
