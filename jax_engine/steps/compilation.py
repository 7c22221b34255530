"""Compilation: counted, and kept on disk."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

DEFAULT_LEAST_COMPILE_S = 1.0
"""jax's own: another value is the user's."""


class CountedJit:
    """`jax.jit`, with a count of the traces of each function."""

    def __init__(self) -> None:
        self.traces: Counter[str] = Counter()

    def __call__(self, name: str, body: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.traces[name] += 1
            return body(*args, **kwargs)

        compiled: Callable[..., Any] = jax.jit(counted, **options)
        return compiled


def use_compilation_cache(wanted: str | None) -> None:
    """Let jax keep compiled steps in a folder.

    What the user has set already, in jax or its environment, stays.
    """
    if wanted is None or (
        wanted == "auto" and getattr(jax.config, "jax_compilation_cache_dir", None)
    ):
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update(
        "jax_compilation_cache_dir", str(cache / "moetel" / "jax") if wanted == "auto" else wanted
    )
    # jax keeps what took it a second to compile. A step by layers is dozens of calls that take half
    # of one each.
    least = "jax_persistent_cache_min_compile_time_secs"
    if least.upper() not in os.environ and getattr(jax.config, least) == DEFAULT_LEAST_COMPILE_S:
        jax.config.update(least, 0.0)
