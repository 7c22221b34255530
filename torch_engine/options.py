"""What a user can set of the PyTorch engine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from common.errors import EngineError


@dataclass(frozen=True)
class TorchOptions:
    """device: auto (CUDA if there is one), cpu, cuda, or cuda:N.
    dtype: auto (the store's; float16 is computed in float32 on a CPU), float32, bfloat16 or float16.
    experts: how products of many experts run. loop: one copy after another; grouped: one grouped product; auto: what
        was measured faster, loop on a CPU and grouped on CUDA (docs/architecture.md, decision on products).
    products: how matrices are kept and multiplied on a CPU. packed: reordered once for oneDNN; native: so too, and few
        rows are multiplied by kernels of our own; plain: as they are; auto: the first of native, packed and plain that
        works here.
    spare_slots: copies of missing experts kept on the device, least recently used first out.
    ready_tenants: tenants whose non-expert weights are kept ready on the device; None: all on a CPU, 2 on CUDA.
    """

    device: str = "auto"
    dtype: str = "auto"
    experts: Literal["auto", "loop", "grouped"] = "auto"
    products: Literal["auto", "native", "packed", "plain"] = "auto"
    spare_slots: int = 16
    ready_tenants: int | None = None

    @classmethod
    def make(cls, **values: Any) -> TorchOptions:
        """Check names and values. Raises EngineError."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise EngineError(f"the torch engine has no option {unknown[0]!r}; it has: {', '.join(sorted(known))}")
        options = cls(**values)
        for name, allowed in (
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
            ("experts", ("auto", "loop", "grouped")),
            ("products", ("auto", "native", "packed", "plain")),
        ):
            if getattr(options, name) not in allowed:
                raise EngineError(f"{name} is {getattr(options, name)!r}; choose one of {', '.join(allowed)}")
        if not isinstance(options.spare_slots, int) or options.spare_slots < 1:
            raise EngineError(f"spare_slots is {options.spare_slots!r}; give a whole number from 1")
        if options.ready_tenants is not None and (
            not isinstance(options.ready_tenants, int) or options.ready_tenants < 1
        ):
            raise EngineError(f"ready_tenants is {options.ready_tenants!r}; give a whole number from 1, or None")
        return options
