"""Compilation that is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax


class Compiled:
    """`jax.jit`, with a count of the traces of each function."""

    def __init__(self) -> None:
        self.traces: Counter[str] = Counter()

    def __call__(self, name: str, body: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.traces[name] += 1
            return body(*args, **kwargs)

        compiled: Callable[..., Any] = jax.jit(counted, **options)
        return compiled
