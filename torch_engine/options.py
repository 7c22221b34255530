"""What a user can set of the PyTorch engine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from common.errors import EngineError
from common.units import is_whole


@dataclass(frozen=True)
class TorchOptions:
    """device: auto (CUDA if there is one), cpu, cuda, or cuda:N.
    dtype: auto (the store's; float16 is computed in float32 on a CPU), float32, bfloat16 or
        float16.
    experts: how products of many experts run. loop: one copy after another; grouped: one grouped
        product; auto: what was measured faster, loop on a CPU and grouped on CUDA
        (docs/architecture.md, decision on products).
    products: how matrices are kept and multiplied on a CPU. native: packed once for kernels of our
        own; plain: as they are; auto: native where it works.
        MOETEL_NATIVE=0 in the environment rules native out.
    spare_slots: copies of missing experts kept on the device, least recently used first out.
    ready_tenants: tenants whose non-expert weights are kept ready on the device; None: all on a
        CPU, 2 on CUDA.
    kv_cache_bytes: the most that keys and values of all sequences may take; None: a quarter of the
        free memory of a CPU's machine, at most 4 GiB, and four fifths of what is free on a CUDA
        device once weights are loaded.
    """

    device: str = "auto"
    dtype: str = "auto"
    experts: Literal["auto", "loop", "grouped"] = "auto"
    products: Literal["auto", "native", "plain"] = "auto"
    spare_slots: int = 16
    ready_tenants: int | None = None
    kv_cache_bytes: int | None = None

    @classmethod
    def make(cls, **values: Any) -> TorchOptions:
        """Check names and values. Raises EngineError."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise EngineError(
                f"the torch engine has no option {unknown[0]!r}; it has: {', '.join(sorted(known))}"
            )
        options = cls(**values)
        for name, allowed in (
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
            ("experts", ("auto", "loop", "grouped")),
            ("products", ("auto", "native", "plain")),
        ):
            if getattr(options, name) not in allowed:
                raise EngineError(
                    f"{name} is {getattr(options, name)!r}; choose one of {', '.join(allowed)}"
                )
        if not is_whole(options.spare_slots) or options.spare_slots < 1:
            raise EngineError(f"spare_slots is {options.spare_slots!r}; give a whole number from 1")
        for name in ("ready_tenants", "kv_cache_bytes"):
            value = getattr(options, name)
            if value is not None and (not is_whole(value) or value < 1):
                raise EngineError(f"{name} is {value!r}; give a whole number from 1, or None")
        return options
