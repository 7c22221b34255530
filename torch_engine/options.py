"""What a user can set of the PyTorch engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.bounds import COUNT, COUNT_OR_NONE, Bound, bounded, make_options
from common.errors import EngineError


@dataclass(frozen=True)
class TorchOptions:
    """device: auto (CUDA if there is one), cpu, cuda, or cuda:N.
    dtype: auto (the store's; float16 is computed in float32 on a CPU), float32, bfloat16 or
        float16.
    experts: how products of many experts run. loop: one copy after another; grouped: one grouped
        product; auto: what was measured faster, loop on a CPU and grouped on CUDA
        (docs/architecture.md, "Experts on CUDA are one grouped product").
    products: how matrices are kept and multiplied on a CPU. native: packed once for kernels of our
        own; plain: as they are; auto: native where it works.
        MOETEL_NATIVE=0 in the environment rules native out.
    decode: how steps are computed in which every request gets its next token. graph: Triton kernels
        for all tenants at once, captured as a CUDA graph, of those that cannot miss, others as with
        eager; eager: the way of prompts; auto: graph on CUDA where triton is installed and experts
        are grouped (docs/architecture.md, "Decode steps on CUDA").
    spare_slots: copies of missing experts kept on the device, least recently used first out.
    ready_tenants: tenants whose non-expert weights are kept ready on the device; None: all on a
        CPU, on CUDA as many as fit into half of what is free beside the pool.
    kv_cache_bytes: the most that keys and values of all sequences may take; None: a quarter of the
        free memory of a CPU's machine, at most 4 GiB, and four fifths of what is free on a CUDA
        device once weights are loaded.
    enable_prefix_caching: keep the keys and values of what was read and answered for as long as
        there is room, and do not compute the beginning of a prompt again that its tenant has read.
    """

    device: str = "auto"
    dtype: str = bounded("auto", Bound(choices=("auto", "float32", "bfloat16", "float16")))
    experts: str = bounded("auto", Bound(choices=("auto", "loop", "grouped")))
    products: str = bounded("auto", Bound(choices=("auto", "native", "plain")))
    decode: str = bounded("auto", Bound(choices=("auto", "graph", "eager")))
    spare_slots: int = bounded(16, COUNT)
    ready_tenants: int | None = bounded(None, COUNT_OR_NONE)
    kv_cache_bytes: int | None = bounded(None, COUNT_OR_NONE)
    enable_prefix_caching: bool = bounded(True, Bound(choices=(True, False)))

    @classmethod
    def make(cls, **values: Any) -> TorchOptions:
        """Check names and values. Raises EngineError."""
        return make_options(cls, values, EngineError)
