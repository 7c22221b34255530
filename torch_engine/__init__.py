"""The PyTorch engine: decoders on CUDA and CPU."""

from __future__ import annotations

from typing import Any

from common.serving.backend import Backend
from common.store import Store
from torch_engine.options import TorchOptions


def load_backend(
    store: Store, device: str = "auto", dtype: str = "auto", **options: Any
) -> Backend:
    """Load a store's pool and tenants onto a device. options: the fields of `TorchOptions`. Raises
    EngineError."""
    from torch_engine.backend import TorchBackend

    return TorchBackend(store, TorchOptions.make(device=device, dtype=dtype, **options))


__all__ = ["TorchOptions", "load_backend"]
