"""The JAX/Flax engine: Switch Transformer on CPU and on a mesh of accelerators."""

from __future__ import annotations

from typing import Any

from common.serving.backend import Backend
from common.store import Store
from jax_engine.options import JaxOptions


def load_backend(
    store: Store, device: str = "auto", dtype: str = "auto", **options: Any
) -> Backend:
    """Load a store's pool and tenants onto a device or a mesh. Raises EngineError.

    options: the fields of `JaxOptions`.
    """
    from jax_engine.backend import JaxBackend

    return JaxBackend(store, JaxOptions.make(device=device, dtype=dtype, **options))


__all__ = ["JaxOptions", "load_backend"]
