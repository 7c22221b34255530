"""What a user can set of the JAX engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.bounds import COUNT, COUNT_OR_NONE, Bound, bounded, make_options
from common.errors import EngineError


@dataclass(frozen=True)
class JaxOptions:
    """device: auto (what jax prefers: an accelerator if there is one), cpu, gpu (or cuda) or tpu.
    dtype: type of the weights: auto (the store's), float32 or bfloat16. On a CPU activations are
        float32 whatever the weights are, and XLA's own products need float32 weights too (bfloat16
        ones run at a tenth of the speed), so there the values are rounded to bfloat16 but held in
        float32; our own kernels hold them in bfloat16.
    products: native (our own CPU kernels), plain (XLA), or auto: the first that works here.
    mesh: (data, expert), devices along each axis; None: one device.
    expert_capacity: tokens an expert takes of each row, the others go past the experts, as in
        transformers; "config": the tenants' own; None: nothing is dropped.
    spare_slots: copies of missing experts kept on the device, least recently used first out.
    ready_tenants: tenants whose non-expert weights are kept ready on the device; None: all.
    kv_cache_bytes: most that the sequences' caches may take on the device: keys and values of
        self-attention and cross-attention, and the encoder's states of prompts that are read in
        pieces; None: a quarter of the memory that is free when the weights are loaded, at most 4
        GiB.
    compilation_cache: folder for compiled steps, so that a later start compiles nothing; auto:
        ~/.cache/moetel/jax unless jax has one set already; None: none of ours. jax opens its cache
        once, when it first compiles anything.
    """

    device: str = bounded("auto", Bound(choices=("auto", "cpu", "gpu", "cuda", "tpu")))
    dtype: str = bounded("auto", Bound(choices=("auto", "float32", "bfloat16")))
    products: str = bounded("auto", Bound(choices=("auto", "native", "plain")))
    mesh: Sequence[int] | None = None
    expert_capacity: int | str | None = bounded(
        None, Bound(whole=True, low=1, choices=("config",), note=", or 'config'", optional=True)
    )
    spare_slots: int = bounded(16, COUNT)
    ready_tenants: int | None = bounded(None, COUNT_OR_NONE)
    kv_cache_bytes: int | None = bounded(None, COUNT_OR_NONE)
    compilation_cache: str | None = "auto"

    @classmethod
    def make(cls, **values: Any) -> JaxOptions:
        """Check names and values. Raises EngineError."""
        options = make_options(cls, values, EngineError)
        mesh = options.mesh
        if mesh is not None and (len(mesh) != 2 or not all(map(COUNT.allows, mesh))):
            raise EngineError(f"mesh is {mesh!r}; give (data, expert), two whole numbers from 1")
        return options
