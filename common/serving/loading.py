"""Load a store for inference with the engine of its family."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.bounds import COUNT
from common.errors import EngineError
from common.families.shape import Decoder, EncoderDecoder
from common.serving.backend import Backend
from common.serving.engine import Engine
from common.serving.scheduler_options import SchedulerOptions
from common.store import Store

# The engine of each shape.
BACKENDS = {Decoder: "torch", EncoderDecoder: "jax"}


def load_engine(
    store: str | Path | Store,
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    *,
    max_batch_size: int | None = None,
    scheduler: SchedulerOptions | None = None,
    **options: Any,
) -> Engine:
    """Load a store for inference.

    Args:
        store: the directory, or an open store.
        backend: auto picks by shape: torch for decoders, jax for encoder-decoders.
        device: auto takes a GPU if there is one.
        dtype: auto is the store's; float32 or bfloat16 to override.
        max_batch_size: short for the scheduler's `max_num_seqs`.
        scheduler: how requests share steps.
        options: the backend's own; see `TorchOptions` in torch_engine/options.py and `JaxOptions`
            in jax_engine/options.py.

    Raises:
        StoreError: the store cannot be opened.
        EngineError: the engine is not installed, or an option is not allowed.
    """
    opened = store if isinstance(store, Store) else Store.open(store)
    serves = BACKENDS[type(opened.config(opened.tenants[0]).shape)]
    if backend not in ("auto", serves):
        raise EngineError(
            f"backend {backend!r} does not serve family {opened.family.name!r}; use {serves!r}"
        )
    chosen = scheduler or SchedulerOptions()
    if max_batch_size is not None:
        if not COUNT.allows(max_batch_size):
            raise EngineError(f"max_batch_size is {max_batch_size!r}; {COUNT.words}")
        tokens = max(chosen.max_num_batched_tokens, max_batch_size)
        chosen = replace(chosen, max_num_seqs=max_batch_size, max_num_batched_tokens=tokens)
    chosen.check_tenants(opened.tenants)
    return Engine(opened, _load_backend(serves, opened, device, dtype, options), chosen)


def _load_backend(
    name: str, store: Store, device: str, dtype: str, options: Mapping[str, Any]
) -> Backend:
    # Found by name, so that nothing here imports a framework.
    try:
        engine = importlib.import_module(f"{name}_engine.backend")
    except ImportError as error:
        raise EngineError(
            f"the {name} backend is not installed ({error}); run: pip install 'moetel[{name}]'"
        ) from error
    backend: Backend = engine.load_backend(store, device=device, dtype=dtype, **options)
    return backend
